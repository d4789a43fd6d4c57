# SPDX-License-Identifier: Apache-2.0
"""Makes one GGUF file of a model's files: of one the file itself, of several what llama-gguf-split --merge makes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flashd.checkpoint.gguf import header as headers
from flashd.checkpoint.gguf.header import MAGIC, GgufHeader, Tensor, padded
from flashd.errors import InvalidSource
from flashd.io.streamer import OpenFile, Piece

_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_OF_SPLIT = (_NUMBER, _COUNT, _TENSORS)
_MISSING = "put all parts of the model into one folder, and no others"


@dataclass(frozen=True, slots=True)
class Whole:
    """One GGUF file: its header, its size, and where its bytes are. `head` are bytes in none of the files, from which
    the pieces of the file after the last one are.
    """

    header: GgufHeader
    size_bytes: int
    pieces: Sequence[Piece]
    head: bytes = b""


def whole(files: Sequence[OpenFile]) -> Whole:
    """Joins a model's files, in the order of their numbers. Raises InvalidSource if they are not all of one model."""
    found = [headers.read(file.fd, file.path) for file in files]
    counts = [header.number(_COUNT) for header in found]
    if len(files) == 1 and counts[0] <= 1:
        (header,), size_bytes = found, os.fstat(files[0].fd).st_size
        if not header.tensors:
            raise InvalidSource(f"{files[0].path} has no tensors", hint="it is a vocabulary only: get the whole model")
        return Whole(header, size_bytes, [Piece(0, 0, 0, size_bytes)])
    _check_parts(files, found)
    return _joined(files, found)


def _check_parts(files: Sequence[OpenFile], found: Sequence[GgufHeader]) -> None:
    for number, (file, header) in enumerate(zip(files, found, strict=True)):
        of, says = header.number(_COUNT), header.number(_NUMBER)
        if of != len(files) or says != number:
            what = f"{file.path} is part {says + 1} of {of}, in the place of part {number + 1} of {len(files)}"
            raise InvalidSource(what, hint=_MISSING)
    told, there = found[0].number(_TENSORS), sum(len(header.tensors) for header in found)
    if not there or told not in {0, there}:
        raise InvalidSource(f"{files[0].path} and its parts have {there} tensors instead of {told}", hint=_MISSING)


def _joined(files: Sequence[OpenFile], found: Sequence[GgufHeader]) -> Whole:
    alignment = found[0].alignment  # the only one that is told: parts but the first have no metadata of the model
    tensors: dict[str, Tensor] = {}
    origins: dict[str, tuple[int, int]] = {}  # file, and offset in it
    end = 0
    for number, header in enumerate(found):
        for tensor in header.tensors:
            if tensor.name in tensors:
                raise InvalidSource(f"tensor {tensor.name!r} is in two of the parts of {files[0].path}")
            tensors[tensor.name] = replace(tensor, offset=end)
            origins[tensor.name] = number, header.data_offset + tensor.offset
            end = padded(end + tensor.size_bytes, alignment)
    entries = {key: entry for key, entry in found[0].entries.items() if key not in _OF_SPLIT}
    described = b"".join([
        MAGIC, _u32(found[0].version), _u64(len(tensors)), _u64(len(entries)),
        *(entry.raw for entry in entries.values()), *map(_described, tensors.values()),
    ])  # fmt: skip
    data_offset = padded(len(described), alignment)
    head = described.ljust(data_offset, b"\0")
    pieces = [Piece(len(files), 0, 0, data_offset)]
    for tensor in tensors.values():
        (number, origin), place = origins[tensor.name], data_offset + tensor.offset
        if tensor.size_bytes:
            pieces.append(Piece(number, origin, place, tensor.size_bytes))
        if gap := padded(tensor.size_bytes, alignment) - tensor.size_bytes:
            pieces.append(Piece(len(files), len(head), place + tensor.size_bytes, gap))
    header = GgufHeader(found[0].version, entries, tuple(tensors.values()), alignment, data_offset, end)
    return Whole(header, data_offset + end, pieces, head + bytes(alignment))


def _described(tensor: Tensor) -> bytes:
    name = tensor.name.encode()
    shape = b"".join(map(_u64, tensor.shape))
    return b"".join((
        _u64(len(name)), name, _u32(len(tensor.shape)), shape, _u32(tensor.type_number), _u64(tensor.offset),
    ))  # fmt: skip


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")
