# SPDX-License-Identifier: Apache-2.0
"""Which model an adapter of engines.vllm.adapters belongs to."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flashd.daemon.events import Events
from flashd.daemon.serving.adapters import Adapters
from flashd.store.catalog import Model
from flashd.tasks import Background


def named(name: str, *aliases: str) -> Model:
    return cast(Model, SimpleNamespace(name=name, aliases=aliases))


@pytest.mark.parametrize(
    ("base", "models", "owner"),
    [
        ("Qwen/X", [named("Qwen/X"), named("other/X")], "Qwen/X"),
        ("Qwen/X", [named("other/X", "Qwen/X"), named("X")], "other/X"),
        ("Qwen/X", [named("other/X")], "other/X"),
        ("Qwen/X", [named("one/X"), named("other/X")], None),
        ("Qwen/X", [named("Y")], None),
    ],
)
async def test_it_belongs_to_one_model_or_to_none(
    base: str, models: list[Model], owner: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / "tune"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 8}))
    vllm = SimpleNamespace(adapters=(f"tune={folder}",))
    settings = SimpleNamespace(current=SimpleNamespace(engines=SimpleNamespace(vllm=vllm)))
    catalog = SimpleNamespace(models=lambda: models)
    events, told = Events(), asyncio.Event()
    events.model_changed.subscribe(lambda name: told.set())
    adapters = Adapters(cast(Any, settings), cast(Any, catalog), Background(), events)
    adapters.start()
    if owner is not None:
        await asyncio.wait_for(told.wait(), 30)
    else:
        await adapters._read()
    assert [model.name for model in models if adapters.of(model) == ["tune"]] == ([owner] if owner else [])

    told.clear()
    models.insert(0, named("Qwen/X"))  # another may be meant now
    events.model_published(models[0])
    assert told.is_set()
