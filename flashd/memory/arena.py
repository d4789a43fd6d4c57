# SPDX-License-Identifier: Apache-2.0
"""What is an arena? One descriptor of memory that holds the data region of one checkpoint, and can be handed on.

While it is filled it is mapped here, writable; `seal` ends that. Of host memory the kernel then refuses every further
writable mapping and every change of size, to us as to everybody who is handed the descriptor (memfd_create(2)). A GPU's
driver knows no seals: whoever is handed such a descriptor could map it writable, so it goes to authorised callers only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from flashd import cuda
from flashd.errors import DeviceFailed, InvalidArgument, OutOfMemory
from flashd.units import MiB, format_bytes

_MFD_HUGETLB = 0x4
_MFD_HUGE_2MB = 21 << 26
_F_SEAL_FUTURE_WRITE = 0x10  # since Linux 5.1; Python names it from 3.14 on
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
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


@dataclass(frozen=True, slots=True)
class View:
    """An arena mapped for reading. `is_registered`: a GPU's copy engine reaches it without the processor's help."""

    address: int
    is_registered: bool


class Arena(Protocol):
    """A region of `size_bytes` bytes (rounded up to `mapped_bytes`) in a descriptor, until it is closed."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def mapped_bytes(self) -> int: ...

    @property
    def fd(self) -> int:
        """The descriptor, which stays the arena's: duplicate it to keep it."""

    @property
    def address(self) -> int:
        """Where it is mapped for filling, until it is sealed: a host's address, or a device's."""

    def seal(self) -> None:
        """It is filled: our own writable mapping is gone from here on."""

    def viewed(self) -> AbstractContextManager[View]:
        """Maps it for reading."""

    def open_read_only(self) -> int:
        """A new descriptor for somebody else, who maps it for reading. It is the caller's to close."""

    def close(self) -> None:
        """Lets go of it. The memory stays as long as somebody else has a descriptor or a mapping."""


class HostArena:
    """An arena in host memory: a memfd."""

    def __init__(self, size_bytes: int, label: str, huge_pages: HugePages) -> None:
        """Raises OutOfMemory if the kernel has no such memory. Nothing is populated yet."""
        self.size_bytes = size_bytes
        self.huge_pages = huge_pages
        self.mapped_bytes = rounded(size_bytes, huge_pages)
        self._fd = _memfd(label, self.mapped_bytes, huge_pages)
        self._mapping: mmap.mmap | None = None
        self._registration: cuda.Registration | None = None
        self._lock = threading.Lock()  # registering takes a while, on a thread
        try:
            self._mapping = mmap.mmap(self._fd, self.mapped_bytes)
            if huge_pages is HugePages.SHMEM:
                with contextlib.suppress(OSError):  # advice: a kernel without transparent huge pages refuses it
                    self._mapping.madvise(mmap.MADV_HUGEPAGE)
        except (OSError, ValueError) as error:
            self.close()
            raise _no_memory(self.mapped_bytes, error) from error

    @classmethod
    def adopt(cls, fd: int, size_bytes: int, huge_pages: HugePages) -> HostArena:
        """The arena that another process of ours made and sealed; the descriptor is the arena's from now on.

        Raises InvalidArgument if it is not such a one, and then closes it.
        """
        arena = cls.__new__(cls)
        arena.size_bytes, arena.huge_pages, arena.mapped_bytes = size_bytes, huge_pages, os.fstat(fd).st_size
        arena._fd, arena._mapping, arena._registration, arena._lock = fd, None, None, threading.Lock()
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        except OSError:
            sealed = False  # not even a memfd
        if not sealed or arena.mapped_bytes not in {rounded(size_bytes, pages) for pages in HugePages}:
            arena.close()
            raise InvalidArgument(f"that descriptor is not of a sealed arena of {size_bytes} bytes")
        return arena

    @property
    def address(self) -> int:
        assert self._mapping is not None, "sealed"
        return ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    @property
    def fd(self) -> int:
        return self._fd

    def seal(self) -> None:
        """From here on nobody can change it."""
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)

    def register(self, ordinal: int) -> None:
        """Makes it known to a GPU, until it is closed: from then on it is copied there by the GPU itself.

        Takes 0.05 s a GB: call it on a thread. Raises DeviceFailed where the driver cannot.
        """
        with self._lock:
            if self._fd >= 0 and self._registration is None:
                self._registration = cuda.Registration(ordinal, self._fd, self.mapped_bytes)

    @contextmanager
    def viewed(self) -> Iterator[View]:
        if self._registration is not None:
            yield View(self._registration.address, is_registered=True)
            return
        with cuda.HostView(self._fd, self.mapped_bytes) as view:
            yield View(view.address, is_registered=False)

    def open_read_only(self) -> int:
        """Opened for reading only, so that not even the descriptor allows more."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        with self._lock, contextlib.ExitStack() as stack:  # the descriptor goes even where the driver fails
            if self._fd >= 0:
                stack.callback(os.close, self._fd)
                self._fd = -1
            if self._registration is not None:
                stack.callback(self._registration.close)
                self._registration = None
            if self._mapping is not None:
                stack.callback(self._mapping.close)
                self._mapping = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class CudaArena:
    """An arena in a GPU's memory: one allocation of its driver's virtual memory management, exported."""

    def __init__(self, ordinal: int, fd: int, size_bytes: int, mapped_bytes: int) -> None:
        """The descriptor is the arena's from now on."""
        self.size_bytes = size_bytes
        self.mapped_bytes = mapped_bytes
        self._ordinal = ordinal
        self._fd = fd
        self._mapping: cuda.Mapping | None = None

    @classmethod
    def allocate(cls, ordinal: int, size_bytes: int, mapped_bytes: int) -> CudaArena:
        """Raises OutOfMemory or DeviceFailed."""
        arena = cls(ordinal, cuda.allocate(ordinal, mapped_bytes), size_bytes, mapped_bytes)
        try:
            arena._mapping = cuda.Mapping(ordinal, arena._fd, mapped_bytes, is_writable=True)
        except BaseException:
            arena.close()
            raise
        return arena

    @classmethod
    def adopt(cls, ordinal: int, fd: int, size_bytes: int, mapped_bytes: int) -> CudaArena:
        """As HostArena.adopt: raises InvalidArgument, and then closes the descriptor."""
        arena = cls(ordinal, fd, size_bytes, mapped_bytes)
        try:
            with arena.viewed():  # the driver maps an allocation as a whole, so this proves its size
                return arena
        except (DeviceFailed, OutOfMemory) as error:
            arena.close()
            raise InvalidArgument(f"that descriptor is not of {mapped_bytes} bytes of a GPU: {error.message}") from None

    @property
    def address(self) -> int:
        assert self._mapping is not None, "sealed"
        return self._mapping.address

    @property
    def fd(self) -> int:
        return self._fd

    def seal(self) -> None:
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None

    @contextmanager
    def viewed(self) -> Iterator[View]:
        with cuda.Mapping(self._ordinal, self._fd, self.mapped_bytes, is_writable=False) as mapping:
            yield View(mapping.address, is_registered=True)

    def open_read_only(self) -> int:
        return os.dup(self._fd)

    def close(self) -> None:
        try:
            self.seal()
        finally:  # the descriptor goes even where the driver fails
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


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
