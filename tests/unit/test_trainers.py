# SPDX-License-Identifier: Apache-2.0
"""Folders of trainers are understood or refused with a remedy, and the bases that they name are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from sources import converted

from flashd.checkpoint.files import WEIGHTS, Checkpoint
from flashd.errors import BaseMissing, InvalidSource
from flashd.store.lineage import find_base
from flashd.store.records import Model, Origin

pytestmark = pytest.mark.usefixtures("imported_torch")


def names(checkpoint: Checkpoint) -> set[str]:
    return set(safetensors.torch.load_file(checkpoint.weights_path))


def test_torchtunes_files_of_the_last_epoch_are_the_model(tmp_path: Path) -> None:
    source = tmp_path / "epochs"
    source.mkdir()
    for epoch in (0, 1, 10):
        for shard in (1, 2):
            torch.save({f"layer.{shard}": torch.full((3,), float(epoch))}, source / f"hf_model_{shard:04d}_{epoch}.pt")
    torch.save({"adapter": torch.ones(2)}, source / "adapter_10.pt")
    torch.save({"epochs_run": 3}, source / "recipe_state.pt")
    (source / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    checkpoint = converted(source, tmp_path / "out")
    found = safetensors.torch.load_file(checkpoint.weights_path)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"layer.1": [10.0] * 3, "layer.2": [10.0] * 3}
    assert checkpoint.manifest.architecture == "X"


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_a_plain_state_dict_with_a_config_beside_it(wrapper: str, tmp_path: Path) -> None:
    source = tmp_path / "plain"
    source.mkdir()
    shared = torch.randn(4)
    tensors = {f"{wrapper}a.weight": shared, f"{wrapper}b.weight": shared, f"{wrapper}c": torch.ones(2)}
    torch.save(tensors, source / "model.pt")
    (source / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    checkpoint = converted(source, tmp_path / "out")
    assert names(checkpoint) == {"a.weight", "c"}
    assert json.loads(checkpoint.header().metadata["flashd.aliases"]) == {"b.weight": "a.weight"}


def test_names_that_only_some_tensors_wrap_stay(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "model.pt")
    assert names(converted(tmp_path / "model.pt", tmp_path / "out")) == {"module.a", "b"}


def test_metas_names_are_refused_with_a_hint_and_others_are_not(tmp_path: Path) -> None:
    source = tmp_path / "llama"
    source.mkdir()
    metas = {"tok_embeddings.weight": torch.ones(2, 2), "layers.0.attention.wq.weight": torch.ones(2, 2)}
    torch.save(metas, source / "consolidated.00.pth")
    with pytest.raises(InvalidSource, match="Meta's names") as refused:
        converted(source, tmp_path / "out")
    assert "convert_llama_weights_to_hf" in refused.value.hint
    torch.save({"model.embed_tokens.weight": torch.ones(2, 2)}, source / "consolidated.00.pth")
    assert names(converted(source, tmp_path / "other")) == {"model.embed_tokens.weight"}


def test_whole_weights_beside_a_trainings_shards_count(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint-7"
    source.mkdir()
    safetensors.torch.save_file({"a": torch.ones(2)}, source / "model.safetensors")
    (source / "zero_to_fp32.py").write_text("raise SystemExit")
    (source / "optimizer.pt").write_bytes(b"not ours")
    assert names(converted(source, tmp_path / "out")) == {"a"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["digests.b3", "manifest.toml", WEIGHTS]


def model(name: str, *, aliases: tuple[str, ...] = (), location: str = "") -> Model:
    return Model(name, "0" * 64, Origin("inbox", location), 0.0, 1, 1, "BF16", "X", "key", aliases)


MODELS = {
    found.name: found
    for found in (
        model("Qwen/Qwen3-8B"),
        model("pulled", location="Mistral/Small-24B@0123abc"),
        model("llama", aliases=("meta-llama/Llama-3.1-8B",)),
        model("dropped", location="/home/ada/models/own"),
        model("one/twin"),
        model("two/twin"),
        model("poet"),
        model("quantised"),
        model("quantised-bnb-4bit"),
    )
}


@pytest.mark.parametrize(
    ("recorded", "found"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("qwen/qwen3-8b", "Qwen/Qwen3-8B"),
        ("unsloth/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("Qwen3-8B", "Qwen/Qwen3-8B"),
        ("/data/weights/Qwen3-8B/", "Qwen/Qwen3-8B"),
        ("../Qwen3-8B", "Qwen/Qwen3-8B"),
        ("/root/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/9c925d64", "Qwen/Qwen3-8B"),
        ("Mistral/Small-24B", "pulled"),
        ("meta-llama/Llama-3.1-8B", "llama"),
        ("/home/ada/models/own", "dropped"),
        ("/runs/out/llama/checkpoint-500", "llama"),
        ("two/twin", "two/twin"),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "Qwen/Qwen3-8B"),
        ("qwen/qwen3-8b-bnb-4bit", "Qwen/Qwen3-8B"),
        ("/data/Qwen3-8B-BNB-8bit/", "Qwen/Qwen3-8B"),
        ("Mistral/Small-24B-bnb-4bit", "pulled"),
        ("quantised-bnb-4bit", "quantised-bnb-4bit"),  # a model in the store takes precedence over its own base
        ("https://huggingface.co/Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("D:\\models\\Qwen\\Qwen3-8B", "Qwen/Qwen3-8B"),
        ("C:\\Users\\ada\\Qwen3-8B\\", "Qwen/Qwen3-8B"),
        ("C:\\hub\\models--Qwen--Qwen3-8B\\snapshots\\9c925d64", "Qwen/Qwen3-8B"),
        ("./Qwen3-8B/", "Qwen/Qwen3-8B"),
    ],
)
def test_a_base_is_found_by_what_its_trainer_was_started_with(recorded: str, found: str) -> None:
    assert find_base(MODELS, recorded, of="tune").name == found


@pytest.mark.parametrize(
    ("recorded", "hint"),
    [
        ("Qwen/Qwen3-9B", "flash pull Qwen/Qwen3-9B"),
        ("/hub/models--Owner--Name/snapshots/1", "flash pull Owner/Name"),
        ("/data/weights/gemma", "flash alias NAME gemma"),
        ("poet", "flash alias NAME poet"),  # nothing is its own base
        ("unsloth/gemma-3-4b-it-unsloth-bnb-4bit", "flash pull unsloth/gemma-3-4b-it; "),
        ("https://huggingface.co/google/gemma", "flash pull google/gemma; "),
        ("E:\\weights\\gemma", "flash alias NAME gemma"),
        ("/data/" + "模型" * 100, "write its name into adapter_config.json"),  # too long for a name
    ],
)
def test_a_base_that_is_not_here_says_what_to_do(recorded: str, hint: str) -> None:
    with pytest.raises(BaseMissing) as missing:
        find_base(MODELS, recorded, of="poet")
    assert hint in missing.value.hint


def test_an_ambiguous_base_and_one_that_is_not_named_are_errors() -> None:
    with pytest.raises(InvalidSource, match="ambiguous"):
        find_base(MODELS, "/weights/twin", of="tune")
    with pytest.raises(InvalidSource, match="does not name its base"):
        find_base(MODELS, "", of="tune")
