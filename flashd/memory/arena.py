# SPDX-License-Identifier: Apache-2.0
"""Arenas: memory that holds the data region of one checkpoint, behind a descriptor that can be passed on.

While an arena is filled, it is mapped writable here, until `seal`. From then on the kernel refuses writable mappings
and changes of size of host memory to us and to all receivers of the descriptor (memfd_create(2)). GPU drivers have no
seals: a receiver could map such memory writable, so these descriptors are passed to authorised callers only.
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
from typing import Protocol

from flashd.closing import Closing
from flashd.errors import DeviceFailed, InvalidArgument, OutOfMemory
from flashd.io import cuda
from flashd.units import MiB, format_bytes

_MFD_HUGETLB = 0x4
_MFD_HUGE_2MB = 21 << 26
_F_SEAL_FUTURE_WRITE = 0x10  # since Linux 5.1; Python names it from 3.14 on
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
HUGE_PAGE_BYTES = 2 * MiB


class HugePages(StrEnum):
    """The sources of huge pages for arenas: reserved pages, advice for shared memory, or none."""

    HUGETLB = "hugetlb"
    SHMEM = "shmem"
    NONE = "none"


def probe_huge_pages(
    hugepages: Path = Path("/sys/kernel/mm/hugepages/hugepages-2048kB"),
    transparent: Path = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
) -> HugePages:
    """Finds the source of huge pages that the machine offers now (Linux admin guide, hugetlbpage and transhuge)."""
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
    """An arena mapped for reading. If it `is_registered`, a GPU's copy engine can read it directly."""

    address: int
    is_registered: bool


class Arena(Protocol):
    """A region of `size_bytes` bytes (rounded up to `mapped_bytes`) behind a descriptor, until `close`."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def mapped_bytes(self) -> int: ...

    @property
    def fd(self) -> int:
        """The descriptor, which `close` closes: duplicate it to keep it."""

    @property
    def address(self) -> int:
        """Address of the mapping for filling, until `seal`, in the host's or the device's address space."""

    def seal(self) -> None:
        """Ends filling, and removes our own writable mapping."""

    def viewed(self) -> AbstractContextManager[View]:
        """Maps the arena for reading."""

    def open_read_only(self) -> int:
        """Returns a new descriptor for another process, which maps it for reading. The caller closes it."""

    def close(self) -> None:
        """Closes the descriptor. The memory exists as long as another process has a descriptor or a mapping."""


class Registered(Protocol):
    """Host memory registered with a GPU, until `close`."""

    @property
    def address(self) -> int: ...

    def close(self) -> None: ...


class HostArena(Closing):
    """An arena in host memory: a memfd."""

    def __init__(self, size_bytes: int, label: str, huge_pages: HugePages, *, registers_read_only: bool = True) -> None:
        """Allocates without populating. Raises OutOfMemory if the kernel lacks such memory.

        Unless the GPUs can register read-only mappings (`registers_read_only`), the mapping for filling is kept for
        `register`, because the seals permit no other writable mapping later.
        """
        self.size_bytes = size_bytes
        self.huge_pages = huge_pages
        self.mapped_bytes = rounded(size_bytes, huge_pages)
        self._fd = _memfd(label, self.mapped_bytes, huge_pages)
        self._keeps_mapping = not registers_read_only
        self._is_sealed = False
        self._mapping: mmap.mmap | None = None
        self._registered: Registered | None = None
        self._lock = threading.Lock()  # registering takes long, and runs in a thread
        try:
            self._mapping = mmap.mmap(self._fd, self.mapped_bytes)
            if huge_pages is HugePages.SHMEM:
                with contextlib.suppress(OSError):  # only advice, which a kernel without transparent huge pages refuses
                    self._mapping.madvise(mmap.MADV_HUGEPAGE)
        except (OSError, ValueError) as error:
            self.close()
            raise _no_memory(self.mapped_bytes, error) from error

    @classmethod
    def adopt(cls, fd: int, size_bytes: int, huge_pages: HugePages) -> HostArena:
        """Makes an arena from the descriptor of one that an earlier daemon made and sealed, and owns the descriptor.

        It has no writable mapping, so GPUs that register no others copy from it through the staging ring. Raises
        InvalidArgument, after closing the descriptor, if it is not a sealed arena of this size.
        """
        arena = cls.__new__(cls)
        arena.size_bytes, arena.huge_pages, arena.mapped_bytes = size_bytes, huge_pages, os.fstat(fd).st_size
        arena._fd, arena._mapping, arena._registered, arena._lock = fd, None, None, threading.Lock()
        arena._keeps_mapping, arena._is_sealed = False, True
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        except OSError:
            sealed = False  # not even a memfd
        if not sealed or arena.mapped_bytes not in {rounded(size_bytes, pages) for pages in HugePages}:
            arena.close()
            raise InvalidArgument(f"the descriptor is not a sealed arena of {size_bytes} bytes")
        return arena

    @property
    def address(self) -> int:
        assert self._mapping is not None and not self._is_sealed, "sealed"
        return _address(self._mapping)

    @property
    def fd(self) -> int:
        return self._fd

    def seal(self) -> None:
        """Seals the arena, which cannot be changed afterwards."""
        if self._mapping is not None and self._keeps_mapping:
            cuda.protect(_address(self._mapping), self.mapped_bytes, is_writable=False)
        elif self._mapping is not None:
            self._mapping.close()
            self._mapping = None
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        self._is_sealed = True

    def register(self, ordinal: int) -> None:
        """Registers the arena with a GPU until `close`, so that the GPU itself can copy from it.

        Seal it first. Takes 0.05 s per GB, so call it in a thread. Raises DeviceFailed if the driver cannot.
        """
        with self._lock:
            if self._fd < 0 or self._registered is not None:
                return
            if self._keeps_mapping and self._mapping is not None:
                self._registered = cuda.WritableRegistration(ordinal, _address(self._mapping), self.mapped_bytes)
            else:
                self._registered = cuda.Registration(ordinal, self._fd, self.mapped_bytes)

    @contextmanager
    def viewed(self) -> Iterator[View]:
        if self._registered is not None:
            yield View(self._registered.address, is_registered=True)
            return
        with cuda.HostView(self._fd, self.mapped_bytes) as view:
            yield View(view.address, is_registered=False)

    def open_read_only(self) -> int:
        """Opens the memory read-only, so that the descriptor itself permits no more."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        with self._lock, contextlib.ExitStack() as stack:  # the descriptor is closed even if the driver fails
            if self._fd >= 0:
                stack.callback(os.close, self._fd)
                self._fd = -1
            if self._mapping is not None:
                stack.callback(self._mapping.close)
                self._mapping = None
            if self._registered is not None:  # before its mapping ends
                stack.callback(self._registered.close)
                self._registered = None


class CudaArena:
    """An arena in GPU memory: one exported allocation of CUDA's virtual memory management."""

    def __init__(self, ordinal: int, fd: int, size_bytes: int, mapped_bytes: int) -> None:
        """Owns the descriptor."""
        self.size_bytes = size_bytes
        self.mapped_bytes = mapped_bytes
        self._ordinal = ordinal
        self._fd = fd
        self._mapping: cuda.Mapping | None = None

    @classmethod
    def allocate(cls, ordinal: int, size_bytes: int, mapped_bytes: int) -> CudaArena:
        """Allocates device memory. Raises OutOfMemory or DeviceFailed."""
        arena = cls(ordinal, cuda.allocate(ordinal, mapped_bytes), size_bytes, mapped_bytes)
        try:
            arena._mapping = cuda.Mapping(ordinal, arena._fd, mapped_bytes, is_writable=True)
        except BaseException:
            arena.close()
            raise
        return arena

    @classmethod
    def adopt(cls, ordinal: int, fd: int, size_bytes: int, mapped_bytes: int) -> CudaArena:
        """Adopts device memory like HostArena.adopt. Raises InvalidArgument, after closing the descriptor."""
        arena = cls(ordinal, fd, size_bytes, mapped_bytes)
        try:
            with arena.viewed():  # the driver maps only whole allocations, so this proves the size
                return arena
        except (DeviceFailed, OutOfMemory) as error:
            arena.close()
            raise InvalidArgument(
                f"the descriptor is not GPU memory of {mapped_bytes} bytes: {error.message}"
            ) from None

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
        finally:  # the descriptor is closed even if the driver fails
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def rounded(size_bytes: int, huge_pages: HugePages) -> int:
    """Rounds a size up to that of an arena: whole pages, and at least one."""
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
    hint = "evict a model, or lower memory.host_budget to the memory that this machine can provide"
    return OutOfMemory(f"the kernel cannot provide {format_bytes(mapped_bytes)} for an arena: {reason}", hint=hint)
