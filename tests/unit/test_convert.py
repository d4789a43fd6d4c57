# SPDX-License-Identifier: Apache-2.0
"""A checkpoint holds exactly the bytes of its source, in a file that other tools open."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import converted, entry, forge

from flashd.checkpoint import header, layout
from flashd.checkpoint.dtypes import DTYPES
from flashd.checkpoint.files import DIGESTS, MANIFEST, WEIGHTS, Checkpoint, verify
from flashd.checkpoint.manifest import Manifest, context_length_of
from flashd.checkpoint.source.reader import SourceFiles, missing_shards
from flashd.errors import Cancelled, CorruptCheckpoint, InvalidSource
from flashd.io.streamer import ALIGNMENT
from flashd.units import MiB

pytestmark = pytest.mark.usefixtures("imported_torch")


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in C order, whatever its dtype and strides."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(directory: Path, expected: dict[str, torch.Tensor], aliases: dict[str, str] | None = None) -> None:
    """The safetensors library itself reads back every tensor, bit for bit."""
    found = safetensors.torch.load_file(directory / WEIGHTS)
    stored = set(expected) - set(aliases or {})
    assert set(found) == stored
    for name in stored:
        assert found[name].dtype == expected[name].dtype and found[name].shape == expected[name].shape
        assert bits(found[name]) == bits(expected[name]), name
    recorded = json.loads(Checkpoint.open(directory).header().metadata.get("flashd.aliases", "{}"))
    assert recorded == (aliases or {})


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_of_the_format_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    size_bytes = 24 * DTYPES[dtype].bits // 8
    data = np.random.default_rng(7).integers(0, 2 if dtype == "BOOL" else 256, size_bytes, dtype=np.uint8).tobytes()
    source = forge(tmp_path / "model.safetensors", {"t": entry(dtype, [2, 3, 4], 0, size_bytes)}, data)
    checkpoint = converted(source, tmp_path / "out")
    ((name, found),) = safetensors.deserialize(checkpoint.weights_path.read_bytes())
    assert (name, found["dtype"], found["shape"], bytes(found["data"])) == ("t", dtype, [2, 3, 4], data)


def test_data_begins_on_a_block_and_large_tensors_on_256_bytes(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.randn(n) for n in (1, 3, 64, 65, 128, 1000)} | {"b": torch.ones(5, dtype=torch.bool)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = converted(tmp_path / "model.safetensors", tmp_path / "out")
    assert_same(checkpoint.directory, tensors)
    found = checkpoint.header()
    assert found.data_offset % ALIGNMENT == 0
    element = {"F32": 4, "BOOL": 1}
    for tensor in found.tensors:
        whole = tensor.extent.length % 256 == 0
        assert tensor.extent.offset % (256 if whole else element[tensor.dtype]) == 0


def test_the_layout_does_not_depend_on_the_sharding(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": torch.randn(8, 40 + i) for i in range(6)}
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    safetensors.torch.save_file(tensors, one / "model.safetensors")
    names = sorted(tensors, reverse=True)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        safetensors.torch.save_file({name: tensors[name] for name in part}, many / shard)
        weight_map |= dict.fromkeys(part, shard)
    (many / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    first, second = converted(one, tmp_path / "a"), converted(many, tmp_path / "b")
    assert_same(second.directory, tensors)
    assert first.id == second.id
    assert (first.directory / WEIGHTS).read_bytes() == (second.directory / WEIGHTS).read_bytes()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
def test_pytorch_files_bit_for_bit(suffix: str, legacy: bool, tmp_path: Path) -> None:
    base = torch.randn(100, 100)
    tensors = {
        "whole": base,
        "tied": base,
        "rows": base[10:20],
        "columns": base[:, 3:7],
        "transposed": base.t(),
        "expanded": torch.arange(4.0).expand(3, 4),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "three by three": torch.arange(9, dtype=torch.int8).reshape(3, 3),
        "half": torch.randn(7).bfloat16(),
        "eighth": torch.randn(16).to(torch.float8_e4m3fn),
        "complex": torch.randn(3, dtype=torch.complex64),
        "conjugated": torch.randn(3, dtype=torch.complex64).conj(),
        "unsigned": torch.tensor([1, 2, 65535], dtype=torch.uint16),
        "flags": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.randn(4)),
    }
    if legacy:  # torch itself cannot read these back from its old format
        del tensors["eighth"], tensors["unsigned"]
    file = tmp_path / f"pytorch_model.{suffix}"
    torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
    expected = {name: tensor.resolve_conj() for name, tensor in tensors.items()}
    assert_same(converted(file, tmp_path / "out").directory, expected, {"tied": "whole"})


def test_four_bit_floats_of_pytorch_files(tmp_path: Path) -> None:
    packed = torch.arange(8, dtype=torch.uint8).reshape(4, 2).view(torch.float4_e2m1fn_x2)
    torch.save({"a": packed}, tmp_path / "model.pt")
    found = safetensors.torch.load_file(converted(tmp_path / "model.pt", tmp_path / "out").weights_path)["a"]
    assert (found.dtype, found.shape) == (packed.dtype, packed.shape)
    assert found.view(torch.uint8).tolist() == packed.view(torch.uint8).tolist()


def test_a_sharded_pytorch_model_with_strided_tensors_larger_than_a_part(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    big = torch.randint(0, 255, (3, 5000, 5000), dtype=torch.uint8)
    shards = {
        "pytorch_model-00001-of-00002.bin": {"a": big.transpose(0, 2), "b": torch.randn(5)},
        "pytorch_model-00002-of-00002.bin": {"c": torch.randn(6, 6).t(), "d": big[:, ::2]},
    }
    for shard, tensors in shards.items():
        torch.save(tensors, source / shard)
    index = {"weight_map": {name: shard for shard, tensors in shards.items() for name in tensors}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    expected = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    assert_same(converted(source, tmp_path / "out").directory, expected)


def test_tensors_beside_the_state_dict_are_not_taken_for_the_model(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3)}
    torch.save({"best_loss": torch.tensor(0.3), "state_dict": tensors, "hyper": {}}, tmp_path / "checkpoint.pt")
    assert_same(converted(tmp_path / "checkpoint.pt", tmp_path / "out").directory, tensors)


@pytest.mark.parametrize("wrap", [lambda d: {"state_dict": d, "epoch": 3}, lambda d: {"model": {"module": d}}])
def test_a_nested_state_dict_is_found(wrap: object, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3)}
    torch.save(wrap(tensors), tmp_path / "checkpoint.pt")  # type: ignore[operator]
    assert_same(converted(tmp_path / "checkpoint.pt", tmp_path / "out").directory, tensors)


def test_a_pickle_without_tensors_says_so(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(InvalidSource, match="no dictionary of tensors"):
        converted(tmp_path / "checkpoint.pt", tmp_path / "out")


def test_what_trainers_leave_beside_the_weights_is_left_alone(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint-1000"
    source.mkdir()
    tensors = {"a": torch.randn(3)}
    safetensors.torch.save_file(tensors, source / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "modeling_evil.py"):
        (source / name).write_bytes(b"not ours")
    (source / "config.json").write_text('{"architectures": ["X"]}')
    checkpoint = converted(source, tmp_path / "out")
    assert_same(checkpoint.directory, tensors)
    assert {p.name for p in checkpoint.directory.iterdir()} == {WEIGHTS, DIGESTS, MANIFEST, "config.json"}


def test_a_tensor_saved_twice_is_stored_once(tmp_path: Path) -> None:
    embedding = torch.randn(300, 300)
    ones = torch.ones(300, 300)
    ones[0, 0] = 2
    tensors = {
        "lm_head.weight": embedding.clone(),
        "model.embed_tokens.weight": embedding,
        "almost": embedding + ones,
        "zero.1": torch.zeros(300, 300),
        "zero.2": torch.zeros(300, 300),
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = converted(tmp_path / "model.safetensors", tmp_path / "out")
    assert_same(checkpoint.directory, tensors, {"lm_head.weight": "model.embed_tokens.weight"})
    assert checkpoint.manifest.data_bytes == 4 * 300 * 300 * 4


def test_a_checkpoint_is_a_source_of_itself(tmp_path: Path) -> None:
    """Copied to another machine and dropped there, it becomes the same checkpoint, further names and all."""
    embedding = torch.randn(300, 300)
    source = tmp_path / "source"
    source.mkdir()
    tensors = {"model.embed": embedding, "lm_head": embedding.clone(), "odd": torch.ones(3)}
    safetensors.torch.save_file(tensors, source / "model.safetensors", metadata={"format": "pt", "made by": "hand"})
    (source / "config.json").write_text("{}")
    first = converted(source, tmp_path / "a")
    assert first.header().metadata["made by"] == "hand"
    second = converted(first.directory, tmp_path / "b")
    assert_same(second.directory, tensors, {"lm_head": "model.embed"})
    assert second.id == first.id


def test_the_files_that_transformers_would_load_are_the_ones_that_convert(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(3)}, tmp_path / "model.fp16.safetensors")
    torch.save({"a": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    stale = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(stale))
    with SourceFiles.from_path(tmp_path) as files:
        assert set(files) == {"model.safetensors", "model.safetensors.index.json"}
    assert missing_shards(tmp_path) == []
    assert_same(converted(tmp_path, tmp_path / "out").directory, tensors)


def test_infinity_in_a_config(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["Mamba2"], "time_step_limit": [0.0, Infinity]}')
    assert converted(tmp_path, tmp_path / "out").manifest.architecture == "Mamba2"


def test_tensors_without_elements_alone(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(0, 4), "b": torch.zeros(3, 0)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = converted(tmp_path / "model.safetensors", tmp_path / "out")
    assert_same(checkpoint.directory, tensors)
    verify(checkpoint)


def test_weights_without_a_config_convert(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "adapter.safetensors")
    manifest = converted(tmp_path / "adapter.safetensors", tmp_path / "out").manifest
    assert (manifest.architecture, manifest.architecture_key) == ("", "")


def test_an_adapter_is_not_mistaken_for_a_model(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidSource, match="LoRA adapter"):
        converted(tmp_path, tmp_path / "out")


def test_fine_tunes_share_an_architecture_key_and_others_do_not(tmp_path: Path) -> None:
    def make(name: str, rows: int, config: dict[str, object]) -> Manifest:
        folder = tmp_path / name
        folder.mkdir()
        safetensors.torch.save_file({"a": torch.randn(rows, 4)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"architectures": ["X"], **config}))
        return converted(folder, tmp_path / f"{name}-out").manifest

    base = make("base", 3, {"hidden": 4})
    tuned = make("tuned", 3, {"hidden": 4, "_name_or_path": "elsewhere", "transformers_version": "9"})
    assert tuned.architecture_key == base.architecture_key and tuned.id != base.id
    assert make("wider", 5, {"hidden": 4}).architecture_key != base.architecture_key
    assert make("other", 3, {"hidden": 8}).architecture_key != base.architecture_key


@pytest.mark.parametrize("victim", [WEIGHTS, DIGESTS, "config.json"])
def test_one_changed_byte_is_found_and_named(victim: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    safetensors.torch.save_file({"a": torch.randn(3 * MiB)}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    checkpoint = converted(source, tmp_path / "out")
    verify(checkpoint)
    path = checkpoint.directory / victim
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpoint, match=victim):
        verify(checkpoint)


def test_a_truncated_checkpoint_is_corrupt_or_says_where_it_ends(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.randn(100_000)}, tmp_path / "model.safetensors")
    checkpoint = converted(tmp_path / "model.safetensors", tmp_path / "out")
    with checkpoint.weights_path.open("r+b") as file:
        file.truncate(checkpoint.manifest.data_offset + 10)
    with pytest.raises(CorruptCheckpoint, match="is cut short"):
        verify(checkpoint)


@pytest.mark.parametrize("line", ['id = "0"', 'data_bytes = "many"', 'side_files = { "../x" = "0" }', "format = 2"])
def test_a_changed_manifest_is_found(line: str, tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    directory = converted(tmp_path / "model.safetensors", tmp_path / "out").directory
    key = line.split(" ", 1)[0]
    rest = [kept for kept in (directory / MANIFEST).read_text().split("\n") if key not in kept]
    (directory / MANIFEST).write_text("\n".join([line, *rest]))
    with pytest.raises(CorruptCheckpoint):
        verify(Checkpoint.open(directory))


@pytest.mark.parametrize("victim", [WEIGHTS, DIGESTS, MANIFEST])
def test_a_missing_file_is_found(victim: str, tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    directory = converted(tmp_path / "model.safetensors", tmp_path / "out").directory
    (directory / victim).unlink()
    with pytest.raises(CorruptCheckpoint, match="out"):
        verify(Checkpoint.open(directory))


def test_the_manifest_survives_its_file(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    manifest = converted(tmp_path / "model.safetensors", tmp_path / "out").manifest
    assert Manifest.from_toml(manifest.to_toml(), "x") == manifest


def test_cancelling_takes_less_than_a_tenth_of_a_second(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        size_bytes = 1024 * MiB
        forge(Path(file.name), {"a": entry("U8", [size_bytes], 0, size_bytes)})
        file.truncate(Path(file.name).stat().st_size + size_bytes)
    stop = threading.Event()
    asked_at: list[float] = []

    def on_progress(done: int, total: int) -> None:
        if done > 0 and not stop.is_set():
            stop.set()
            asked_at.append(time.monotonic())

    with pytest.raises(Cancelled):
        converted(tmp_path / "model.safetensors", tmp_path / "out", on_progress=on_progress, cancelled=stop.is_set)
    assert time.monotonic() - asked_at[0] < 0.5  # 0.1 s is the promise; machines in CI are shared


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    """A child converts 1 GiB and may not have more than a quarter of that resident."""
    size_bytes = 1024 * MiB
    source = forge(tmp_path / "model.safetensors", {"a": entry("U8", [size_bytes], 0, size_bytes)})
    with source.open("r+b") as file:
        file.truncate(source.stat().st_size + size_bytes)
    code = (
        "import sys, pathlib\n"
        "from flashd.checkpoint.convert import convert\n"
        "from flashd.checkpoint.source.reader import SourceFiles\n"
        "out = pathlib.Path(sys.argv[2]); out.mkdir()\n"
        "with SourceFiles.from_path(pathlib.Path(sys.argv[1])) as files:\n"
        "    convert(files, out, python=sys.executable)\n"
        # not getrusage: its peak counts the parent's from before the exec
        "(line,) = [l for l in open('/proc/self/status') if l.startswith('VmHWM')]\n"
        "print(int(line.split()[1]) * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, source, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < size_bytes // 4


def test_unpickling_needs_memory_for_none_of_the_tensors(tmp_path: Path) -> None:
    """Not even where the format cannot be mapped: what the child needs for 512 MiB is what it needs for nothing."""
    code = (
        "from flashd.checkpoint.source import unpickle_worker\n"
        "unpickle_worker.main()\n"
        "import sys\n"
        "(line,) = [l for l in open('/proc/self/status') if l.startswith('VmHWM')]\n"
        "print(int(line.split()[1]) * 1024, file=sys.stderr)\n"
    )

    def peak_bytes(tensors: dict[str, torch.Tensor], legacy: bool) -> int:
        torch.save(tensors, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
        with (tmp_path / "model.pt").open("rb") as source, (tmp_path / "spill").open("w+b") as spill:
            fds = (source.fileno(), spill.fileno())
            command = [sys.executable, "-c", code, str(fds[1]), '{"file_bytes": 1073741824}', str(fds[0])]
            done = subprocess.run(command, pass_fds=fds, capture_output=True, text=True, check=True)
            assert not (tmp_path / "spill").stat().st_size
        assert [found["name"] for found in json.loads(done.stdout)["tensors"]] == list(tensors)
        return int(done.stderr)

    large = {"a": torch.zeros(256 * MiB, dtype=torch.uint8), "b": torch.zeros(256 * MiB, dtype=torch.uint8)}
    base_bytes = peak_bytes({"a": torch.zeros(3)}, legacy=True)
    assert peak_bytes(large, legacy=True) < base_bytes + 64 * MiB
    assert peak_bytes(large, legacy=False) < base_bytes + 64 * MiB


@pytest.mark.parametrize("kind", ["side file", "spill"])
def test_a_disk_that_fills_up_behind_the_weights(kind: str, tmp_path: Path) -> None:
    """Stands in for a full disk: the kernel's limit on the size of files."""
    source = tmp_path / "source"
    source.mkdir()
    if kind == "spill":
        torch.save({"a": torch.zeros(1 << 20, dtype=torch.uint8)[::2]}, source / "model.pt")
    else:
        safetensors.torch.save_file({"a": torch.ones(2)}, source / "model.safetensors")
        (source / "vocab.txt").write_bytes(b"x" * (1 << 20))
    code = (
        "import os, resource, signal, sys\n"
        "from pathlib import Path\n"
        "from flashd.checkpoint.convert import convert\n"
        "from flashd.checkpoint.source.reader import SourceFiles\n"
        "from flashd.errors import FlashdError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))\n"
        "try:\n"
        "    with SourceFiles.from_path(Path(sys.argv[1])) as files:\n"
        "        convert(files, Path(sys.argv[2]), python=sys.executable)\n"
        "except FlashdError as error:\n"
        "    print(type(error).__name__, error.hint)\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run([sys.executable, "-c", code, source, out], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("StoreFull free some space"), done.stdout
    assert not (out / MANIFEST).exists()


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=6),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 40), max_size=3)),
        max_size=12,
    )
)
def test_layouts_have_no_holes_and_keep_elements_aligned(shapes: dict[str, tuple[str, list[int]]]) -> None:
    from flashd.checkpoint.dtypes import size_of

    tensors = [
        layout.Shape(name, dtype, tuple(shape), size)
        for name, (dtype, shape) in shapes.items()
        if (size := size_of(dtype, shape)) is not None
    ]
    placed = layout.arrange(tensors)
    assert layout.arrange(reversed(tensors)) == placed
    end = 0
    for tensor in placed:
        assert tensor.extent.offset == end
        assert tensor.extent.offset % max(1, DTYPES[tensor.dtype].bits // 8) == 0
        end = tensor.extent.end
    raw = header.serialise(header.Header(placed))
    assert len(raw) % ALIGNMENT == 0
    parsed = header.parse(raw[8:], data_bytes=end, path="own")
    assert {t.name: t.extent for t in parsed.tensors} == {t.name: t.extent for t in placed}


def test_descriptors_are_not_leaked(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(4, 4).t(), "b": torch.ones(2)}, tmp_path / "model.pt")
    before = len(list(Path("/proc/self/fd").iterdir()))
    converted(tmp_path / "model.pt", tmp_path / "out")
    with pytest.raises(InvalidSource):
        (tmp_path / "bad.pt").write_bytes(b"nonsense")
        converted(tmp_path / "bad.pt", tmp_path / "out2")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_transformers_opens_the_folder_itself(tmp_path: Path) -> None:
    code = (
        "import sys, transformers, pathlib\n"
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "config = Qwen3Config(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,"
        " num_key_value_heads=1, vocab_size=64)\n"
        "Qwen3ForCausalLM(config).save_pretrained(sys.argv[1])\n"
        "sys.path += sys.argv[3:]\n"
        "from sources import converted\n"
        "out = pathlib.Path(sys.argv[2])\n"
        "converted(pathlib.Path(sys.argv[1]), out)\n"
        "a = Qwen3ForCausalLM.from_pretrained(sys.argv[1]).state_dict()\n"
        "b = Qwen3ForCausalLM.from_pretrained(out).state_dict()\n"
        "assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)\n"
    )
    modules = Path(__file__).parents[:2]
    command = [sys.executable, "-c", code, tmp_path / "source", tmp_path / "out", *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_source_files_close_what_they_opened(tmp_path: Path) -> None:
    forge(tmp_path / "model.safetensors", {"a": entry("U8", [1], 0, 1)}, b"x")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with SourceFiles.from_path(tmp_path) as files:
        assert "model.safetensors" in files
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 512}, "max_position_embeddings": 77}, 512),
        ({"text_config": {"hidden_size": 8}, "max_position_embeddings": 77}, 77),
        *(({"max_position_embeddings": wrong}, 0) for wrong in (0, -1, True, "4096", 1.5, 10**400, None, [])),
        ({"text_config": "x", "n_ctx": 2048}, 2048),
        ({}, 0),
    ],
)
def test_the_context_length_is_that_of_the_part_that_reads_text(config: dict[str, object], length: int) -> None:
    assert context_length_of(config) == length
