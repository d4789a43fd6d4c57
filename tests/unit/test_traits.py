# SPDX-License-Identifier: Apache-2.0
"""What the files of checkpoints say of what models can do, and for how long that is kept."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from waiting import PATIENCE_S

from flashd.daemon.events import Events
from flashd.daemon.serving.capabilities import Capabilities
from flashd.store.catalog import Model
from flashd.tasks import Background


class Store:
    """A catalog, which counts how often the files of a checkpoint are looked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listed: list[Model] = []
        self.times: dict[str, int] = {}
        self.may_answer = threading.Event()
        self.may_answer.set()

    def models(self) -> list[Model]:
        return self.listed

    def checkpoint(self, checkpoint_id: str) -> SimpleNamespace:
        self.times[checkpoint_id] = self.times.get(checkpoint_id, 0) + 1
        assert self.may_answer.wait(PATIENCE_S)
        return SimpleNamespace(directory=self.folder)


def version(checkpoint_id: str) -> Model:
    return cast(Model, SimpleNamespace(name="ada", aliases=(), checkpoint_id=checkpoint_id))


@pytest.mark.parametrize("step", ["removed", "removed while it is read", "replaced"])
async def test_they_are_kept_no_longer_than_the_checkpoint_is_a_models(step: str, tmp_path: Path) -> None:
    store, background, events = Store(tmp_path), Background(), Events()
    Capabilities(cast(Any, None), cast(Any, store), lambda model: "torch", background, events)
    first, other = version("first"), version("other")

    def publish(model: Model) -> None:
        store.listed = [model]
        events.model_published(model)

    def remove() -> None:
        store.listed = []
        events.model_removed(first)

    if step == "removed while it is read":
        store.may_answer.clear()
        publish(first)
        while not store.times:
            await asyncio.sleep(0)
        remove()
        store.may_answer.set()
    else:
        publish(first)
    await background.close()
    if step == "removed":
        remove()
    elif step == "replaced":
        publish(other)
    await background.close()
    publish(first)
    await background.close()
    assert store.times["first"] == 2, "it is read anew, for nothing was kept of it"
