# SPDX-License-Identifier: Apache-2.0
"""What does a checkpoint take on disk, when equal weights are hard links to one file?"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flashd.checkpoint.files import WEIGHTS


@dataclass(frozen=True, slots=True)
class Footprint:
    """`weights_inode` tells which checkpoints share their weights; 0 where there are none."""

    weights_inode: int
    weights_bytes: int
    other_bytes: int


def measure(directory: Path) -> Footprint:
    inode = weights_bytes = other_bytes = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if entry.name == WEIGHTS:
                inode, weights_bytes = status.st_ino, status.st_size
            else:
                other_bytes += status.st_size
    return Footprint(inode, weights_bytes, other_bytes)


def total_bytes(footprints: Iterable[Footprint]) -> int:
    """Shared weights count once."""
    weights: dict[int, int] = {}
    others_bytes = 0
    for footprint in footprints:
        weights[footprint.weights_inode] = footprint.weights_bytes
        others_bytes += footprint.other_bytes
    return sum(weights.values()) + others_bytes
