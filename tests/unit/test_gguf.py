# SPDX-License-Identifier: Apache-2.0
"""GGUF files: whole ones are stored as they are, parts are joined, and damaged ones are refused in words."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf_files
import pytest
from gguf_files import FLOAT32, INT32, STRING, UINT32, Gguf, Value
from hypothesis import given
from hypothesis import strategies as st
from sources import converted

from flashd.checkpoint.files import verify
from flashd.checkpoint.gguf import header
from flashd.checkpoint.gguf.traits import SIDE_FILE, Traits
from flashd.checkpoint.source.incremental import LateFiles
from flashd.checkpoint.source.reader import SourceFiles
from flashd.errors import InvalidSource
from flashd.units import MiB

TINY = gguf_files.llama(1)
RAW = TINY.packed()


def weights(directory: Path) -> bytes:
    """The data region, which becomes the arena."""
    raw = (directory / "model.safetensors").read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def test_a_file_is_stored_as_it_is(tmp_path: Path) -> None:
    source = TINY.write(tmp_path / "tiny.gguf")
    stored = converted(source, tmp_path / "out")
    assert weights(tmp_path / "out") == source.read_bytes()
    verify(stored)
    manifest = stored.manifest
    assert (manifest.architecture, manifest.dtype, manifest.tensor_count) == ("llama", "F32", len(TINY.tensors))
    traits = Traits.from_json((stored.directory / SIDE_FILE).read_bytes())
    assert traits.context_length == 512 and traits.has_template and not traits.embeds
    assert traits.types == {"F32": len(TINY.tensors)}


@pytest.mark.parametrize("count", [2, 3, 21])
def test_parts_are_joined_to_the_file_that_they_were(count: int, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    TINY.write_parts(folder, "tiny", count)
    converted(folder, tmp_path / "out")
    assert weights(tmp_path / "out") == RAW


def test_a_part_of_metadata_only_is_joined_too(tmp_path: Path) -> None:
    first = Gguf({**TINY.entries, "split.no": Value(INT32, 0), "split.count": Value(INT32, 2)})
    second = Gguf({"split.no": Value(INT32, 1), "split.count": Value(INT32, 2)}, TINY.tensors)
    first.write(tmp_path / "source" / "t-00001-of-00002.gguf")
    second.write(tmp_path / "source" / "t-00002-of-00002.gguf")
    converted(tmp_path / "source", tmp_path / "out")
    assert weights(tmp_path / "out") == RAW


def test_tensors_of_odd_sizes_are_padded_where_parts_meet(tmp_path: Path) -> None:
    odd = replace(TINY, tensors={f"t{n}": (header.Kind.UINT8, (n,), bytes([n]) * n) for n in (3, 31, 33)})
    odd.tensors = {name: (24, shape, raw) for name, (_, shape, raw) in odd.tensors.items()}
    odd.write_parts(tmp_path / "source", "odd", 3)
    converted(tmp_path / "source", tmp_path / "out")
    assert weights(tmp_path / "out") == odd.packed()


def test_another_alignment_is_kept(tmp_path: Path) -> None:
    wide = Gguf({**TINY.entries, "general.alignment": Value(UINT32, 256)}, TINY.tensors, 256)
    first, second = wide.parts(2)
    first.write(tmp_path / "source" / "wide-00001-of-00002.gguf")
    replace(second, alignment=32).write(tmp_path / "source" / "wide-00002-of-00002.gguf")  # which knows of no other
    converted(tmp_path / "source", tmp_path / "out")
    assert weights(tmp_path / "out") == wide.packed()


def test_what_arrives_late_is_waited_for(tmp_path: Path) -> None:
    source = TINY.write(tmp_path / "tiny.gguf")
    stand_in = tmp_path / "stand-in"
    stand_in.write_bytes(bytes(len(RAW)))
    files = LateFiles.expecting({"tiny.gguf": os.open(stand_in, os.O_RDONLY)}, ["tiny.gguf"])
    with source.open("rb") as file:
        files.arrived("tiny.gguf", file.fileno())
    with files:
        from flashd.checkpoint.convert import convert

        (tmp_path / "out").mkdir()
        convert(files, tmp_path / "out", python="")
    assert weights(tmp_path / "out") == RAW


def test_a_folder_of_safetensors_and_gguf_is_read_as_safetensors(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name in ("model.safetensors", "tiny.gguf"):
        (tmp_path / "source" / name).write_bytes(b"")
    with SourceFiles.from_path(tmp_path / "source") as files:
        assert list(files) == ["model.safetensors"]


def test_a_file_that_sees_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    TINY.write(folder / "tiny.gguf")
    (folder / "mmproj-tiny-f16.gguf").write_bytes(b"GGUF")
    converted(folder, tmp_path / "out")
    assert weights(tmp_path / "out") == RAW


def test_no_adapter_is_merged_into_one(tmp_path: Path) -> None:
    base = converted(TINY.write(tmp_path / "tiny.gguf"), tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter" / name).write_bytes(b"{}")
    with pytest.raises(InvalidSource, match="its base is a GGUF file") as refused:
        converted(tmp_path / "adapter", tmp_path / "out", base=base)
    assert "flash pull" in refused.value.hint


def changed(**entries: Value) -> Callable[[], bytes]:
    others = {key.replace("__", "."): value for key, value in entries.items()}
    return replace(TINY, entries={**TINY.entries, **others}).packed


def with_tensor(name: str, kind: int, shape: tuple[int, ...], data: bytes) -> Callable[[], bytes]:
    return lambda: replace(TINY, tensors={**TINY.tensors, name: (kind, shape, data)}).packed()


def patched(offset: int, form: str, value: int) -> Callable[[], bytes]:
    return lambda: RAW[:offset] + struct.pack(form, value) + RAW[offset + struct.calcsize(form) :]


def moved(difference: int) -> Callable[[], bytes]:
    """The second tensor is in another place than behind the first."""

    def packed() -> bytes:
        second = list(TINY.tensors)[1].encode()
        at = RAW.index(second) + len(second) + 4 + 8 + 4
        (offset,) = struct.unpack_from("<Q", RAW, at)
        return RAW[:at] + struct.pack("<Q", offset + difference) + RAW[at + 8 :]

    return packed


DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "short": (lambda: RAW[:20], "too short"),
    "cut in its values": (lambda: RAW[:900], "cut short in its header"),
    "cut in its tensors": (lambda: RAW[:-40_000], "is cut short: its tensors end at"),
    "longer": (lambda: RAW + bytes(33), "33 bytes behind its last tensor"),
    "another magic": (patched(0, "<I", 1), "is not a GGUF file"),
    "version 1": (patched(4, "<I", 1), "has version 1"),
    "version 4": (patched(4, "<I", 4), "has version 4"),
    "big-endian": (patched(4, ">I", 3), "is big-endian"),
    "millions of tensors": (patched(8, "<Q", 1 << 40), "claims 1099511627776 tensors"),
    "one tensor more": (patched(8, "<Q", len(TINY.tensors) + 1), "GGUF|gguf"),
    "billions of values": (patched(16, "<Q", 1 << 60), "values"),
    "a key of terabytes": (patched(24, "<Q", 1 << 40), "claims a key of"),
    "an unknown type of value": (patched(24 + 8 + len("general.architecture"), "<I", 99), "unknown type 99"),
    "an unknown type of tensor": (with_tensor("x", 5, (32,), b""), "unknown type 5"),
    "a broken row": (with_tensor("x", gguf_files.Q8_0, (33,), bytes(68)), "impossible shape"),
    "a huge tensor": (with_tensor("x", 0, (1 << 40, 1 << 40), b""), "impossible shape"),
    "a tensor outside": (with_tensor("x", 0, (1 << 30,), b""), "is cut short"),
    "many dimensions": (with_tensor("x", 0, (1, 1, 1, 1, 1), bytes(4)), "claims 5 dimensions"),
    "a long name": (with_tensor("x" * 64, 0, (1,), bytes(4)), "of 64 bytes"),
    "an unprintable name": (with_tensor("x\n", 0, (1,), bytes(4)), "unusable name"),
    "overlapping": (moved(-32), "overlaps the one before"),
    "with a hole": (moved(32), "leaves a hole"),
    "an odd alignment": (changed(general__alignment=Value(UINT32, 48)), "alignment 48"),
    "an alignment in words": (changed(general__alignment=Value(STRING, "32")), "alignment '32'"),
    "an adapter": (changed(general__type=Value(STRING, "adapter")), "is a LoRA adapter in GGUF"),
    "an eye": (changed(general__architecture=Value(STRING, "clip")), "the part of a model that sees"),
    "no architecture": (changed(general__architecture=Value(FLOAT32, 1.0)), "does not name the architecture"),
    "an unprintable architecture": (changed(general__architecture=Value(STRING, "a\x1b[2J")), "does not name"),
    "a vocabulary": (lambda: Gguf(TINY.entries).packed(), "has no tensors"),
    "a part": (TINY.parts(3)[1].packed, "is part 2 of 3, in the place of part 1 of 1"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_in_words(case: str, tmp_path: Path) -> None:
    make, said = DAMAGED[case]
    source = tmp_path / "damaged.gguf"
    source.write_bytes(make())
    with pytest.raises(InvalidSource, match=said) as refused:
        converted(source, tmp_path / "out")
    assert "damaged.gguf" in refused.value.message


def test_the_same_value_twice_is_refused(tmp_path: Path) -> None:
    entry = gguf_files._text("general.name") + Value(STRING, "x").packed()
    raw = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + entry * 2
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(InvalidSource, match=r"'general\.name' twice"):
        converted(tmp_path / "m.gguf", tmp_path / "out")


def test_a_header_has_a_limit(tmp_path: Path) -> None:
    entry = gguf_files._text("tokens") + struct.pack("<IIQ", 9, 0, 65 * MiB)
    source = tmp_path / "m.gguf"
    source.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    os.truncate(source, 100 * MiB)
    with pytest.raises(InvalidSource, match="claims a header of more than"):
        converted(source, tmp_path / "out")


PARTS = {
    "missing": (lambda files: files[1].unlink(), "missing, the first is tiny-00002-of-00003.gguf"),
    "of others": (
        lambda files: gguf_files.llama(1).parts(2)[1].write(files[1]), "is part 2 of 2, in the place of part 2 of 3"
    ),
    "exchanged": (lambda files: files[1].write_bytes(files[2].read_bytes()), "is part 3 of 3, in the place of part 2"),
    "a second model": (lambda files: TINY.write(files[0].with_name("x.gguf")), "there are several GGUF models"),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_parts_that_are_not_one_model_are_refused(case: str, tmp_path: Path) -> None:
    spoil, said = PARTS[case]
    spoil(TINY.write_parts(tmp_path / "source", "tiny", 3))
    with pytest.raises(InvalidSource, match=said):
        converted(tmp_path / "source", tmp_path / "out")


def test_whoever_names_one_part_is_told_to_name_the_folder(tmp_path: Path) -> None:
    first, *_ = TINY.write_parts(tmp_path / "source", "tiny", 3)
    with pytest.raises(InvalidSource, match="missing, the first is tiny-00002-of-00003") as refused:
        converted(first, tmp_path / "out")
    assert "name the folder" in refused.value.hint


def parsed(raw: bytes) -> header.GgufHeader:
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, raw)
        return header.read(fd, "fuzz")
    finally:
        os.close(fd)


def assert_is_sound(found: header.GgufHeader, size_bytes: int) -> None:
    end = 0
    for tensor in found.tensors:
        assert tensor.offset >= end and tensor.offset % found.alignment == 0
        end = tensor.offset + tensor.size_bytes
        assert found.data_offset + end <= size_bytes


@given(st.integers(0, 2**32))
def test_headers_with_wrong_bytes_are_refused_or_sound(seed: int) -> None:
    chosen, raw = random.Random(seed), bytearray(RAW[:12_000])
    for _ in range(chosen.randint(1, 4)):
        at = chosen.randrange(8_000)
        length = chosen.choice((1, 4, 8))
        raw[at : at + length] = chosen.choice((b"\0", b"\xff", chosen.randbytes(1))) * length
    whole = bytes(raw) + RAW[12_000:]
    try:
        found = parsed(whole)
    except InvalidSource:
        return
    assert_is_sound(found, len(whole))


@given(st.binary(max_size=400))
def test_any_bytes_are_refused_or_sound(raw: bytes) -> None:
    for head in (b"", b"GGUF\3\0\0\0", b"GGUF" + struct.pack("<IQQ", 3, 1, 1)):
        try:
            found = parsed(head + raw)
        except InvalidSource:
            continue
        assert_is_sound(found, len(head + raw))
