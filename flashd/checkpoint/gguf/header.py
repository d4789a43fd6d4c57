# SPDX-License-Identifier: Apache-2.0
"""Parses and checks headers of GGUF files.

A header is untrusted input, and the engine that reads it next is written in C++: so its length, counts, names and types
are bounded here, and every tensor must be inside the file, in order, without overlaps, holes or trailing bytes. The
format is specified at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; sizes of types are those of ggml.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from flashd.checkpoint.header import MAX_HEADER_BYTES, MAX_TENSOR_BYTES, check_name
from flashd.errors import InvalidSource, TransferFailed

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # which differ only in that the latter may be big-endian
ALIGNMENT_KEY = "general.alignment"
_ALIGNMENT, _MAX_ALIGNMENT = 32, 1 << 16
_MAX_ENTRIES = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_KEY_BYTES = 1024
_MAX_NAME_BYTES = 63  # of a tensor, as in ggml
_MAX_RANK = 4
_MAX_TEXT_BYTES = 1 << 20  # of a value that is kept, such as a chat template
_CHUNK_BYTES = 1 << 20
_AGAIN = "copy or download it again"

_HEAD = struct.Struct("<4sIQQ")
_LENGTH = struct.Struct("<Q")
_NUMBER = struct.Struct("<I")


class Kind(IntEnum):
    """Types of values."""

    UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)


_SCALARS: Mapping[int, struct.Struct] = {
    Kind.UINT8: struct.Struct("<B"), Kind.INT8: struct.Struct("<b"), Kind.UINT16: struct.Struct("<H"),
    Kind.INT16: struct.Struct("<h"), Kind.UINT32: struct.Struct("<I"), Kind.INT32: struct.Struct("<i"),
    Kind.FLOAT32: struct.Struct("<f"), Kind.BOOL: struct.Struct("<B"), Kind.UINT64: struct.Struct("<Q"),
    Kind.INT64: struct.Struct("<q"), Kind.FLOAT64: struct.Struct("<d"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorType:
    """A type of tensors: `size_bytes` for each block of so many elements of a row."""

    name: str
    block: int
    size_bytes: int


TYPES: Mapping[int, TensorType] = {
    number: TensorType(*described)
    for number, described in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
        24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
        29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
    }.items()
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """A value of the metadata: a number, flag or text, or None for an array. `raw` is the key, type and value."""

    value: int | float | bool | str | None
    raw: bytes


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor. Its offset counts from the start of the data; `shape` begins with the length of a row."""

    name: str
    type_number: int
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    @property
    def type_name(self) -> str:
        return TYPES[self.type_number].name


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata and tensors of a file. `data_bytes` are those of the tensors, each padded to the alignment."""

    version: int
    entries: Mapping[str, Entry]
    tensors: tuple[Tensor, ...]
    alignment: int
    data_offset: int
    data_bytes: int

    def text(self, key: str) -> str:
        """Returns a text of the metadata; empty if it has none of this name."""
        value = self.entries[key].value if key in self.entries else ""
        return value if isinstance(value, str) else ""

    def number(self, key: str) -> int:
        """Returns a whole number of the metadata; 0 if it has none of this name."""
        value = self.entries[key].value if key in self.entries else 0
        return value if isinstance(value, int) and not isinstance(value, bool) else 0


def read(fd: int, path: str) -> GgufHeader:
    """Reads the header of an open file. Raises InvalidSource, which names `path`, if it is malformed, or TransferFailed
    if it cannot be read.
    """
    try:
        return _Parser(fd, path).header()
    except OSError as error:
        raise TransferFailed(f"read {path}: {error.strerror}") from None


class _Parser:
    """Reads a header from its start on, as far as needed, and no further than the limit."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path
        self._file_bytes = os.fstat(fd).st_size
        self._read = bytearray()
        self._at = 0

    def header(self) -> GgufHeader:
        version, tensor_count, entry_count = self._start()
        entries = self._entries(entry_count)
        alignment = self._alignment(entries)
        tensors, data_bytes = self._tensors(tensor_count, alignment)
        data_offset = padded(self._at, alignment)
        self._check_size(tensors, data_offset, data_bytes)
        return GgufHeader(version, entries, tensors, alignment, data_offset, data_bytes)

    def _start(self) -> tuple[int, int, int]:
        if self._file_bytes < _HEAD.size:
            raise InvalidSource(f"{self._path} is too short to be a GGUF file", hint=_AGAIN)
        magic, version, tensors, entries = _HEAD.unpack(self._take(_HEAD.size))
        if magic != MAGIC:
            raise InvalidSource(f"{self._path} is not a GGUF file", hint=_AGAIN)
        if version not in VERSIONS:
            is_swapped = version & 0xFFFF == 0
            what = "is big-endian" if is_swapped else f"has version {version} of the format"
            hint = "use a file made for this machine" if is_swapped else "convert the model again with llama.cpp"
            raise InvalidSource(f"{self._path} {what}, which cannot be read", hint=hint)
        if tensors > _MAX_TENSORS or entries > _MAX_ENTRIES:
            raise InvalidSource(f"{self._path} claims {tensors} tensors and {entries} values", hint=_AGAIN)
        return version, tensors, entries

    def _entries(self, count: int) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for _ in range(count):
            start = self._at
            key = self._key()
            if key in found:
                raise InvalidSource(f"{self._path} has the value {key!r} twice")
            value = self._value(self._take_number(), key)
            found[key] = Entry(value, bytes(self._read[start : self._at]))
        return found

    def _key(self) -> str:
        raw = self._take_text(_MAX_KEY_BYTES, "a key")
        if not raw.isascii() or not (key := raw.decode()).isprintable() or not key:
            raise InvalidSource(f"{self._path} has a value with the unusable name {raw[:80]!r}")
        return key

    def _value(self, kind: int, key: str) -> int | float | bool | str | None:
        if kind == Kind.ARRAY:
            self._skip_array(key)
            return None
        if kind == Kind.STRING:
            length = self._take_length()
            raw = self._take(length)
            return raw.decode(errors="replace") if length <= _MAX_TEXT_BYTES else None
        if (scalar := _SCALARS.get(kind)) is None:
            raise InvalidSource(f"the value {key!r} of {self._path} has the unknown type {kind}")
        (value,) = scalar.unpack(self._take(scalar.size))
        return bool(value) if kind == Kind.BOOL else value

    def _skip_array(self, key: str) -> None:
        kind, count = self._take_number(), self._take_length()
        if kind == Kind.STRING:
            self._skip_texts(count)
        elif (scalar := _SCALARS.get(kind)) is not None:
            self._skip(count * scalar.size)
        else:
            raise InvalidSource(f"the array {key!r} of {self._path} has the unknown type {kind}")

    def _skip_texts(self, count: int) -> None:
        """Skips the texts of an array: vocabularies have hundreds of thousands."""
        self._fetch(self._at + count * _LENGTH.size)
        unpack, size = _LENGTH.unpack_from, _LENGTH.size
        at, there = self._at, len(self._read)
        for _ in range(count):
            if at + size > there:
                self._fetch(at + size)
                there = len(self._read)
            at += size + unpack(self._read, at)[0]
        self._skip(at - self._at)

    def _alignment(self, entries: Mapping[str, Entry]) -> int:
        if ALIGNMENT_KEY not in entries:
            return _ALIGNMENT
        value = entries[ALIGNMENT_KEY].value
        if not isinstance(value, int) or not 8 <= value <= _MAX_ALIGNMENT or value & (value - 1):
            raise InvalidSource(f"{self._path} has the impossible alignment {value!r}")
        return value

    def _tensors(self, count: int, alignment: int) -> tuple[tuple[Tensor, ...], int]:
        """Returns the tensors, and the bytes of all."""
        found: dict[str, Tensor] = {}
        end = 0
        for _ in range(count):
            tensor = self._tensor()
            if tensor.name in found:
                raise InvalidSource(f"{self._path} has the tensor {tensor.name!r} twice")
            if tensor.offset != end:
                what = "overlaps the one before" if tensor.offset < end else "leaves a hole before it"
                raise InvalidSource(f"tensor {tensor.name!r} of {self._path} {what}")
            found[tensor.name] = tensor
            end = padded(end + tensor.size_bytes, alignment)
        return tuple(found.values()), end

    def _tensor(self) -> Tensor:
        raw = self._take_text(_MAX_NAME_BYTES, "the name of a tensor")
        try:
            name = check_name(raw.decode(), self._path)
        except UnicodeDecodeError:
            raise InvalidSource(f"{self._path} has a tensor with the unusable name {raw!r}") from None
        rank = self._take_number()
        if rank > _MAX_RANK:
            raise InvalidSource(f"tensor {name!r} of {self._path} claims {rank} dimensions")
        shape = tuple(self._take_length() for _ in range(rank))
        number, offset = self._take_number(), self._take_length()
        if (kind := TYPES.get(number)) is None:
            hint = "if its type is newer than this version of flashd, update flashd"
            raise InvalidSource(f"tensor {name!r} of {self._path} has the unknown type {number}", hint=hint)
        elements = 1
        for extent in shape:
            elements *= extent
        size_bytes = elements // kind.block * kind.size_bytes
        if (shape[0] if shape else 1) % kind.block or elements > MAX_TENSOR_BYTES or size_bytes > MAX_TENSOR_BYTES:
            raise InvalidSource(f"tensor {name!r} of {self._path} has an impossible shape {shape} for {kind.name}")
        return Tensor(name, number, shape, offset, size_bytes)

    def _check_size(self, tensors: tuple[Tensor, ...], data_offset: int, data_bytes: int) -> None:
        end = data_offset + (tensors[-1].offset + tensors[-1].size_bytes) if tensors else self._at
        if end > self._file_bytes:
            raise InvalidSource(
                f"{self._path} is cut short: its tensors end at {end} bytes, but it has {self._file_bytes}", hint=_AGAIN
            )
        if self._file_bytes > data_offset + data_bytes:
            what = f"has {self._file_bytes - data_offset - data_bytes} bytes behind its last tensor"
            raise InvalidSource(f"{self._path} {what}", hint=_AGAIN)

    def _take(self, length: int) -> bytes:
        start = self._at
        self._skip(length)
        return bytes(self._read[start : self._at])

    def _skip(self, length: int) -> None:
        self._fetch(self._at + length)
        self._at += length

    def _take_number(self) -> int:
        return int(_NUMBER.unpack(self._take(_NUMBER.size))[0])

    def _take_length(self) -> int:
        return int(_LENGTH.unpack(self._take(_LENGTH.size))[0])

    def _take_text(self, limit_bytes: int, what: str) -> bytes:
        length = self._take_length()
        if length > limit_bytes:
            raise InvalidSource(f"{self._path} claims {what} of {length} bytes", hint=_AGAIN)
        return self._take(length)

    def _fetch(self, end: int) -> None:
        """Reads on until `end`. Raises InvalidSource if that is beyond the file, or the limit of a header."""
        if end > self._file_bytes:
            raise InvalidSource(f"{self._path} is cut short in its header", hint=_AGAIN)
        if end > MAX_HEADER_BYTES:
            raise InvalidSource(f"{self._path} claims a header of more than {MAX_HEADER_BYTES} bytes", hint=_AGAIN)
        while len(self._read) < end:
            more = os.pread(self._fd, max(_CHUNK_BYTES, end - len(self._read)), len(self._read))
            if not more:
                raise InvalidSource(f"{self._path} was cut short while it was read", hint=_AGAIN)
            self._read += more


def padded(offset: int, alignment: int) -> int:
    """Returns the next multiple of the alignment."""
    return -(-offset // alignment) * alignment
