# SPDX-License-Identifier: Apache-2.0
"""Embeddings are pooled as the modules.json of sentence-transformers declares, or refused; never silently otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Resident, Start, http

from flashd.checkpoint.source import reader
from flashd.engines.process import ZygoteFactory
from flashd.errors import Unsupported
from flashd.workers import pooling

pytestmark = pytest.mark.asyncio(loop_scope="session")
ST = "sentence_transformers.models."


@pytest.fixture(scope="module")
def states(expected: dict[str, Any]) -> torch.Tensor:
    """The last hidden states of the prompt, as transformers has them."""
    return torch.tensor(expected["bert states"])


def declared(folder: Path, made: Path, modules: Sequence[str], settings: dict[str, Any] | None) -> Path:
    """A folder as sentence-transformers saves it."""
    shutil.copytree(made / "bert", folder)
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(modules[1:], 1))]
    described = [
        {"idx": number, "name": str(number), "path": path, "type": ST + kind}
        for number, (kind, path) in enumerate(zip(modules, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(described))
    if settings is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **settings}))
    return folder


def weighted(states: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(1, len(states) + 1).unsqueeze(1)
    return (states * weights).sum(0) / weights.sum()


MODES: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "cls": ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda states: states[0]),
    "max": ({"pooling_mode_max_tokens": True}, lambda states: states.max(0).values),
    "mean": ({"pooling_mode_mean_tokens": True}, lambda states: states.mean(0)),
    "root": ({"pooling_mode_mean_sqrt_len_tokens": True}, lambda states: states.sum(0) / len(states) ** 0.5),
    "weighted": ({"pooling_mode_weightedmean_tokens": True}, weighted),
    "last": ({"pooling_mode_lasttoken": True}, lambda states: states[-1]),
    "newer": ({"pooling_mode": "cls"}, lambda states: states[0]),
    "both": (
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        lambda states: torch.cat([states[0], states.mean(0)]),
    ),
}


@pytest.mark.parametrize("mode", MODES)
async def test_vectors_are_those_that_the_folder_declares(
    mode: str, start: Start, made: Path, tmp_path: Path, states: torch.Tensor, expected: dict[str, Any]
) -> None:
    settings, formula = MODES[mode]
    modules = ["Transformer", "Pooling", *(["Normalize"] if mode != "cls" else [])]
    engine = await start(Resident(declared(tmp_path / "model", made, modules, settings), tmp_path / "out").binding())
    async with http(engine) as client:
        answer = (await client.post("/v1/embeddings", json={"input": expected["prompt"]})).json()
    wanted = formula(states)
    if mode != "cls":
        wanted = torch.nn.functional.normalize(wanted, dim=0)
    assert answer["data"][0]["embedding"] == pytest.approx(wanted.tolist(), abs=1e-5)


REFUSED: dict[str, tuple[list[str], dict[str, Any] | None, str]] = {
    "dense": (["Transformer", "Pooling", "Dense", "Normalize"], {"pooling_mode_cls_token": True}, "'Dense'"),
    "unknown pooling": (["Transformer", "Pooling"], {"pooling_mode": "attention"}, "'attention'"),
    "newer pooling": (
        ["Transformer", "Pooling"],
        {"pooling_mode_cls_token": True, "pooling_mode_new": True},
        "mode_new",
    ),
    "no pooling": (["Transformer", "Pooling"], {}, "declares no pooling"),
    "lost pooling": (["Transformer", "Pooling"], None, r"1_Pooling/config\.json is missing"),
    "twice": (["Transformer", "Pooling", "Pooling"], {"pooling_mode_cls_token": True}, "combines modules"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_cannot_be_done_as_declared_is_refused(
    what: str, factory: ZygoteFactory, made: Path, tmp_path: Path
) -> None:
    modules, settings, said = REFUSED[what]
    resident = Resident(declared(tmp_path / "model", made, modules, settings), tmp_path / "out")
    engine = factory.create()
    with pytest.raises(Unsupported, match=said):
        await engine.start(resident.binding())
    await engine.stop()


async def test_lengths_cases_and_prompts_are_declared_too(start: Start, made: Path, tmp_path: Path) -> None:
    folder = declared(tmp_path / "model", made, ["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True})
    plain = await start(Resident(folder, tmp_path / "plain").binding())
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12, "do_lower_case": true}')
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    engine = await start(Resident(folder, tmp_path / "out").binding())

    async def embedded(of: Any, text: str) -> Any:
        async with http(of) as client:
            return await client.post("/v1/embeddings", json={"input": text})

    one, other = await embedded(engine, "Who?"), await embedded(plain, "query: who?")
    assert one.json()["data"] == other.json()["data"]
    refused = await embedded(engine, "who " * 40)
    assert refused.status_code == 400 and "at most 12" in refused.json()["error"]["message"]


async def test_where_the_config_of_a_pooling_is_kept(made: Path, tmp_path: Path) -> None:
    folder = declared(tmp_path / "model", made, ["Transformer", "Pooling"], {"pooling_mode_cls_token": True})
    (folder / "2_Pooling").symlink_to(folder / "1_Pooling")
    (folder / "3_Pooling").mkdir()
    resident = Resident(folder, tmp_path / "out")
    kept = {name for name in resident.checkpoint.side_files() if "Pooling" in name}
    assert kept == {"1_Pooling.json"}
    assert reader.pooling_path("1_Pooling.json") == "1_Pooling/config.json"
    assert reader.pooling_path("config.json") == "config.json" and not reader.pooling_name("../1_Pooling/config.json")


async def test_modules_that_are_no_modules_are_refused() -> None:
    for raw in (b"{", b"3", b'["x"]', b'[{"type": "a.Transformer"}]', b"[]"):
        with pytest.raises(Unsupported):
            pooling.declared({"modules.json": raw}.get)
    assert pooling.declared({}.get) is None


@pytest.mark.parametrize("settings", [{"prompts": ["query: "]}, {"prompts": {"a": "b"}, "default_prompt_name": ["a"]}])
async def test_settings_of_another_form_are_no_defect(settings: dict[str, Any]) -> None:
    files = {
        "modules.json": [{"type": ST + "Transformer"}, {"type": ST + "Pooling", "path": "1_Pooling"}],
        "1_Pooling.json": {"pooling_mode_cls_token": True},
        "config_sentence_transformers.json": settings,
    }
    found = pooling.declared(lambda name: json.dumps(files[name]).encode() if name in files else None)
    assert found is not None and (found.modes, found.prompt) == (("cls",), "")
