# SPDX-License-Identifier: Apache-2.0
"""Parses and checks headers of safetensors files.

A header is untrusted input: its length is bounded before it is read, its JSON before it is parsed, and every tensor
must be inside the file, without overlaps, holes or trailing bytes. These are the rules of the safetensors format, and
more: names must be printable, and shapes must not overflow.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flashd.checkpoint.dtypes import DTYPES, size_of
from flashd.checkpoint.json_reader import strict_json
from flashd.errors import InvalidSource, TransferFailed
from flashd.io.streamer import ALIGNMENT, Extent
from flashd.units import MiB

MAX_HEADER_BYTES = 64 * MiB  # three times that of the largest models, with hundreds of thousands of tensors
MAX_NAME_BYTES = 1024
MAX_RANK = 64
MAX_TENSOR_BYTES = 1 << 62
METADATA = "__metadata__"
ALIASES = "flashd.aliases"  # in the metadata: a JSON object from additional names to names of tensors

_FIELDS = {"dtype", "shape", "data_offsets"}  # an entry added by a later format might change the meaning of a tensor
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A named array. Its extent counts from the start of the data region."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    extent: Extent


@dataclass(frozen=True, slots=True)
class Header:
    """Tensors in the order of their data. `data_offset` is the offset of the data region in the file."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    data_offset: int = 0

    @property
    def data_bytes(self) -> int:
        return max((tensor.extent.end for tensor in self.tensors), default=0)


def read(fd: int, path: str) -> Header:
    """Reads the header of an open file. Raises InvalidSource, which names `path`, if it is malformed, or TransferFailed
    if it cannot be read.
    """
    try:
        return _read(fd, path)
    except OSError as error:
        raise TransferFailed(f"read {path}: {error.strerror}") from None


def _read(fd: int, path: str) -> Header:
    size_bytes = os.fstat(fd).st_size
    start = os.pread(fd, _LENGTH.size, 0)
    if len(start) < _LENGTH.size:
        raise InvalidSource(f"{path} is too short to be a safetensors file")
    (length,) = _LENGTH.unpack(start)
    if length > MAX_HEADER_BYTES or _LENGTH.size + length > size_bytes:
        raise InvalidSource(
            f"{path} claims a header of {length} bytes in a file of {size_bytes}",
            hint="it is not a safetensors file, or is truncated: download or save it again",
        )
    raw = os.pread(fd, length, _LENGTH.size)
    return parse(raw, data_bytes=size_bytes - _LENGTH.size - length, path=path)


def parse(raw: bytes, *, data_bytes: int, path: str) -> Header:
    """Parses the header `raw` (without its length), which must describe exactly `data_bytes` of data."""
    document = strict_json(raw, f"the header of {path}")
    if not isinstance(document, dict):
        raise InvalidSource(f"the header of {path} is not a JSON object")
    metadata = document.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(_is_text(text) for pair in metadata.items() for text in pair):
        raise InvalidSource(f"{METADATA} of {path} is not a table of strings")
    tensors = [_tensor(name, entry, path) for name, entry in document.items()]
    tensors.sort(key=lambda tensor: (tensor.extent.offset, tensor.extent.end))
    _check_coverage(tensors, data_bytes, path)
    return Header(tuple(tensors), metadata, _LENGTH.size + len(raw))


def aliases(header: Header, path: str) -> Mapping[str, str]:
    """Maps additional names of tensors to stored names, in a checkpoint or in a source that was one."""
    found = strict_json(header.metadata.get(ALIASES, "{}").encode(), f"{ALIASES} of {path}")
    names = {tensor.name for tensor in header.tensors}
    if not isinstance(found, dict) or not all(isinstance(n, str) and n in names for n in found.values()):
        raise InvalidSource(f"{ALIASES} of {path} does not name tensors")
    for alias in found:
        if check_name(alias, path) in names:
            raise InvalidSource(f"{path} has {alias!r} both as a tensor and as an alias of another one")
    return found


def check_name(name: str, path: str) -> str:
    """Checks a tensor's name. It may contain slashes and spaces, but nothing harmful in a terminal, a log or a file."""
    usable = name.isprintable() and name not in {"", METADATA}
    if not usable or len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        raise InvalidSource(f"{path} has a tensor with the unusable name {name[:80]!r}")
    return name


def check_tensor(name: str, dtype: object, shape: object, path: str) -> tuple[str, tuple[int, ...], int]:
    """Checks the description of a tensor from outside, and returns its dtype, shape and size in bytes."""
    check_name(name, path)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InvalidSource(f"tensor {name!r} of {path} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_count, shape)):
        raise InvalidSource(f"tensor {name!r} of {path} has an impossible shape")
    size_bytes = size_of(dtype, shape)
    if size_bytes is None or size_bytes > MAX_TENSOR_BYTES:
        raise InvalidSource(f"tensor {name!r} of {path} has an impossible shape {shape} for {dtype}")
    return dtype, tuple(shape), size_bytes


def _is_text(value: object) -> bool:
    """Tells whether a value is a string that can be written as UTF-8, unlike half a surrogate pair in JSON."""
    return isinstance(value, str) and value.encode("utf-8", "replace").decode() == value


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_TENSOR_BYTES  # bool is the only subclass of int from JSON


def _tensor(name: str, entry: object, path: str) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise InvalidSource(f"tensor {name[:80]!r} of {path} has other entries than dtype, shape and data_offsets")
    dtype, shape, size_bytes = check_tensor(name, entry["dtype"], entry["shape"], path)
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise InvalidSource(f"tensor {name!r} of {path} has impossible data_offsets")
    start, end = offsets
    if end - start != size_bytes:
        raise InvalidSource(f"tensor {name!r} of {path} needs {size_bytes} bytes, but claims {end - start}")
    return TensorInfo(name, dtype, shape, Extent(start, size_bytes))


def _check_coverage(tensors: Iterable[TensorInfo], data_bytes: int, path: str) -> None:
    end = 0
    for tensor in tensors:
        if tensor.extent.offset != end:
            what = "overlaps the one before" if tensor.extent.offset < end else "leaves a hole before it"
            raise InvalidSource(f"tensor {tensor.name!r} of {path} {what}")
        end = tensor.extent.end
    if end != data_bytes:
        what = "is cut short" if end > data_bytes else "has bytes behind its last tensor"
        raise InvalidSource(
            f"{path} {what}: its tensors need {end} bytes of data, but it has {data_bytes}",
            hint="download or save it again",
        )


def as_json(header: Header) -> str:
    """Formats the header as compact JSON without padding, as for the layout of a lease."""
    document: dict[str, object] = {METADATA: dict(header.metadata)} if header.metadata else {}
    for tensor in header.tensors:
        document[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.extent.offset, tensor.extent.end],
        }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def serialise(header: Header) -> bytes:
    return framed(as_json(header))


def framed(layout_json: str) -> bytes:
    """Returns length and JSON, padded with spaces (which the format allows) so that the data begins on an I/O block."""
    raw = layout_json.encode()
    padding = -(_LENGTH.size + len(raw)) % ALIGNMENT
    return _LENGTH.pack(len(raw) + padding) + raw + b" " * padding
