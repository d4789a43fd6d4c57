# SPDX-License-Identifier: Apache-2.0
"""Merging an adapter into its base gives what PEFT gives; inexact cases are refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import imported
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from sources import converted

from flashd.checkpoint.convert import convert
from flashd.checkpoint.files import WEIGHTS, Checkpoint, verify
from flashd.checkpoint.lora import source as adapter
from flashd.checkpoint.source.reader import SourceFiles
from flashd.errors import CorruptCheckpoint, InvalidSource

# peft and transformers take ten seconds to import: only who runs these tests does.
pytestmark = [
    pytest.mark.usefixtures("imported_torch"),
    pytest.mark.filterwarnings("default"),  # peft and transformers warn of each other
]

TOKENS = torch.arange(1, 13).reshape(1, -1)


def make_base(folder: Path, *, dtype: torch.dtype = torch.float32, tied: bool = False, bias: bool = False) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied, attention_bias=bias,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, *, safe: bool = True, **options: Any) -> Path:
    """A LoRA adapter as PEFT saves it after training, of random numbers that are all but zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 12, **options}))
        torch.manual_seed(1)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name or (name.endswith(".bias") and parameter.requires_grad):
                parameter.data = torch.randn_like(parameter) * 0.2
        tuned.save_pretrained(folder, safe_serialization=safe)
    if not safe and not (folder / "adapter_model.bin").exists():  # PEFT of late always saves safetensors
        weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        torch.save(weights, folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    return folder


def merged(base: Path, adapter_folder: Path, out: Path) -> Checkpoint:
    if not out.with_name("base").exists():
        converted(base, out.with_name("base"))
    out.mkdir()
    with SourceFiles.from_path(adapter_folder) as files:
        convert(files, out, python=imported.interpreter(), base=Checkpoint.open(out.with_name("base")))
    checkpoint = Checkpoint.open(out)
    verify(checkpoint)
    assert {path.name for path in out.iterdir()} == {
        *checkpoint.side_files(), WEIGHTS, "digests.b3", "manifest.toml",
    }  # fmt: skip
    return checkpoint


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    found = safetensors.torch.load_file(checkpoint.weights_path)
    aliases = json.loads(checkpoint.header().metadata.get("flashd.aliases", "{}"))
    return found | {alias: found[name] for alias, name in aliases.items()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def assert_close(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    """Equal but for the order of additions in float32, which may tip the last bit of a rounded number.

    Of an embedding PEFT rounds the product of the factors as well.
    """
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, name
    tolerance = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[found.dtype]
    is_rounded_twice = "embed" in name and found.dtype is not torch.float32
    absolute = 2e-3 if is_rounded_twice else 1e-6
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=absolute, msg=lambda m: f"{name}: {m}")
    if found.dtype is not torch.float32 and not is_rounded_twice:
        assert (found != wanted).float().mean() < 0.02, name


CASES: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "everything linear": {"target_modules": "all-linear", "r": 8},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "k_proj": 3},
        "alpha_pattern": {r"^model\.layers\.1\..*q_proj": 5, "k_proj": 7},
    },
    "modules saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_weights_and_logits_are_what_peft_merges(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "source", dtype=dtype)
    tuned = make_adapter(base, tmp_path / "adapter", **CASES[case])
    found = weights(merged(base, tuned, tmp_path / "out"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), tuned)
    wanted = model.merge_and_unload()
    state = wanted.state_dict()
    assert found.keys() == state.keys()
    changed = 0
    original = safetensors.torch.load_file(base / "model.safetensors")
    for name, tensor in state.items():
        assert_close(found[name], tensor.to(dtype), name)
        changed += not torch.equal(found[name], original[name])
    assert changed >= 2 or case == "head"
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    torch.testing.assert_close(
        logits(ours), logits(wanted.to(dtype)), rtol=0.05, atol=1e-5 if dtype is torch.float32 else 0.2
    )


@pytest.mark.parametrize("options", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}], ids=str)
def test_biases(options: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "source", bias=True)
    tuned = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "o_proj"], **options)
    found = weights(merged(base, tuned, tmp_path / "out"))
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tuned).merge_and_unload()
    for name, tensor in wanted.state_dict().items():
        assert_close(found[name], tensor, name)


def test_pickled_adapters_go_through_the_sandboxed_unpickler(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "source")
    tuned = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], safe=False)
    assert not (tuned / "adapter_model.safetensors").exists()
    found = weights(merged(base, tuned, tmp_path / "out"))
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tuned).merge_and_unload()
    for name, tensor in wanted.state_dict().items():
        assert_close(found[name], tensor, name)


def test_weights_that_lie_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's Conv1D, some of them square, and names without the outermost module."""
    from peft import PeftModel
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "source"
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=32))
    model.save_pretrained(base)
    stripped = {
        name.removeprefix("transformer."): tensor
        for name, tensor in safetensors.torch.load_file(base / "model.safetensors").items()
    }
    safetensors.torch.save_file(stripped, base / "model.safetensors", metadata={"format": "pt"})
    tuned = make_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    found = weights(merged(base, tuned, tmp_path / "out"))
    wanted = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), tuned).merge_and_unload()
    for name, tensor in wanted.transformer.state_dict().items():
        assert_close(found[name], tensor, name)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_tensor_parts_when_only_one_of_its_names_is_tuned(target: str, tmp_path: Path) -> None:
    """As the adapter was trained: PEFT's own merge would change both."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "source", tied=True)
    tuned = make_adapter(base, tmp_path / "adapter", target_modules=[target])
    checkpoint = merged(base, tuned, tmp_path / "out")
    assert json.loads((checkpoint.directory / "config.json").read_text())["tie_word_embeddings"] is False
    unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tuned)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(checkpoint.directory)), logits(unmerged))


def test_a_tied_tensor_that_is_not_tuned_stays_one(tmp_path: Path) -> None:
    base = make_base(tmp_path / "source", tied=True)
    source = safetensors.torch.load_file(base / "model.safetensors")
    source["lm_head.weight"] = source["model.embed_tokens.weight"].clone()
    source = {name: tensor.repeat(1, 1) if tensor.ndim == 2 else tensor for name, tensor in source.items()}
    safetensors.torch.save_file(source, base / "model.safetensors", metadata={"format": "pt"})
    tuned = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    checkpoint = merged(base, tuned, tmp_path / "out")
    assert checkpoint.manifest.architecture_key == Checkpoint.open(tmp_path / "base").manifest.architecture_key


def test_a_grown_vocabulary_is_one_in_the_configuration_too(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "source")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(100)
        tuned = get_peft_model(
            model,
            LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        )
        tuned.peft_config["default"].base_model_name_or_path = str(base)
        tuned.save_pretrained(tmp_path / "adapter")
    checkpoint = merged(base, tmp_path / "adapter", tmp_path / "out")
    assert json.loads((checkpoint.directory / "config.json").read_text())["vocab_size"] == 100
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(checkpoint.directory)), logits(tuned))


def test_the_tokenizer_is_the_adapters_if_it_has_one_and_else_the_bases(tmp_path: Path) -> None:
    base = make_base(tmp_path / "source")
    for name in ("tokenizer.json", "merges.txt", "generation_config.json"):
        (base / name).write_text('{"of": "base"}')
    plain = make_adapter(base, tmp_path / "plain", target_modules=["q_proj"])
    sides = merged(base, plain, tmp_path / "a").side_files()
    assert {"config.json", "tokenizer.json", "merges.txt", "generation_config.json"} == sides.keys()
    own = make_adapter(base, tmp_path / "own", target_modules=["q_proj"])
    (own / "tokenizer.json").write_text('{"of": "adapter"}')
    sides = merged(base, own, tmp_path / "b").side_files()
    assert {"config.json", "tokenizer.json", "generation_config.json"} == sides.keys()
    assert "adapter" in sides["tokenizer.json"].read_text()


REFUSED = {
    "DoRA": {"use_dora": True},
    "'IA3'": {"peft_type": "IA3"},
    "pissa": {"init_lora_weights": "pissa_niter_4"},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "target_parameters": {"target_parameters": ["experts.gate"]},
    "option_of_2030": {"option_of_2030": {"strength": 2}},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "rank 4": {"r": 5},
    "not a plausible number": {"lora_alpha": "much"},
    "not a pattern": {"rank_pattern": {"(q_proj": 4}},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_exact_is_refused_with_a_clear_sentence(why: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "source")
    tuned = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    config = json.loads((tuned / "adapter_config.json").read_text())
    (tuned / "adapter_config.json").write_text(json.dumps(config | REFUSED[why]))
    with pytest.raises(InvalidSource, match=why):
        merged(base, tuned, tmp_path / "out")


def test_an_adapter_of_another_model_does_not_fit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "source")
    tuned = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    found = safetensors.torch.load_file(tuned / "adapter_model.safetensors")
    wider = {name: tensor.repeat(1, 2) if "lora_A" in name else tensor for name, tensor in found.items()}
    safetensors.torch.save_file(wider, tuned / "adapter_model.safetensors")
    with pytest.raises(InvalidSource, match=r"does not fit this base: model\.layers\.0\.self_attn"):
        merged(base, tuned, tmp_path / "out")
    deeper = {name.replace("layers.1", "layers.7"): tensor for name, tensor in found.items()}
    safetensors.torch.save_file(deeper, tuned / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(InvalidSource, match=r"no tensor 'model.layers.7"):
        merged(base, tuned, tmp_path / "out")


def test_a_spoiled_base_is_found_before_its_bytes_get_new_digests(tmp_path: Path) -> None:
    base = make_base(tmp_path / "source")
    tuned = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    stored = converted(base, tmp_path / "base")
    raw = bytearray(stored.weights_path.read_bytes())
    raw[-1] ^= 1
    stored.weights_path.write_bytes(raw)
    with pytest.raises(CorruptCheckpoint):
        merged(base, tuned, tmp_path / "out")


LAYERS = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.floats(0.25, 64, width=32))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.lists(LAYERS, min_size=4, max_size=4),
    rslora=st.booleans(),
    turned=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_arithmetic_is_numpys(
    layers: list[tuple[int, int, int, float]], rslora: bool, turned: bool, seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """W + s·B·A in float64, for any shape, orientation and scale; and what is not tuned stays bit for bit.

    Several layers are merged at once, because each merge imports torch in a process of its own.
    """
    folder = tmp_path_factory.mktemp("numpy")
    random = np.random.default_rng(seed)
    other = random.standard_normal((3, 5), dtype=np.float32)
    tensors, factors, wanted = {"y.weight": other}, {}, {}
    for number, (rows, columns, rank, alpha) in enumerate(layers):
        w = random.standard_normal((columns, rows) if turned else (rows, columns), dtype=np.float32)
        a = random.standard_normal((rank, columns), dtype=np.float32)
        b = random.standard_normal((rows, rank), dtype=np.float32)
        tensors[f"x{number}.weight"] = w
        factors |= {f"base_model.model.x{number}.lora_A.weight": a, f"base_model.model.x{number}.lora_B.weight": b}
        scale = alpha / (np.sqrt(rank) if rslora else rank)
        delta = scale * (b.astype(np.float64) @ a.astype(np.float64))
        wanted[f"x{number}.weight"] = w + (delta.T if turned else delta)
    base, tuned = folder / "source", folder / "adapter"
    base.mkdir()
    tuned.mkdir()
    save_file(tensors, base / "model.safetensors")
    save_file(factors, tuned / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA", "r": layers[0][2], "lora_alpha": layers[0][3],
        "use_rslora": rslora, "fan_in_fan_out": turned,
        "rank_pattern": {f"x{number}": rank for number, (_, _, rank, _) in enumerate(layers) if number},
        "alpha_pattern": {f"x{number}": alpha for number, (*_, alpha) in enumerate(layers) if number},
    }  # fmt: skip
    (tuned / "adapter_config.json").write_text(json.dumps(described))
    found = weights(merged(base, tuned, folder / "out"))
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name].numpy(), tensor, rtol=1e-5, atol=1e-4)
    assert np.array_equal(found["y.weight"].numpy(), other)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_a_strange_configuration_is_one_clear_error(document: Any) -> None:
    for raw in (json.dumps(document), json.dumps({"peft_type": "LORA", "rank_pattern": document})):
        try:
            found = adapter.parse_config(raw.encode())
        except InvalidSource:
            continue
        assert isinstance(found.base, str)


def small(folder: Path, **config: Any) -> tuple[Path, Path]:
    """A base of one matrix and an adapter for it, of rank 2."""
    for part in ("source", "adapter"):
        (folder / part).mkdir(parents=True)
    save_file({"model.layers.0.q_proj.weight": np.ones((3, 5), np.float32)}, folder / "source" / "model.safetensors")
    module = "base_model.model.model.layers.0.q_proj"
    factors = {
        f"{module}.lora_A.weight": np.ones((2, 5), np.float32),
        f"{module}.lora_B.weight": np.ones((3, 2), np.float32),
    }
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(document))
    return folder / "source", folder / "adapter"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("r", value) for value in (10**400, -2, 0, 2.5, float("nan"), True, "2", [2], 1 << 40)),
        *(("lora_alpha", value) for value in (10**400, float("inf"), float("nan"), 1e300, {}, "4")),
        *(("rank_pattern", {"q_proj": value}) for value in (10**400, -1, 0.5, None)),
        *(("alpha_pattern", {"q_proj": value}) for value in (10**400, float("-inf"), [])),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_numbers_that_no_trainer_writes_are_refused_by_name(option: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match=rf"{option}.*adapter_config\.json|adapter_config\.json is not") as refused:
        merged(*small(tmp_path, **{option: value}), tmp_path / "out")
    assert len(refused.value.message) < 300


@pytest.mark.parametrize("base", ["\x1b[2Jada", "ada\u202e", "ada\0", "a" * 1001, 7, ["ada"]], ids=ascii)
def test_a_base_that_cannot_be_a_name_is_refused_by_file_name(base: Any, tmp_path: Path) -> None:
    raw = json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}).encode()
    with pytest.raises(InvalidSource, match=r"the base in adapter_config\.json") as refused:
        adapter.parse_config(raw)
    assert "base_model_name_or_path" in refused.value.hint


@pytest.mark.timeout(120)
def test_a_pattern_that_backtracks_for_ever_is_ended_and_named(tmp_path: Path) -> None:
    pattern = "(([a-z0-9._]+)+)+!"
    with pytest.raises(InvalidSource, match=r"patterns in adapter_config\.json take longer") as refused:
        merged(*small(tmp_path, rank_pattern={pattern: 2}), tmp_path / "out")
    assert "plain names" in refused.value.hint


def test_patterns_as_unsloth_and_peft_write_them_are_followed(tmp_path: Path) -> None:
    long = (
        r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|dense).*?(?:k_proj|q_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)?\.?(?:(?:k_proj|q_proj)))"
    )
    many = {f"layers\\.{number}\\.[kv]_proj": 8 for number in range(3000)}
    for number, ranks in enumerate(({long: 2}, {**many, "q_proj": 2})):
        base, tuned = small(tmp_path / str(number), r=16, rank_pattern=ranks, target_modules=long)
        found = weights(merged(base, tuned, tmp_path / str(number) / "out"))
        assert torch.equal(found["model.layers.0.q_proj.weight"], torch.full((3, 5), 1 + 2 * 4 / 2))


def test_an_adapter_of_a_compiled_model_and_an_empty_one(tmp_path: Path) -> None:
    base, tuned = small(tmp_path)
    found = safetensors.torch.load_file(tuned / "adapter_model.safetensors")
    compiled = {name.replace("model.model.", "model._orig_mod.model."): t for name, t in found.items()}
    safetensors.torch.save_file({f"module.{n}": t for n, t in compiled.items()}, tuned / "adapter_model.safetensors")
    assert torch.equal(
        weights(merged(base, tuned, tmp_path / "out"))["model.layers.0.q_proj.weight"], torch.full((3, 5), 5.0)
    )
    empty = {name: torch.empty(0) for name in found}
    safetensors.torch.save_file(empty, tuned / "adapter_model.safetensors")
    with pytest.raises(InvalidSource, match="ZeRO-3"):
        merged(base, tuned, tmp_path / "empty")
