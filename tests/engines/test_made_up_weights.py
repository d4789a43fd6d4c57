# SPDX-License-Identifier: Apache-2.0
"""Engines neither make up weights nor ignore any: a checkpoint that contradicts its config.json is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Resident, Start, complete
from safetensors.torch import load_file, save_file
from torch import nn
from vllm_python import VllmPython

from flashd.checkpoint import completeness
from flashd.engines.process import ZygoteFactory
from flashd.engines.vllm_factory import VllmFactory
from flashd.errors import CorruptCheckpoint, EngineFailed
from flashd.workers.vllm import completeness as loaded_weights

pytestmark = pytest.mark.asyncio(loop_scope="session")
Tensors = dict[str, torch.Tensor]


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


def with_more(**more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{name.replace("__", "."): tensor for name, tensor in more.items()}}


@pytest.fixture(autouse=True)
def _stored_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of an older flashd, and of architectures that nobody looks at when they are dropped."""
    monkeypatch.setattr(completeness, "check", lambda *_: None)


def as_it_is(tensors: Tensors) -> Tensors:
    return tensors


def variant(
    source: Path,
    folder: Path,
    change: Callable[[Tensors], Tensors] = as_it_is,
    changed: Mapping[str, Any] | None = None,
) -> Resident:
    """A model like that in `source`, with other tensors or another config.json."""
    shutil.copytree(source, folder)
    described = json.loads((folder / "config.json").read_text()) | dict(changed or {})
    (folder / "config.json").write_text(json.dumps(described))
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return Resident(folder, folder.with_name(folder.name + ".out"))


LAYERS = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
# Found by arithmetic: building that would take minutes, or all memory.
OF_OTHERS = "config.json is of other weights: .*"
DISAGREE = {
    "no head": ("ada", as_it_is, {"tie_word_embeddings": False}, "no weights for lm_head.weight"),
    "no embedding": ("ada", without("embed_tokens"), {}, "no weights for .*embed_tokens.weight"),
    "half a layer": ("ada", without("layers.1.mlp"), {}, "no weights for .*layers.1.mlp.down_proj.weight"),
    "part of what is fused": ("ada", without("layers.1.self_attn.k_proj"), {}, "layers.1.self_attn.k_proj"),
    "a norm": ("ada", without("model.norm"), {}, "model.norm.weight"),
    "a layer fewer": ("ada", as_it_is, LAYERS, "num_hidden_layers 5, .* 4 layers"),
    "an expert": ("moe", without("experts.3."), {}, "experts"),
    "a layer more": ("ada", as_it_is, {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
                     "does not use model.layers.3."),
    "a bias": ("ada", with_more(model__layers__0__self_attn__q_proj__bias=torch.ones(256)), {}, "q_proj.bias"),
    "vocabulary": ("ada", as_it_is, {"vocab_size": 400}, "embed_tokens.weight has .* but should have \\[400, 256\\]"),
    "a million layers": ("ada", as_it_is, {"num_hidden_layers": 10**6}, OF_OTHERS + "1000000"),
    "vast vocabulary": ("ada", as_it_is, {"vocab_size": 10**9}, OF_OTHERS + "1000000000"),
    "vast width": ("ada", as_it_is, {"hidden_size": 10**6}, OF_OTHERS + "1000000"),
    "vast beyond numbers": ("ada", as_it_is, {"intermediate_size": 10**30}, OF_OTHERS + "1000000"),
    "vast layers of experts": ("moe", as_it_is, {"moe_intermediate_size": 4096}, "parameters, but the checkpoint has"),
}  # fmt: skip


@pytest.mark.parametrize("what", DISAGREE)
async def test_what_config_and_checkpoint_disagree_about_is_refused_by_name(
    what: str, factory: ZygoteFactory, made: Path, tmp_path: Path
) -> None:
    base, change, described, said = DISAGREE[what]
    resident = variant(made / base, tmp_path / "model", change, described)
    engine = factory.create()
    with pytest.raises(EngineFailed, match=said) as failed:
        await engine.start(resident.binding())
    assert len(failed.value.message) < 2000 and failed.value.hint
    await engine.stop()


UNUSED = {
    "a head for another task": with_more(score__weight=torch.ones(2, 256)),
    "buffers of older versions": with_more(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(16)),
    "the zeros that tools write": with_more(model__layers__0__self_attn__q_proj__bias=torch.zeros(256)),
}


@pytest.mark.parametrize("what", UNUSED)
async def test_what_changes_no_answer_is_left_out(
    what: str, start: Start, made: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    engine = await start(variant(made / "ada", tmp_path / "model", UNUSED[what]).binding())
    assert await complete(engine, expected["prompt"]) == expected["ada"]


OF_VLLM = ("no embedding", "half a layer", "part of what is fused", "a norm", "a million layers", "vast vocabulary")


@pytest.mark.parametrize("what", OF_VLLM)
async def test_vllm_refuses_what_is_missing_too(
    what: str, vllm_factory: VllmFactory, made: Path, tmp_path: Path
) -> None:
    base, change, described, said = DISAGREE[what]
    resident = variant(made / base, tmp_path / "model", change, described)
    engine = vllm_factory.create()
    said = (
        said.replace("no weights for ", "lacks weights for ").replace("k_proj", "qkv_proj").replace("down_proj", ".*")
    )
    with pytest.raises(EngineFailed, match=said):
        await engine.start(resident.binding())
    await engine.stop()


_RELOADED = """
import torch
from torch import nn
from types import SimpleNamespace
from flashd.workers.vllm import completeness
from flashd.errors import CorruptCheckpoint

class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(2, 6)
        self.norm = nn.LayerNorm(2)
    def load_weights(self, tensors):
        done = set()
        for name, tensor in tensors:
            parameter = self.get_parameter(name.split("/")[0])
            at = int(name.split("/")[1]) if "/" in name else 0
            parameter.data[at : at + len(tensor)] = tensor
            done.add(name.split("/")[0])
        return done

whole = {"qkv.weight/0": torch.ones(2, 2), "qkv.weight/2": torch.ones(2, 2), "qkv.weight/4": torch.ones(2, 2),
         "qkv.bias": torch.ones(6), "norm.weight": torch.ones(2), "norm.bias": torch.ones(2)}
for quantization in (None, "awq"):
    config = SimpleNamespace(quantization=quantization)
    completeness.load(Fused(), config, whole.items())
    for left_out in whole:
        model = Fused()
        try:
            completeness.load(model, config, [(n, t) for n, t in whole.items() if n != left_out])
            print("MADE UP", left_out)
        except CorruptCheckpoint as error:
            assert left_out.split("/")[0] in error.message
        assert "load_weights" not in vars(model)
model = Fused()
try:
    with completeness.watched(model, SimpleNamespace(quantization=None)):
        model.load_weights(list(whole.items())[:4])
    print("MADE UP", "in place")
except CorruptCheckpoint as error:
    print("REFUSED", error.message)
"""


async def test_what_vllm_loads_in_part_or_in_place_is_compared_as_well(vllm: VllmPython) -> None:
    done = vllm.run(_RELOADED)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MADE UP" not in done.stdout
    assert done.stdout.splitlines()[-1] == "REFUSED the checkpoint lacks weights for norm.bias, norm.weight"


class AppliesAdapters(nn.Module):
    """As vLLM's: holds the layer it wraps, shows its attributes, loads it under its own name."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a_stacked = (torch.zeros(1, 1, 8, 2),)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "base_layer" else getattr(self.base_layer, name)


class Adapted(nn.Module):
    """A wrapped layer whose weight is told by the wrapper's name, one that is told by its own, and one not wrapped."""

    def __init__(self, quant_method: object = None) -> None:
        super().__init__()
        self.proj = AppliesAdapters(nn.Linear(2, 2, bias=False))
        self.experts = AppliesAdapters(nn.Linear(2, 2, bias=False))
        self.norm = nn.LayerNorm(2, bias=False)
        for layer in (self.proj.base_layer, self.experts.base_layer, self.norm):
            layer.quant_method = quant_method

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        told = set()
        for name, tensor in tensors:
            is_told = name in dict(self.named_parameters())
            self.get_parameter(name if is_told else name.replace(".", ".base_layer.")).data.copy_(tensor)
            told.add(name)
        return told


@pytest.mark.parametrize(
    ("quantization", "quant_method"), [(None, None), ("awq", type("AWQLinearMethod", (), {})())], ids=["plain", "awq"]
)
async def test_layers_that_vllm_wraps_for_adapters_are_compared_as_well(
    quantization: str | None, quant_method: object
) -> None:
    whole = {name: torch.ones(2, 2) for name in ("proj.weight", "experts.base_layer.weight")}
    whole["norm.weight"] = torch.ones(2)
    settings = SimpleNamespace(quantization=quantization)
    model = Adapted(quant_method)
    with loaded_weights.watched(model, settings):
        model.load_weights(whole.items())
    for left_out in whole if quantization is None else list(whole)[:2]:
        model = Adapted(quant_method)
        layer = left_out.split(".")[0]
        with pytest.raises(CorruptCheckpoint, match=f"weights for {layer}"), loaded_weights.watched(model, settings):
            model.load_weights((name, tensor) for name, tensor in whole.items() if name != left_out)


_PACKED = """
import torch
from torch import nn
from types import SimpleNamespace
from flashd.workers.vllm.extension import Extension
from vllm.lora.layers import BaseLayerWithLoRA

class Wrapper(BaseLayerWithLoRA):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

model = nn.Sequential(Wrapper(nn.Linear(2, 2)), nn.Linear(2, 2), nn.LayerNorm(2))
model[0].base_layer.cpu_linear = model[1].cpu_linear = object()
assert hasattr(model[0], "cpu_linear"), "it shows what the layer it wraps has"
extension = Extension()
extension.device, extension.model_runner = torch.device("cpu"), SimpleNamespace(get_model=lambda: model)
assert list(extension._unpack()) == [model[0].base_layer, model[1]]
assert model[0].base_layer.cpu_linear is None and "cpu_linear" not in vars(model[0])
"""


async def test_a_layer_that_is_wrapped_for_adapters_is_packed_once(vllm: VllmPython) -> None:
    done = vllm.run(_PACKED)
    assert done.returncode == 0, done.stderr[-3000:]
