# SPDX-License-Identifier: Apache-2.0
"""Files with known contents, and memory to read them into."""

from __future__ import annotations

import ctypes
import mmap
import random
from pathlib import Path

from flashd.io.streamer import Backend, Digests, blake3

BACKENDS = [Backend.IO_URING, Backend.THREADS]


def some_bytes(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def digests_of(contents: bytes, block_bytes: int) -> Digests:
    blocks = (contents[start : start + block_bytes] for start in range(0, len(contents), block_bytes))
    return Digests(block_bytes, b"".join(map(blake3, blocks)))


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}


class Memory:
    """Page-aligned memory filled with 0xAA, so that a byte too many is seen."""

    def __init__(self, size_bytes: int) -> None:
        self.mapping = mmap.mmap(-1, max(size_bytes, 1))
        self.mapping.write(b"\xaa" * size_bytes)
        self.address = self.address_of(self.mapping)

    @staticmethod
    def address_of(mapping: mmap.mmap) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(mapping))

    def __getitem__(self, part: slice) -> bytes:
        return self.mapping[part]
