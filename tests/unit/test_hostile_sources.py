# SPDX-License-Identifier: Apache-2.0
"""Hostile sources: each gets one clear error, and nothing is written outside the draft."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import converted, entry, forge

from flashd import durable
from flashd.checkpoint import header
from flashd.checkpoint.convert import convert
from flashd.checkpoint.source.pickles import TensorFile, parse_table
from flashd.checkpoint.source.reader import SourceFiles, missing_shards, parse_index
from flashd.errors import CorruptCheckpoint, FlashdError, InvalidSource, TransferFailed, Unavailable
from flashd.units import MiB

pytestmark = pytest.mark.usefixtures("imported_torch")

F32 = entry("F32", [2], 0, 8)

BAD_HEADERS: dict[str, tuple[Any, bytes]] = {
    "overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)),
    "hole": ({"a": F32, "b": entry("F32", [2], 12, 20)}, bytes(20)),
    "out of range": ({"a": entry("F32", [2], 8, 16)}, bytes(8)),
    "trailing bytes": ({"a": F32}, bytes(9)),
    "cut short": ({"a": F32}, bytes(7)),
    "wrong size": ({"a": entry("F32", [3], 0, 8)}, bytes(8)),
    "negative offset": ({"a": entry("F32", [2], -8, 0)}, bytes(8)),
    "backwards": ({"a": entry("F32", [2], 8, 0)}, bytes(8)),
    "overflowing shape": ({"a": entry("F32", [1 << 40, 1 << 40], 0, 8)}, bytes(8)),
    "wrapping shape": ({"a": entry("F32", [1 << 62, 4, 1 << 62], 0, 8)}, bytes(8)),
    "negative extent": ({"a": entry("F32", [-2], 0, 8)}, bytes(8)),
    "boolean extent": ({"a": entry("F32", [True, 2], 0, 8)}, bytes(8)),
    "float offset": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8.0]}}, bytes(8)),
    "rank 65": ({"a": entry("F32", [1] * 64 + [2], 0, 8)}, bytes(8)),
    "unknown dtype": ({"a": entry("Q4", [2], 0, 8)}, bytes(8)),
    "half a byte": ({"a": entry("F4", [3], 0, 1)}, bytes(1)),
    "a field more": ({"a": {**F32, "scale": 2}}, bytes(8)),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "control character": ({"a\x1b[31m": F32}, bytes(8)),
    "newline": ({"a\nb": F32}, bytes(8)),
    "lone surrogate": (b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
    "long name": ({"a" * 5000: F32}, bytes(8)),
    "empty name": ({"": F32}, bytes(8)),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "not JSON": (b"{" + b"x" * 20, b""),
    "NaN": (b'{"a": NaN}', b""),
    "huge number": (b'{"a": ' + b"9" * 10_000 + b"}", b""),
    "deep": (b"[" * 200_000, b""),
    "a list": (b"[1, 2]", b""),
    "duplicate name": (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, '
                       b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"x"),
    "huge list": (b'{"a": [' + b"[]," * 2_500_000 + b"1]}", b""),
    "metadata twice": (b'{"__metadata__": {"a": "b"}, "__metadata__": {"a": "c"}}', b""),
    "half a surrogate pair in the metadata": (b'{"__metadata__": {"a": "\\ud800"}}', b""),
    "aliases of nothing": ({"__metadata__": {"flashd.aliases": '{"b": "c"}'}, "a": F32}, bytes(8)),
    "an alias that is a tensor": ({"__metadata__": {"flashd.aliases": '{"a": "a"}'}, "a": F32}, bytes(8)),
    "aliases that are none": ({"__metadata__": {"flashd.aliases": "[1]"}, "a": F32}, bytes(8)),
    "aliases with terminal codes": ({"__metadata__": {"flashd.aliases": '{"b\\u001b": "a"}'}, "a": F32}, bytes(8)),
    "metadata not strings": ({"__metadata__": {"a": 1}, "t": F32}, bytes(8)),
    "nothing": ({}, b""),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_bad_header_is_one_clear_error(name: str, tmp_path: Path) -> None:
    raw, data = BAD_HEADERS[name]
    source = forge(tmp_path / "model.safetensors", raw, data)
    with pytest.raises(InvalidSource) as caught:
        converted(source, tmp_path / "out")
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 600
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("length", [1, 7, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_length_that_lies_reads_nothing_it_should_not(length: int, tmp_path: Path) -> None:
    source = forge(tmp_path / "model.safetensors", {"a": F32}, bytes(8), length=length)
    with pytest.raises(InvalidSource):
        converted(source, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 2)])
def test_a_file_too_short_for_a_header(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidSource):
        converted(tmp_path / "model.safetensors", tmp_path / "out")


def test_slashes_and_spaces_in_tensor_names_are_legal(tmp_path: Path) -> None:
    source = forge(tmp_path / "model.safetensors", {"a/b c/../d": F32}, bytes(range(8)))
    (tensor,) = converted(source, tmp_path / "out").header().tensors
    assert tensor.name == "a/b c/../d"


def _sharded(folder: Path, weight_map: dict[str, str]) -> None:
    forge(folder / "model-00001-of-00002.safetensors", {"a": F32}, bytes(8))
    forge(folder / "model-00002-of-00002.safetensors", {"b": F32}, bytes(8))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../outside.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "sub/model.safetensors"},
        {"a": ".."},
        {"a": ""},
        {"a": "config.json"},
        {"a": 3},
        {"a": TWO, "b": TWO},
        {"a": ONE, "b": TWO, "c": ONE},
        {"a": ONE, "b": "model-00003-of-00003.safetensors"},
        {"a\x00": ONE},
        ["a"],
    ],
    ids=repr,
)
def test_an_index_that_points_elsewhere_or_lies(weight_map: Any, tmp_path: Path) -> None:
    forge(tmp_path / "outside.safetensors", {"a": F32}, bytes(8))
    folder = tmp_path / "source"
    folder.mkdir()
    _sharded(folder, weight_map)
    with pytest.raises(InvalidSource):
        converted(folder, tmp_path / "out")


def test_missing_shards_are_named(tmp_path: Path) -> None:
    _sharded(tmp_path, {"a": ONE, "b": TWO})
    (tmp_path / TWO).unlink()
    assert missing_shards(tmp_path) == [TWO]
    with pytest.raises(InvalidSource, match=TWO):
        converted(tmp_path, tmp_path / "out")


def test_missing_shards_are_known_by_their_numbers_too(tmp_path: Path) -> None:
    """Half a model would convert without an error, and answer nonsense."""
    forge(tmp_path / ONE, {"a": F32}, bytes(8))
    assert missing_shards(tmp_path) == [TWO]
    with pytest.raises(InvalidSource, match=TWO):
        converted(tmp_path, tmp_path / "out")


def test_a_series_of_99999_shards_is_not_waited_for(tmp_path: Path) -> None:
    forge(tmp_path / "model-00001-of-99999.safetensors", {"a": F32}, bytes(8))
    with pytest.raises(InvalidSource, match="more than 500"):
        missing_shards(tmp_path)
    with pytest.raises(InvalidSource, match="more than 500"):
        converted(tmp_path, tmp_path / "out")


def test_an_index_is_not_read_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_text(json.dumps({"weight_map": {"a": ONE}}))
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "model.safetensors.index.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InvalidSource, match="symbolic link"):
        missing_shards(folder)
    with pytest.raises(InvalidSource, match="symbolic link"):
        converted(folder, tmp_path / "out")


def test_more_files_than_a_model_has(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(501):
        (folder / f"{number}.safetensors").touch()
    with pytest.raises(InvalidSource, match="the limit is 500"):
        converted(folder, tmp_path / "out")


def test_a_file_system_that_fails_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may go between the opening of a file and the first look at it."""
    weights = forge(tmp_path / "model.safetensors", {"a": entry("U8", [4], 0, 4)}, b"data")
    checkpoint = converted(weights, tmp_path / "converted")
    before = len(os.listdir("/proc/self/fd"))

    def fstat(_: int) -> os.stat_result:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    looks = [lambda: SourceFiles.from_path(tmp_path), lambda: SourceFiles.from_path(weights)]
    for look in (*looks, lambda: durable.read_bytes(weights), checkpoint.digests):
        with monkeypatch.context() as failing, contextlib.suppress(OSError, CorruptCheckpoint):
            failing.setattr(os, "fstat", fstat)
            look()
            pytest.fail("it did not ask")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    forge(folder / "a\x1b[31m.safetensors", {"a": F32}, bytes(8))
    with pytest.raises(InvalidSource) as caught:
        converted(folder, tmp_path / "out")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("config", [b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}'])
def test_a_config_that_is_none_is_refused_before_the_weights_are_copied(config: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    forge(folder / "model.safetensors", {"a": F32}, bytes(8))
    (folder / "config.json").write_bytes(config)
    with pytest.raises(InvalidSource, match=r"config\.json"):
        converted(folder, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["\x1b[31mX"]}, {"architectures": "X"}, {"architectures": [["X"]]}, {"architectures": [7]},
        {"architectures": ["X", "\u202eY"]}, {"model_type": "\x00"}, {"model_type": {"a": 1}}, {"torch_dtype": "f\n32"},
        {"dtype": "x" * 201}, {"quantization_config": {"quant_method": "\ud800"}},
        {"quantization_config": {"quant_method": ["gptq"]}},
    ],
)  # fmt: skip
def test_a_name_in_a_config_that_cannot_be_one_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    forge(folder / "model.safetensors", {"a": F32}, bytes(8))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidSource, match=r"config\.json.*(architectures|model_type|dtype|quant_method)") as refused:
        converted(folder, tmp_path / "out")
    assert refused.value.message.isprintable() and len(refused.value.message) < 200
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": None, "model_type": None, "torch_dtype": None, "quantization_config": None},
        {"architectures": [], "dtype": {"text_config": "bfloat16"}, "quantization_config": {}},
    ],
)
def test_what_a_config_leaves_open_is_no_fault(config: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    forge(folder / "model.safetensors", {"a": F32}, bytes(8))
    (folder / "config.json").write_text(json.dumps(config))
    assert converted(folder, tmp_path / "out").manifest.architecture == ""


def test_a_side_file_larger_than_sense(tmp_path: Path) -> None:
    forge(tmp_path / "model.safetensors", {"a": F32}, bytes(8))
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(InvalidSource, match=r"tokenizer\.json is 68\.2 MB"):
        converted(tmp_path, tmp_path / "out")


def test_a_source_that_changes_under_our_feet(tmp_path: Path) -> None:
    source = forge(tmp_path / "model.safetensors", {"a": F32}, bytes(8))

    def on_progress(done: int, total: int) -> None:
        with source.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")

    with pytest.raises(InvalidSource, match="changed during the conversion"):
        converted(source, tmp_path / "out", on_progress=on_progress)
    assert not (tmp_path / "out" / "manifest.toml").exists()


def test_a_descriptor_that_cannot_be_read(tmp_path: Path) -> None:
    source = forge(tmp_path / "model.safetensors", {"a": F32}, bytes(8))
    directory = tmp_path / "out"
    directory.mkdir()
    with (
        SourceFiles.from_fds({"model.safetensors": os.open(source, os.O_WRONLY)}) as files,
        pytest.raises(TransferFailed, match=r"model\.safetensors"),
    ):
        convert(files, directory, python=sys.executable)


def test_the_same_tensor_in_two_files(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    forge(folder / "one.safetensors", {"a": F32}, bytes(8))
    forge(folder / "two.safetensors", {"a": F32}, bytes(8))
    with pytest.raises(InvalidSource, match=r"one\.safetensors and in two"):
        converted(folder, tmp_path / "out")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    secret = forge(tmp_path / "secret.safetensors", {"a": F32}, b"secrets!")
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(secret)
    with pytest.raises(InvalidSource, match="symbolic link") as caught:
        converted(folder, tmp_path / "out")
    assert "cp -rL" in caught.value.hint


def test_a_linked_side_file_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    forge(folder / "model.safetensors", {"a": F32}, bytes(8))
    (folder / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(InvalidSource, match="symbolic link"):
        converted(folder, tmp_path / "out")


@pytest.mark.timeout(10)
def test_a_fifo_neither_blocks_nor_converts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InvalidSource, match="not a regular file"):
        converted(tmp_path, tmp_path / "out")


def test_a_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match="not a regular file"):
        SourceFiles.from_path(Path("/dev/zero"))


def test_a_directory_named_like_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(InvalidSource, match="not a regular file"):
        converted(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["../evil.safetensors", "a/b.safetensors", "", ".", "..", "a\x1b"])
def test_names_of_imported_descriptors_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    forge(tmp_path / "x", {"a": F32}, bytes(8))
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    with pytest.raises(InvalidSource):
        SourceFiles.from_fds({name: fd})
    with pytest.raises(OSError):
        os.fstat(fd)  # a refused descriptor is closed


class Caller:
    """What a hostile pickle asks for: a call of something when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_pickle_cannot_name_a_tensor_like_the_metadata(tmp_path: Path) -> None:
    """The header that we write would then say something else than we meant."""
    torch.save({"__metadata__": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(InvalidSource, match="__metadata__"):
        converted(tmp_path / "model.pt", tmp_path / "out")


def test_a_view_of_terabytes_in_a_kilobyte(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "model.pt")
    with pytest.raises(InvalidSource, match="unpack to more than"):
        converted(tmp_path / "model.pt", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_thousand_views_of_the_same_bytes(tmp_path: Path) -> None:
    """Each lies in the file, and all of them together would fill the disk."""
    storage = torch.zeros(4 * MiB, dtype=torch.uint8)
    torch.save({str(n): storage[n:] for n in range(1000)}, tmp_path / "model.pt")
    with pytest.raises(InvalidSource, match="claims to contain 4"):
        converted(tmp_path / "model.pt", tmp_path / "out")


def test_a_legacy_pickle_whose_storages_lie(tmp_path: Path) -> None:
    source = tmp_path / "model.bin"
    torch.save({"a": torch.arange(4, dtype=torch.int64)}, source, _use_new_zipfile_serialization=False)
    raw = source.read_bytes()
    data = struct.pack("<5q", 4, 0, 1, 2, 3)
    assert raw.endswith(data)
    for name, forged in {
        "count": raw[: -len(data)] + struct.pack("<5q", 1 << 40, 0, 1, 2, 3),
        "short": raw[:-8],
        "shorter": raw[: -len(data)],
    }.items():
        source.write_bytes(forged)
        with pytest.raises(InvalidSource):
            converted(source, tmp_path / name)


def test_a_pickle_that_calls_things_calls_nothing(tmp_path: Path) -> None:
    proof = tmp_path / "called"
    folder = tmp_path / "source"
    folder.mkdir()
    torch.save({"a": torch.ones(2), "b": Caller(f"touch {proof}")}, folder / "model.pt")
    (folder / "raw.bin").write_bytes(pickle.dumps(Caller(f"touch {proof}")))
    for name, why in (("model.pt", "it wants posix.system"), ("raw.bin", "it is a pickle of other things")):
        with pytest.raises(InvalidSource, match=f"not a file of tensors that can be read safely: {why}"):
            converted(folder / name, tmp_path / f"out-{name}")  # and not torch's advice of how to have it called
    assert not proof.exists()


STATE = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
BESIDE = {
    "best": np.float64(0.3), "history": np.ones(3), "args": argparse.Namespace(lr=1, other=argparse.Namespace(x=2)),
    "path": Path("x"), "scheduler": [torch.nn.ReLU()],
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
def test_what_trainers_write_beside_the_weights_is_left_alone(legacy: bool, tmp_path: Path) -> None:
    """Lightning's .ckpt among them; nothing of it is called."""
    document = {"state_dict": STATE, "pytorch-lightning_version": "2.5", **({} if legacy else BESIDE)}
    for name in ("last.ckpt", "epoch=1.ckpt"):
        torch.save(document, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    checkpoint = converted(tmp_path, tmp_path / "out")
    assert {tensor.name for tensor in checkpoint.header().tensors} == {"a", "b"}


@pytest.mark.parametrize(
    "document",
    [
        {**STATE, "c": argparse.Namespace(x=1)},
        {"model": torch.nn.ReLU()},
        torch.nn.ReLU(),
        {"model": {"a": np.ones(2)}},
    ],
    ids=["among the weights", "in their place", "instead of all", "in a dictionary"],
)
def test_what_may_be_a_weight_and_is_no_tensor_is_named(document: Any, tmp_path: Path) -> None:
    torch.save(document, tmp_path / "model.pt")
    with pytest.raises(InvalidSource, match=r"it wants (argparse|torch\.nn|numpy).*, and only tensors are made"):
        converted(tmp_path / "model.pt", tmp_path / "out")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_is_cut_short_is_told_so(legacy: bool, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "whole.pt", _use_new_zipfile_serialization=not legacy)
    raw = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InvalidSource, match="cut short, damaged"):
        converted(tmp_path / "model.pt", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04.", b"x" * 1000])
def test_what_is_no_pickle_at_all(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(InvalidSource):
        converted(tmp_path / "model.bin", tmp_path / "out")


ESCAPES = """
import os, resource, socket, subprocess, sys
from flashd.io import sandbox
folder = sys.argv[1]
listener = socket.socket(socket.AF_UNIX)
listener.bind(folder + "/socket")
listener.listen()
inherited = socket.socket(socket.AF_UNIX)
missing = sandbox.restrict(sandbox.Limits(open_files=64, file_bytes=1 << 20, memory_bytes=1 << 30), sockets=False)
status = open("/proc/self/status").read()
assert "CapEff:\\t0000000000000000" in status and "NoNewPrivs:\\t1" in status, status
escapes = {
    "network namespaces": [lambda: socket.create_connection(("127.0.0.1", 1), timeout=1)],
    "Landlock": [
        lambda: open(folder + "/new", "w"),
        lambda: open(folder + "/old", "a"),
        lambda: os.unlink(folder + "/old"),
        lambda: os.execv("/bin/true", ["true"]),
    ],
    "seccomp": [
        lambda: socket.socket(socket.AF_UNIX),
        lambda: inherited.connect(folder + "/socket"),
        lambda: subprocess.run(["true"]),
        lambda: os.execv("/bin/true", ["true"]),
        lambda: os.kill(os.getppid(), 0),
    ],
    "": [lambda: bytearray(2 << 30)],
}
for need, attempts in escapes.items():
    for number, attempt in enumerate(attempts):
        if need in missing:
            continue
        try:
            attempt()
        except ConnectionRefusedError:
            raise SystemExit("the loopback of the machine is within reach")
        except (OSError, MemoryError):
            continue
        raise SystemExit(f"{need}: attempt {number} succeeded")
print("restricted", *missing)
"""


def test_who_gets_past_torch_finds_the_doors_shut(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    done = subprocess.run([sys.executable, "-c", ESCAPES, tmp_path], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("restricted"), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "socket"]


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "model.pt")
    directory = tmp_path / "out"
    directory.mkdir()
    with SourceFiles.from_path(tmp_path / "model.pt") as files, pytest.raises(Unavailable, match="nowhere"):
        convert(files, directory, python="/nowhere/python")


def test_an_interpreter_without_torch_is_told_apart_from_a_bad_file(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(FlashdError, match="no torch") as caught:
        directory = tmp_path / "out"
        directory.mkdir()
        with SourceFiles.from_path(tmp_path / "model.pt") as files:
            bare = tmp_path / "python"
            bare.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1\n")
            bare.chmod(0o755)
            convert(files, directory, python=str(bare))
    assert "engines.torch.python" in caught.value.hint


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=20,
)
TENSORISH = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "F4", "nope", 3]),
        "shape": st.lists(st.integers(-2, 1 << 63), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-8, 64), min_size=1, max_size=3) | JSON,
    },
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=6), TENSORISH | JSON, max_size=4), st.integers(0, 64))
def test_fuzzed_headers_parse_or_are_refused(document: dict[str, Any], data_bytes: int) -> None:
    raw = json.dumps(document).encode()
    try:
        parsed = header.parse(raw, data_bytes=data_bytes, path="fuzz")
    except InvalidSource:
        return
    assert parsed.data_bytes == data_bytes
    assert sum(t.extent.length for t in parsed.tensors) == data_bytes


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 64))
def test_fuzzed_bytes_parse_or_are_refused(raw: bytes, data_bytes: int) -> None:
    with contextlib.suppress(InvalidSource):
        header.parse(raw, data_bytes=data_bytes, path="fuzz")


GOOD = {"__metadata__": {"a": "b"}, "x": F32, "y": entry("U8", [], 8, 9), "z": entry("F16", [0, 3], 9, 9)}
EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from('0123456789[]{},:" xFUI_e')), max_size=4)


@settings(max_examples=1000, deadline=None)
@given(EDITS, st.integers(0, 4))
def test_what_we_accept_the_safetensors_library_accepts(edits: list[tuple[float, str]], deletions: int) -> None:
    """A sound header with a few characters changed or gone; it still has to mean the same to both."""
    text = list(json.dumps(GOOD))
    for number, (where, character) in enumerate(edits):
        place = int(where * len(text))
        text[place : place + 1] = [] if number < deletions else [character]
    raw = "".join(text).encode()
    try:
        parsed = header.parse(raw, data_bytes=9, path="fuzz")
    except InvalidSource:
        return
    theirs = dict(safetensors.deserialize(struct.pack("<Q", len(raw)) + raw + bytes(range(9))))
    for tensor in parsed.tensors:
        found = theirs.pop(tensor.name)
        assert (found["dtype"], tuple(found["shape"])) == (tensor.dtype, tensor.shape)
        assert bytes(found["data"]) == bytes(range(9))[tensor.extent.offset : tensor.extent.end]
    assert not theirs


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {"weight_map": st.dictionaries(st.text(max_size=6), st.text("./\x00m1-of.safetnbi", max_size=20) | JSON)}
    )
    | JSON
)
def test_fuzzed_indexes_never_lead_out_of_the_folder(document: Any) -> None:
    try:
        index = parse_index(json.dumps(document).encode(), "fuzz")
    except InvalidSource:
        return
    for tensor, shard in index.items():
        assert tensor.isprintable()
        assert "/" not in shard and shard.isprintable() and shard.endswith((".safetensors", ".bin", ".pt", ".pth"))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100))
def test_fuzzed_bytes_of_an_index_are_refused_or_parsed(raw: bytes) -> None:
    with contextlib.suppress(InvalidSource):
        parse_index(raw, "fuzz")


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "tensors": st.lists(
                st.fixed_dictionaries(
                    {"name": st.text(max_size=4)},
                    optional={
                        "dtype": st.sampled_from(["F32", "U8", None]) | JSON,
                        "shape": st.lists(st.integers(-1, 9), max_size=2) | JSON,
                        "offset": st.integers(-4, 70) | JSON,
                        "spilled": st.booleans() | JSON,
                        "same_as": st.text(max_size=4) | JSON,
                    },
                ),
                max_size=4,
            )
        }
    )
    | JSON
)
def test_fuzzed_answers_of_the_unpickler_never_reach_outside(answer: Any) -> None:
    try:
        table = parse_table(answer, TensorFile(0, 64), TensorFile(1, 16), "fuzz")
    except InvalidSource:
        return
    for tensor in table.tensors:
        assert 0 <= tensor.extent.offset <= tensor.extent.end <= (16 if tensor.file == 1 else 64)
