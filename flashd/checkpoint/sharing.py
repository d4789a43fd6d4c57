# SPDX-License-Identifier: Apache-2.0
"""Finds the bytes that a checkpoint has in common with others.

Checkpoints of one architecture have the same layout, so common bytes of two fine-tunes are in the same blocks, which
have equal digests: only digests are read and compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashd.io.streamer import Digests

_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive bytes for `offset` of the data region.

    They are also at `source_offset` of the data region with the number `source`; None if no other region has them.
    """

    source: int | None
    source_offset: int
    offset: int
    length: int


def find_shared(wanted: Digests, size_bytes: int, others: Sequence[Digests], *, least_bytes: int = 1) -> list[Run]:
    """Yields runs that cover a data region in order, with each block from the first other region that has it.

    Runs of common blocks below `least_bytes` are ignored, because each run has a fixed cost.
    """
    block_bytes = wanted.block_bytes
    found: dict[bytes, tuple[int, int]] = {}
    for number, other in enumerate(others):
        if other.block_bytes == block_bytes:
            for index, digest in enumerate(_digests(other)):
                found.setdefault(digest, (number, index * block_bytes))
    runs: list[Run] = []
    for index, digest in enumerate(_digests(wanted)):
        offset = index * block_bytes
        length = min(block_bytes, size_bytes - offset)
        # Equal digests mean equal bytes, and so equal lengths.
        source, source_offset = found.get(digest, (None, offset))
        last = runs[-1] if runs else None
        if last and last.source == source and last.source_offset + last.length == source_offset:
            runs[-1] = Run(source, last.source_offset, last.offset, last.length + length)
        else:
            runs.append(Run(source, source_offset, offset, length))
    return _joined(runs, least_bytes)


def _joined(runs: Sequence[Run], least_bytes: int) -> list[Run]:
    joined: list[Run] = []
    for run in runs:
        kept = run if run.length >= least_bytes else Run(None, run.offset, run.offset, run.length)
        last = joined[-1] if joined else None
        if last and last.source is None and kept.source is None:
            joined[-1] = Run(None, last.offset, last.offset, last.length + kept.length)
        else:
            joined.append(kept)
    return joined


def _digests(digests: Digests) -> list[bytes]:
    table = digests.table
    return [table[start : start + _DIGEST_BYTES] for start in range(0, len(table), _DIGEST_BYTES)]
