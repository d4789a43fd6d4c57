# SPDX-License-Identifier: Apache-2.0
"""In which order do tensors lie in a checkpoint, so that one large read is the arena and every tensor is aligned?

Tensors whose size is a multiple of 256 bytes come first, by name: each then starts on a multiple of 256, which every
kernel in use accepts. The odd ones follow, by falling power of two in their size, so that each still is aligned to its
own element. There are no holes, so the file is valid safetensors. The order depends on names, dtypes and shapes alone:
two fine-tunes of one architecture, however sharded, have the same layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flashd.checkpoint.header import TensorInfo
from flashd.streamer import Extent, blake3

TENSOR_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor before it has a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def arrange(tensors: Iterable[Shape]) -> tuple[TensorInfo, ...]:
    """Gives every tensor its place in the data region."""
    placed = []
    offset = 0
    for tensor in sorted(tensors, key=_rank):
        placed.append(TensorInfo(tensor.name, tensor.dtype, tensor.shape, Extent(offset, tensor.size_bytes)))
        offset += tensor.size_bytes
    return tuple(placed)


def _rank(tensor: Shape) -> tuple[int, str]:
    power_of_two = tensor.size_bytes & -tensor.size_bytes
    if tensor.size_bytes == 0 or power_of_two >= TENSOR_ALIGNMENT:
        return -TENSOR_ALIGNMENT, tensor.name
    return -power_of_two, tensor.name


def layout_digest(tensors: Sequence[TensorInfo]) -> str:
    """Equal for checkpoints whose tensors have the same names, dtypes, shapes and places."""
    lines = (f"{t.name}\0{t.dtype}\0{','.join(map(str, t.shape))}\0{t.extent.offset}" for t in tensors)
    return blake3("\n".join(lines).encode()).hex()
