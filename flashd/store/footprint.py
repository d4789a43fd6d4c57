# SPDX-License-Identifier: Apache-2.0
"""Disk use of checkpoints, some of which share their weights by hard links."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flashd.checkpoint.files import WEIGHTS


@dataclass(frozen=True, slots=True)
class Footprint:
    """Disk use of a checkpoint. Those with the same `weights_inode` share their weights; it is 0 without weights."""

    weights_inode: int
    weights_bytes: int
    other_bytes: int


def measure(directory: Path) -> Footprint:
    """Measures a checkpoint. Unreadable files count as empty; opening the checkpoint reports the error."""
    inode = weights_bytes = other_bytes = 0
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if entry.name == WEIGHTS and stat.S_ISREG(status.st_mode):
                inode, weights_bytes = status.st_ino, status.st_size
            elif stat.S_ISREG(status.st_mode):
                other_bytes += status.st_size
    return Footprint(inode, weights_bytes, other_bytes)


def total_bytes(footprints: Iterable[Footprint]) -> int:
    """Returns the total, with shared weights counted once."""
    weights: dict[int, int] = {}
    others_bytes = 0
    for footprint in footprints:
        weights[footprint.weights_inode] = footprint.weights_bytes
        others_bytes += footprint.other_bytes
    return sum(weights.values()) + others_bytes
