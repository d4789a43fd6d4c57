# SPDX-License-Identifier: Apache-2.0
"""Anything that is not a model is refused in one line that says what it is and what to do."""

from __future__ import annotations

import codecs
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import converted, entry, forge

from flashd.checkpoint.architectures import completed
from flashd.checkpoint.completeness import check
from flashd.checkpoint.json_reader import read_json
from flashd.checkpoint.lora.plan import base_of
from flashd.checkpoint.source.pickles import SourceTensor
from flashd.checkpoint.source.reader import SourceFiles, is_foreign
from flashd.checkpoint.source.recognised import check_quantization
from flashd.errors import InvalidSource
from flashd.io.streamer import Extent

TENSOR = {"a": entry("F32", [2], 0, 8)}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 123456789\n"
PAGE = b"\n <!DOCTYPE html>\n<html><head><title>Log in</title></head></html>"


def model(folder: Path, **files: bytes) -> Path:
    """A sound source of one tensor; `files` are put beside it or in place of its own."""
    folder.mkdir()
    forge(folder / "model.safetensors", TENSOR, bytes(8))
    for name, content in {"config.json": b"{}", **files}.items():
        (folder / name).write_bytes(content)
    return folder


def refusal(source: Path, out: Path) -> InvalidSource:
    with pytest.raises(InvalidSource) as refused:
        converted(source, out)
    assert list(out.iterdir()) == []
    assert "\n" not in refused.value.message and len(str(refused.value)) < 600
    assert refused.value.hint
    return refused.value


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "pytorch_model.bin",
        "tokenizer.json",
        "config.json",
        "tokenizer.model",
        "merges.txt",
        "model.safetensors.index.json",
    ],
)
def test_a_git_lfs_pointer_says_what_to_run(name: str, tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    if name in {"pytorch_model.bin", "model.safetensors.index.json"}:
        (source / "model.safetensors").unlink()
    (source / name).write_bytes(POINTER)
    refused = refusal(source, tmp_path / "out")
    assert name in refused.message and "git-lfs pointer" in refused.message and "git lfs pull" in refused.hint


def test_a_pointer_in_place_of_an_adapters_configuration(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(POINTER)
    forge(tmp_path / "adapter_model.safetensors", TENSOR, bytes(8))
    with SourceFiles.from_path(tmp_path) as files, pytest.raises(InvalidSource, match="git-lfs pointer"):
        base_of(files)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [(PAGE, "web page"), (b"", "is empty"), (b"Entry not found", "Entry not found"), (bytes(4096), "zeros")],
    ids=["page", "empty", "text", "zeros"],
)
def test_what_a_failed_download_leaves(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    refused = refusal(model(tmp_path / "source", **{name: content}), tmp_path / "out")
    assert name in refused.message
    assert said in refused.message or name == "tokenizer.json"


WRONG_ENDINGS: dict[str, tuple[str, bytes, str]] = {
    "GGUF": ("model.safetensors", b"GGUF" + bytes(1000), "GGUF"),
    "HDF5": ("pytorch_model.bin", b"\x89HDF\r\n\x1a\n" + bytes(1000), "Keras"),
    "gzip": ("model.pt", b"\x1f\x8b\x08" + bytes(1000), "archive"),
    "a pickle": ("model.safetensors", pickle.dumps({"a": [1] * 600}, protocol=2), "file of PyTorch's"),
}


@pytest.mark.parametrize("case", WRONG_ENDINGS)
def test_a_file_of_another_kind_than_its_name_says(case: str, tmp_path: Path) -> None:
    name, content, said = WRONG_ENDINGS[case]
    (tmp_path / name).write_bytes(content)
    assert said in refusal(tmp_path / name, tmp_path / "out").message


def test_safetensors_under_a_pickles_name_are_told(tmp_path: Path) -> None:
    source = forge(tmp_path / "pytorch_model.bin", TENSOR, bytes(8))
    refused = refusal(source, tmp_path / "out")
    assert "is a safetensors file" in refused.message and ".safetensors" in refused.hint


FOREIGN = {
    "model.ggml": "former format", "model.onnx": "ONNX", "tf_model.h5": "TensorFlow", "model.ckpt.index": "TensorFlow",
    "saved_model.pb": "TensorFlow", "flax_model.msgpack": "Flax", "weights.npz": "MLX", "model.tflite": "Lite",
    "model.mlmodel": "Core ML", "openvino_model.bin": "OpenVINO", "model.nemo": "NeMo", "model.zip": "archive",
    "model.tar.gz": "archive", "optimizer.pt": "state of a training", "MODEL.GGUF": "lower case",
    "adapter_model.safetensors": "adapter_config.json", "Model.SafeTensors": "lower case",
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_for_another_program_is_no_secret(name: str, tmp_path: Path) -> None:
    """In a folder with its side files, and alone."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / name).write_bytes(b"x" * 1000)
    for number, source in enumerate((folder / name, folder)):
        assert is_foreign(source)
        assert FOREIGN[name] in refusal(source, tmp_path / f"out{number}").message


def test_a_pipeline_of_diffusers_is_no_language_model_whatever_lies_in_it(tmp_path: Path) -> None:
    source = model(tmp_path / "source", **{"model_index.json": b"{}"})
    assert "diffusers" in refusal(source, tmp_path / "out").message


def test_a_folder_of_the_hubs_cache_says_what_to_pull(tmp_path: Path) -> None:
    folder = tmp_path / "models--Qwen--Qwen3-8B"
    for name in ("blobs", "refs", "snapshots"):
        (folder / name).mkdir(parents=True)
    assert is_foreign(folder)
    assert "flash pull Qwen/Qwen3-8B" in refusal(folder, tmp_path / "out").hint


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64}}, "MLX"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "exl2", "bits": 4.0}}, "ExLlama"),
    ],
)
def test_a_quantised_layout_that_no_engine_reads(config: Any, said: str, tmp_path: Path) -> None:
    source = model(tmp_path / "source", **{"config.json": json.dumps(config).encode()})
    refused = refusal(source, tmp_path / "out")
    assert said in refused.message and "flash pull" in refused.hint


def test_the_hint_names_the_model_as_it_was_before_bitsandbytes(tmp_path: Path) -> None:
    config = {"_name_or_path": "unsloth/Qwen3-8B-unsloth-bnb-4bit", "quantization_config": {"load_in_4bit": True}}
    source = model(tmp_path / "source", **{"config.json": json.dumps(config).encode()})
    assert refusal(source, tmp_path / "out").hint.endswith("flash pull unsloth/Qwen3-8B")


def test_what_engines_read_quantised_stays_welcome(tmp_path: Path) -> None:
    for number, config in enumerate(
        ({"quantization_config": {"quant_method": "awq", "group_size": 64, "bits": 4}}, {})
    ):
        source = model(tmp_path / f"source{number}", **{"config.json": json.dumps(config).encode()})
        converted(source, tmp_path / f"out{number}")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_of_any_editor_is_read_and_stored_as_engines_read_it(encoding: str, tmp_path: Path) -> None:
    config = {"architectures": ["X"], "model_type": "x", "name": "größer"}
    side = {
        "config.json": json.dumps(config, ensure_ascii=False).encode(encoding),
        "generation_config.json": '{"eos_token_id": 2}'.encode(encoding),
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": "one.safetensors"}}).encode(encoding),
    }
    source = model(tmp_path / "source", **side)
    (source / "model.safetensors").rename(source / "one.safetensors")
    checkpoint = converted(source, tmp_path / "out")
    assert checkpoint.manifest.architecture == "X"
    assert json.loads((tmp_path / "out" / "config.json").read_bytes().decode("utf-8")) == config
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == b'{"eos_token_id": 2}'


STRANGE_JSON = {
    "twice": b'{"a": 1, "a": 2}', "NaN": b'{"a": NaN}', "deep": b"[" * 100_000 + b"]" * 100_000,
    "deeper than can be written": b'{"a": ' + b"[" * 850 + b"]" * 850 + b"}",
    "digits": b'{"a": 1' + b"0" * 4400 + b"}", "many": b"[" + b"1," * 2_000_001 + b"1]",
    "cut": b'{"a": ', "bytes": b'{"a": "\xff"}', "half UTF-16": codecs.BOM_UTF16_LE + b'{\x00"',
    "large and cut": b'{"a": "' + b"x" * (5 << 20),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGE_JSON)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_strange_json_is_refused_by_the_name_of_its_file(name: str, case: str, tmp_path: Path) -> None:
    source = model(tmp_path / "source", **{name: STRANGE_JSON[case]})
    (source / "model.safetensors").rename(source / "one.safetensors")
    with pytest.raises(InvalidSource) as refused:
        converted(source, tmp_path / "out")
    assert name in refused.value.message and len(refused.value.message) < 400
    assert "set_int_max_str_digits" not in refused.value.message
    assert list((tmp_path / "out").iterdir()) == []


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=30).map(lambda text: text.encode("utf-16", "surrogatepass")))
def test_any_bytes_are_json_or_refused(raw: bytes) -> None:
    try:
        read_json(raw, "fuzz")
    except InvalidSource as refused:
        assert refused.message.startswith("fuzz ")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=600), st.sampled_from(["model.safetensors", "tokenizer.json", "config.json"]))
def test_any_bytes_in_any_file_are_taken_or_refused(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, name: str
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    source = model(folder / "source", **{name: raw})
    try:
        converted(source, folder / "out")
    except InvalidSource as refused:
        assert refused.message


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = (
    "num_hidden_layers", "vocab_size", "hidden_size", "tie_word_embeddings", "mlp_only_layers", "quantization_config",
    "quantization", "_name_or_path", "decoder_sparse_step",
)  # fmt: skip
SAID = st.fixed_dictionaries(
    {
        "model_type": st.sampled_from(["llama", "qwen3_moe", 3, None]),
        "architectures": st.just(["LlamaForCausalLM"]) | ANYTHING,
    },
    optional=dict.fromkeys(KEYS, ANYTHING),
)
TENSORS = st.dictionaries(
    st.sampled_from(["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.a", "model.layers.10.a", "x"]),
    st.lists(st.integers(0, 9), max_size=3),
    min_size=1,
)


@settings(max_examples=300, deadline=None)
@given(SAID, TENSORS)
def test_whatever_a_config_says_is_taken_or_refused(config: Any, shapes: dict[str, list[int]]) -> None:
    tensors = [SourceTensor(name, "F32", tuple(shape), 0, Extent(0, 0)) for name, shape in shapes.items()]
    try:
        check_quantization(config)
        check(tensors, {}, completed(config, list(shapes), ()), ())
    except InvalidSource as refused:
        assert refused.message.isprintable() and len(refused.message) < 400 and refused.hint.isprintable()


def test_an_archive_beside_the_model_is_left_alone(tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    with zipfile.ZipFile(source / "backup.zip", "w") as archive:
        archive.writestr("x", "y")
    with tarfile.open(source / "old.tar", "w"):
        pass
    converted(source, tmp_path / "out")
    with SourceFiles.from_path(source) as files:
        assert sorted(files) == ["config.json", "model.safetensors"]
