# SPDX-License-Identifier: Apache-2.0
"""What is an arena? One memfd that holds the data region of one checkpoint, and can be handed to anybody to read.

While it is filled it is mapped here, writable. `seal` ends that for good: the kernel then refuses every further
writable mapping and every change of size, to us as to everybody who is handed the descriptor (memfd_create(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from flashd.errors import OutOfMemory
from flashd.units import MiB, format_bytes

_MFD_HUGETLB = 0x4
_MFD_HUGE_2MB = 21 << 26
_F_SEAL_FUTURE_WRITE = 0x10  # since Linux 5.1; Python names it from 3.14 on
HUGE_PAGE_BYTES = 2 * MiB


class HugePages(StrEnum):
    """How arenas get huge pages on this machine: reserved ones, by advice to shared memory, or not at all."""

    HUGETLB = "hugetlb"
    SHMEM = "shmem"
    NONE = "none"


def probe_huge_pages(
    hugepages: Path = Path("/sys/kernel/mm/hugepages/hugepages-2048kB"),
    transparent: Path = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
) -> HugePages:
    """What the machine gives now (Linux admin guide, hugetlbpage and transhuge)."""
    try:
        if int((hugepages / "free_hugepages").read_text()) > 0:
            return HugePages.HUGETLB
        if any(f"[{mode}]" in transparent.read_text() for mode in ("always", "within_size", "advise", "force")):
            return HugePages.SHMEM
    except (OSError, ValueError):
        pass
    return HugePages.NONE


class Arena:
    """A region of `size_bytes` bytes (rounded up to `mapped_bytes`) in a descriptor, until it is closed."""

    def __init__(self, size_bytes: int, label: str, huge_pages: HugePages) -> None:
        """Raises OutOfMemory if the kernel has no such memory. Nothing is populated yet."""
        self.size_bytes = size_bytes
        self.huge_pages = huge_pages
        self.mapped_bytes = rounded(size_bytes, huge_pages)
        self._fd = _memfd(label, self.mapped_bytes, huge_pages)
        self._mapping: mmap.mmap | None = None
        try:
            self._mapping = mmap.mmap(self._fd, self.mapped_bytes)
            if huge_pages is HugePages.SHMEM:
                with contextlib.suppress(OSError):  # advice: a kernel without transparent huge pages refuses it
                    self._mapping.madvise(mmap.MADV_HUGEPAGE)
        except (OSError, ValueError) as error:
            self.close()
            raise _no_memory(self.mapped_bytes, error) from error

    @property
    def address(self) -> int:
        """Where it is mapped for filling, until it is sealed."""
        assert self._mapping is not None, "sealed"
        return ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    @property
    def fd(self) -> int:
        """The descriptor, which stays the arena's: duplicate it to keep it."""
        return self._fd

    def seal(self) -> None:
        """From here on nobody can change it; our own mapping is gone."""
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)

    def open_read_only(self) -> int:
        """A new descriptor, opened for reading only, for somebody else. It is the caller's to close."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Lets go of it. The memory stays as long as somebody else has a descriptor or a mapping."""
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def rounded(size_bytes: int, huge_pages: HugePages) -> int:
    """What an arena takes of memory: whole pages, and at least one."""
    page = mmap.PAGESIZE if huge_pages is HugePages.NONE else HUGE_PAGE_BYTES
    return max(page, -(-size_bytes // page) * page)


def _memfd(label: str, mapped_bytes: int, huge_pages: HugePages) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if huge_pages is HugePages.HUGETLB:
        flags |= _MFD_HUGETLB | _MFD_HUGE_2MB
    fd = os.memfd_create(f"flashd:{label}"[:200], flags)
    try:
        os.ftruncate(fd, mapped_bytes)
    except OSError as error:
        os.close(fd)
        raise _no_memory(mapped_bytes, error) from error
    return fd


def _no_memory(mapped_bytes: int, error: Exception) -> OutOfMemory:
    number = getattr(error, "errno", errno.ENOMEM)
    reason = os.strerror(number or errno.ENOMEM)
    hint = "evict a model, or lower memory.host_budget to what this machine really has"
    return OutOfMemory(f"the kernel has no {format_bytes(mapped_bytes)} for an arena: {reason}", hint=hint)
