# SPDX-License-Identifier: Apache-2.0
"""Weights are stored under the model's own names; sources that lack some are refused, naming them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import converted, entry, forge

from flashd.checkpoint.architectures import FOR_GENERATION
from flashd.checkpoint.completeness import check
from flashd.checkpoint.header import check_tensor
from flashd.checkpoint.source.pickles import SourceTensor
from flashd.checkpoint.source.wrappers import plain_names
from flashd.errors import InvalidSource
from flashd.io.streamer import Extent

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 8,
    "vocab_size": 16, "tie_word_embeddings": False,
}  # fmt: skip
Shapes = Mapping[str, list[int]]


def llama(layers: int = 4) -> dict[str, list[int]]:
    parts = ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
    stack = {f"model.layers.{number}.{part}": [8, 8] for number in range(layers) for part in parts}
    return {"model.embed_tokens.weight": [16, 8], **stack, "model.norm.weight": [8], "lm_head.weight": [16, 8]}


def write(path: Path, shapes: Shapes) -> Path:
    header, end = {}, 0
    for name, shape in shapes.items():
        size_bytes = 4 * math.prod(shape)
        header[name] = entry("F32", shape, end, end + size_bytes)
        end += size_bytes
    return forge(path, header, bytes(range(256)) * (end // 256) + bytes(end % 256))


def source(folder: Path, shapes: Shapes, config: Mapping[str, Any] = CONFIG, *, pickled: bool = False) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "pytorch_model.bin")
    else:
        write(folder / "model.safetensors", shapes)
    return folder


def stored(folder: Path, out: Path) -> set[str]:
    return {tensor.name for tensor in converted(folder, out).header().tensors}


WRAPPERS = (
    "", "_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", "_forward_module.", "model.",
    "_forward_module.model.", "model.module._orig_mod.", "_orig_mod.module.base_model.model.",
)  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_safetensors_are_stored_under_the_models_own_names(wrapper: str, tmp_path: Path) -> None:
    wrapped = source(tmp_path / "source", {wrapper + name: shape for name, shape in llama().items()})
    assert stored(wrapped, tmp_path / "out") == set(llama())


@pytest.mark.parametrize("wrapper", ["base_model.model.", "model.", "_forward_module."])
def test_pickles_go_by_the_same_rule(wrapper: str, tmp_path: Path) -> None:
    shapes = {f"{wrapper}{name}": shape for name, shape in llama().items()}
    assert stored(source(tmp_path / "source", shapes, pickled=True), tmp_path / "out") <= set(llama())


def test_parts_of_wrappers_within_a_name_go_too(tmp_path: Path) -> None:
    inner = {
        name.replace(".self_attn.", "._fsdp_wrapped_module._orig_mod.self_attn."): s for name, s in llama().items()
    }
    assert stored(source(tmp_path / "source", inner), tmp_path / "out") == set(llama())


def test_shards_and_their_index_go_by_one_rule(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names = [f"_orig_mod.{name}" for name in llama()]
    shards = {"one.safetensors": names[:9], "two.safetensors": names[9:]}
    for file, held in shards.items():
        write(folder / file, {name: llama()[name.removeprefix("_orig_mod.")] for name in held})
    index = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert stored(folder, tmp_path / "out") == set(llama())


def test_names_that_would_become_one_are_an_error_that_names_both(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", {**llama(), "_orig_mod.lm_head.weight": [16, 8]})
    with pytest.raises(InvalidSource, match=r"'lm_head\.weight' and '_orig_mod\.lm_head\.weight'"):
        converted(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "names",
    [
        ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"],  # tied
        ["model.transformer.wte.weight", "model.transformer.blocks.0.ff_proj.weight"],  # OLMo's first
        ["model.shared.weight", "model.encoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight"],  # BART
        ["model.language_model.layers.0.mlp.up_proj.weight", "model.visual.blocks.0.norm1.weight"],
        ["module.a", "b"],
        ["module."],
    ],
)
def test_names_of_a_models_own_stay(names: list[str]) -> None:
    assert dict(plain_names(names)) == {name: name for name in names}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("model._origdbasyh0", max_size=24), max_size=6, unique=True))
def test_plain_names_are_settled_and_distinct(names: list[str]) -> None:
    try:
        plain = plain_names(names)
    except InvalidSource:
        return
    assert list(plain) == names and len(set(plain.values())) == len(names)
    assert dict(plain_names(list(plain.values()))) == {name: name for name in plain.values()}


def test_what_zero3_did_not_gather_is_refused_with_what_to_run(tmp_path: Path) -> None:
    shapes = {name: [0] if len(shape) == 2 else shape for name, shape in llama().items()}
    with pytest.raises(InvalidSource, match=r"'model\.embed_tokens\.weight'.*ZeRO-3") as refused:
        converted(source(tmp_path / "source", shapes), tmp_path / "out")
    assert "zero_to_fp32.py" in refused.value.hint


def test_an_adapter_beside_its_base_is_not_a_whole_model(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{name}.base_layer.weight": [8, 8], f"{name}.lora_A.default.weight": [2, 8]}
    with pytest.raises(InvalidSource, match="with an adapter beside its weights") as refused:
        converted(source(tmp_path / "source", shapes), tmp_path / "out")
    assert "merge_and_unload" in refused.value.hint


def without(*ends: str) -> dict[str, list[int]]:
    return {name: shape for name, shape in llama().items() if not name.endswith(ends)}


INCOMPLETE: dict[str, tuple[Shapes, Mapping[str, Any], str]] = {
    "no head": (without("lm_head.weight"), {}, "lm_head.weight"),
    "no embedding": (without("embed_tokens.weight"), {}, "model.embed_tokens.weight"),
    "a layer less": (llama(3), {}, "lack 3"),
    "no first layer": ({n: s for n, s in llama().items() if ".0." not in n}, {}, "lack 0"),
    "a hole": (without("layers.2.mlp.up_proj.weight"), {}, "model.layers.2.mlp.up_proj.weight"),
    "a hole in the last": (without("layers.3.self_attn.o_proj.weight"), {}, "model.layers.3.self_attn.o_proj.weight"),
    "other vocabulary": (llama(), {"vocab_size": 17}, "says vocab_size 17, but the embedding has 16"),
    "other width": (llama(), {"hidden_size": 9}, "says hidden_size 9, but the embedding has 8"),
    "a million layers": (llama(), {"num_hidden_layers": 1_000_000}, "num_hidden_layers 1000000, but there are 4"),
    "digits of layers": (llama(), {"num_hidden_layers": 10**3000}, "num_hidden_layers 1000"),
}  # fmt: skip


@pytest.mark.parametrize("case", INCOMPLETE)
def test_weights_that_an_engine_would_have_to_make_up_are_refused_by_name(case: str, tmp_path: Path) -> None:
    shapes, changed, said = INCOMPLETE[case]
    with pytest.raises(InvalidSource) as refused:
        converted(source(tmp_path / "source", shapes, {**CONFIG, **changed}), tmp_path / "out")
    assert said in refused.value.message and len(refused.value.message) < 400 and refused.value.hint
    assert list((tmp_path / "out").iterdir()) == []


SOUND: dict[str, tuple[Shapes, Mapping[str, Any]]] = {
    "whole": (llama(), {}),
    "tied": (without("lm_head.weight"), {"tie_word_embeddings": True}),
    "tied, and a head of its own": (llama(), {"tie_word_embeddings": True}),
    "tied or not, it does not say": (without("lm_head.weight"), {"tie_word_embeddings": None}),
    "buffers of some layers": ({**llama(), "model.layers.0.self_attn.rotary_emb.inv_freq": [4]}, {}),
    "a tensor that only one layer has": ({**llama(), "model.layers.0.self_attn.sinks": [4]}, {}),
    "more layers than are used": (llama(5), {}),
    "a family with mixed layers": (without("layers.2.mlp.up_proj.weight"), {"model_type": "jamba"}),
    "a class of another purpose": (without("lm_head.weight"), {"architectures": ["LlamaForSequenceClassification"]}),
    "names without model.": ({n.removeprefix("model."): s for n, s in without("lm_head.weight").items()}, {}),
    "nothing said": (llama(), {"num_hidden_layers": None, "hidden_size": None, "vocab_size": "16"}),
    "no model_type": (llama(2), {"model_type": None}),
    "a quantised head": ({**without("lm_head.weight"), "lm_head.qweight": [16, 1]}, {"quantization_config": {}}),
    "quantised in part": (
        {**without("layers.2.mlp.up_proj.weight"), "model.layers.2.mlp.up_proj.qweight": [8, 1]},
        {"quantization_config": {"quant_method": "gptq"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SOUND)
def test_no_good_model_is_refused(case: str, tmp_path: Path) -> None:
    shapes, changed = SOUND[case]
    assert stored(source(tmp_path / "source", shapes, {**CONFIG, **changed}), tmp_path / "out") == set(shapes)


def test_a_model_that_embeds_needs_no_head(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", without("lm_head.weight"))
    (folder / "modules.json").write_text("[]")
    assert stored(folder, tmp_path / "out") == set(without("lm_head.weight"))


def tensors_of(module: torch.nn.Module) -> Iterable[SourceTensor]:
    for name, tensor in module.state_dict().items():
        dtype, shape, size_bytes = check_tensor(name, "F32", list(tensor.shape), "x")
        yield SourceTensor(name, dtype, shape, 0, Extent(0, size_bytes))


SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "moe_intermediate_size": 8, "num_experts": 2,
    "num_local_experts": 2,
}  # fmt: skip
UNIFORM = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo", "olmo2", "starcoder2",
    "granite", "cohere", "cohere2", "stablelm", "smollm3", "seed_oss",
)  # fmt: skip


@pytest.mark.parametrize("model_type", UNIFORM)
def test_what_transformers_itself_makes_is_complete(model_type: str) -> None:
    import transformers  # seconds, which only these tests pay

    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("younger than this transformers")
    config = transformers.CONFIG_MAPPING[model_type](**SMALL)
    with torch.device("meta"):
        module = getattr(transformers, FOR_GENERATION[model_type])(config)
    said = {**config.to_dict(), "architectures": [FOR_GENERATION[model_type]]}
    tensors = list(tensors_of(module))
    check(tensors, {}, said, ())
    with pytest.raises(InvalidSource, match="weights are missing"):
        check([t for t in tensors if not t.name.startswith("model.layers.1.mlp")], {}, said, ())


@pytest.mark.parametrize("model_type", sorted(FOR_GENERATION))
def test_classes_by_model_type_are_transformers_own(model_type: str) -> None:
    import transformers

    theirs = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    theirs = theirs or transformers.models.auto.modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(
        model_type
    )
    if theirs is None:
        pytest.skip("younger than this transformers")
    found = FOR_GENERATION[model_type]
    assert found == theirs or model_type in {"bart", "t5", "mt5"}


@pytest.mark.parametrize("said", [["FSDPLlamaForCausalLM"], None, [], ...], ids=repr)
def test_the_class_is_completed_by_what_config_json_means(said: Any, tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "architectures"}
    if said is not ...:
        config["architectures"] = said
    checkpoint = converted(source(tmp_path / "source", llama(), config), tmp_path / "out")
    assert checkpoint.manifest.architecture == "LlamaForCausalLM"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize(
    ("config", "shapes"),
    [({"model_type": "own"}, llama()), ({**CONFIG, "architectures": None}, {**llama(), "score.weight": [2, 8]})],
)
def test_a_class_that_cannot_be_told_is_not_made_up(config: Any, shapes: Shapes, tmp_path: Path) -> None:
    checkpoint = converted(source(tmp_path / "source", shapes, config), tmp_path / "out")
    assert checkpoint.manifest.architecture == ""
