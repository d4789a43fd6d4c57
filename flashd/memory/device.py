# SPDX-License-Identifier: Apache-2.0
"""Which memories can weights live in, and how large are they?"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol

from flashd import cuda
from flashd.cuda import Gpu
from flashd.errors import FlashdError, OutOfMemory
from flashd.memory.arena import Arena, CudaArena, HostArena, HugePages, probe_huge_pages, rounded
from flashd.units import GiB, KiB

HOST = "host"
# What the default budget leaves to the rest of the machine: engines, the desktop, the kernel.
_HOST_RESERVE_BYTES = 10 * GiB


class Tier(StrEnum):
    STORED = "stored"
    HOST = "host"
    DEVICE = "device"


class Kind(StrEnum):
    """`unified`: a GPU whose memory is the host's. `simulated`: host memory that stands in for a GPU's."""

    HOST = "host"
    CUDA = "cuda"
    UNIFIED = "unified"
    SIMULATED = "simulated"


class Device(Protocol):
    """A driver: how memory of one kind is sized, allocated and reached by the streamer."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Kind: ...

    @property
    def total_bytes(self) -> int: ...

    @property
    def huge_pages(self) -> HugePages: ...

    @property
    def gpu(self) -> Gpu | None: ...

    @property
    def driver(self) -> Literal["host", "cuda"]:
        """Whose entry points the native streamer calls."""

    def default_budget_bytes(self) -> int: ...

    def context(self) -> int:
        """What the streamer's threads must enter; 0 where there is nothing to enter. May take half a second once."""

    def rounded(self, size_bytes: int) -> int:
        """What an arena of this size takes."""

    def allocate(self, size_bytes: int, label: str) -> Arena:
        """Raises OutOfMemory or DeviceFailed."""

    def adopt(self, fd: int, size_bytes: int) -> Arena:
        """The arena that a daemon before us made here; the descriptor is the arena's. Raises InvalidArgument."""

    def read(self, address: int, size_bytes: int) -> bytes:
        """A little of its memory, where it is mapped here."""

    def used_bytes(self) -> int:
        """What everybody uses of the whole device now, by its driver; 0 if nobody can tell."""


@dataclass(frozen=True, slots=True)
class HostDevice:
    """The machine's own memory: the host tier, and, where GPUs share it, theirs as well."""

    name: str
    total_bytes: int
    huge_pages: HugePages
    kind: Kind = Kind.HOST
    gpu: Gpu | None = None
    driver: Literal["host", "cuda"] = "host"

    @classmethod
    def probe(cls, *, use_huge_pages: bool = True) -> HostDevice:
        return cls(HOST, total_memory_bytes(), probe_huge_pages() if use_huge_pages else HugePages.NONE)

    def default_budget_bytes(self) -> int:
        """Half of a small machine; all but a reserve of a large one."""
        return max(self.total_bytes // 2, self.total_bytes - _HOST_RESERVE_BYTES - self.total_bytes // 10)

    def context(self) -> int:
        return 0

    def rounded(self, size_bytes: int) -> int:
        return rounded(size_bytes, self.huge_pages)

    def allocate(self, size_bytes: int, label: str) -> HostArena:
        if self.huge_pages is HugePages.HUGETLB:
            # The reserved ones may be taken by now, by us or by others; mapping tells (hugetlbpage, admin guide).
            with contextlib.suppress(OutOfMemory):
                return HostArena(size_bytes, label, HugePages.HUGETLB)
            return HostArena(size_bytes, label, HugePages.SHMEM)
        return HostArena(size_bytes, label, self.huge_pages)

    def adopt(self, fd: int, size_bytes: int) -> HostArena:
        return HostArena.adopt(fd, size_bytes, self.huge_pages)

    def read(self, address: int, size_bytes: int) -> bytes:
        return ctypes.string_at(address, size_bytes)

    def used_bytes(self) -> int:
        fields = memory_fields()
        return fields["MemTotal"] - fields["MemAvailable"]


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """A card with memory of its own."""

    gpu: Gpu
    reserve_bytes: int
    huge_pages: HugePages = HugePages.NONE
    kind: Kind = Kind.CUDA
    driver: Literal["host", "cuda"] = "cuda"

    @property
    def name(self) -> str:
        return self.gpu.name

    @property
    def total_bytes(self) -> int:
        return self.gpu.total_bytes

    def default_budget_bytes(self) -> int:
        return max(self.total_bytes - self.reserve_bytes, self.total_bytes // 2)

    def context(self) -> int:
        return cuda.context(self.gpu.ordinal)

    def rounded(self, size_bytes: int) -> int:
        return cuda.rounded(size_bytes)

    def allocate(self, size_bytes: int, label: str) -> CudaArena:  # noqa: ARG002 -- CUDA has no place for it
        return CudaArena.allocate(self.gpu.ordinal, size_bytes, self.rounded(size_bytes))

    def adopt(self, fd: int, size_bytes: int) -> CudaArena:
        return CudaArena.adopt(self.gpu.ordinal, fd, size_bytes, self.rounded(size_bytes))

    def read(self, address: int, size_bytes: int) -> bytes:
        return cuda.read(self.gpu.ordinal, address, size_bytes)

    def used_bytes(self) -> int:
        with contextlib.suppress(FlashdError):  # a card that has fallen off the bus must not take the objects with it
            return cuda.used_bytes(self.gpu)
        return 0


def simulated_device(total_bytes: int, host: HostDevice) -> HostDevice:
    """A card made of host memory, for developing and testing without one: same tiers, same code, other driver."""
    return HostDevice("sim:0", total_bytes, host.huge_pages, Kind.SIMULATED)


def usable(gpus: Sequence[Gpu]) -> list[Gpu]:
    """Those whose memory can be handed to other processes, which is what a device arena is."""
    return [gpu for gpu in gpus if gpu.maps_memory and gpu.exports_memory]


def total_memory_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    cgroup: Path = Path("/proc/self/cgroup"),
    hierarchy: Path = Path("/sys/fs/cgroup"),
) -> int:
    """The machine's memory, or what our control group, and those around it, may use of it (proc(5), cgroups(7)).

    A unit's MemoryMax= is its own group's limit, and its slice's may be smaller.
    """
    limits = [memory_fields(meminfo)["MemTotal"]]
    with contextlib.suppress(OSError, StopIteration):
        lines = cgroup.read_text().splitlines()
        own = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
        for group in (hierarchy / own, *(hierarchy / own).parents):
            if not group.is_relative_to(hierarchy):
                break
            with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit
                limits.append(int((group / "memory.max").read_text()))
    return min(limits)


def memory_fields(path: Path = Path("/proc/meminfo")) -> dict[str, int]:
    """The machine's memory as the kernel accounts for it, in bytes (proc(5))."""
    fields = (line.split(":", 1) for line in path.read_text().splitlines())
    return {name: int(value.split()[0]) * KiB for name, value in fields if value.strip().endswith("kB")}
