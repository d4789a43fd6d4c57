# SPDX-License-Identifier: Apache-2.0
"""The order of tensors in a checkpoint, which aligns every tensor and makes the arena one large read.

Tensors whose size is a multiple of 256 bytes come first, by name: each then starts at a multiple of 256, which all
kernels accept. The others follow in descending order of the power of two in their size, so that each is still aligned
to its element. There are no holes, so the file is valid safetensors. The order depends on names, dtypes and shapes
only: two fine-tunes of one architecture have the same layout, however they are sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flashd.checkpoint.header import TensorInfo
from flashd.io.streamer import Extent, blake3

TENSOR_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor before it is placed."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def arrange(tensors: Iterable[Shape]) -> tuple[TensorInfo, ...]:
    """Places all tensors in the data region."""
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
    """Returns a digest that is equal for checkpoints with equal names, dtypes, shapes and places of tensors."""
    lines = (f"{t.name}\0{t.dtype}\0{','.join(map(str, t.shape))}\0{t.extent.offset}" for t in tensors)
    return blake3("\n".join(lines).encode()).hex()
