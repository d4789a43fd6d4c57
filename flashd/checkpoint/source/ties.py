# SPDX-License-Identifier: Apache-2.0
"""Finds tensors of a source that were saved twice under different names.

Safetensors cannot express that two names share bytes, so exporters of tied models write `lm_head.weight` a second time.
Equal bytes are found by comparison, cheap samples first, without a list of known names or trust in the config.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping

from flashd.checkpoint.source.pickles import SourceTensor
from flashd.checkpoint.source.reader import Source
from flashd.errors import Cancelled
from flashd.units import KiB, MiB

# Small tensors are equal by chance (norms that are all ones): tying those would give two fine-tunes of one
# architecture different layouts, and save nothing.
WORTH_TYING_BYTES = 64 * KiB
_SAMPLE_BYTES = 4 * KiB
_COMPARE_BYTES = 4 * MiB


def find_ties(source: Source, cancelled: Callable[[], bool] = lambda: False) -> Mapping[str, str]:
    """Maps additional names to first names, for tensors of equal dtype, shape and bytes that are not all zero."""
    groups: dict[tuple[str, tuple[int, ...], bytes], list[SourceTensor]] = defaultdict(list)
    shapes: dict[tuple[str, tuple[int, ...]], list[SourceTensor]] = defaultdict(list)
    for tensor in sorted(source.tensors, key=lambda tensor: tensor.name, reverse=True):
        if tensor.extent.length >= WORTH_TYING_BYTES and tensor.name not in source.aliases:
            shapes[tensor.dtype, tensor.shape].append(tensor)
    for (dtype, shape), alike in shapes.items():
        for tensor in alike if len(alike) > 1 else ():
            sample = _read(source, tensor, tensor.extent.length // 2, _SAMPLE_BYTES)
            if any(sample):
                groups[dtype, shape, sample].append(tensor)
    ties: dict[str, str] = {}
    for alike in groups.values():
        # Most sort so that the embedding is kept (`model.embed_tokens.weight`); `lm_head.weight` is the further name.
        first, *others = alike
        ties |= {other.name: first.name for other in others if _equal(source, first, other, cancelled)}
    return ties


def _read(source: Source, tensor: SourceTensor, offset: int, length: int) -> bytes:
    return os.pread(
        source.files[tensor.file].fd, min(length, tensor.extent.length - offset), tensor.extent.offset + offset
    )


def _equal(source: Source, one: SourceTensor, other: SourceTensor, cancelled: Callable[[], bool]) -> bool:
    for offset in range(0, one.extent.length, _COMPARE_BYTES):
        if cancelled():
            raise Cancelled("the conversion was cancelled")
        if _read(source, one, offset, _COMPARE_BYTES) != _read(source, other, offset, _COMPARE_BYTES):
            return False
    return True
