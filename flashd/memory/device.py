# SPDX-License-Identifier: Apache-2.0
"""The devices whose memory can hold weights, and the sizes of their memory."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol

from flashd.errors import FlashdError, OutOfMemory
from flashd.io import cuda
from flashd.io.cuda import Gpu
from flashd.memory.arena import Arena, CudaArena, HostArena, HugePages, probe_huge_pages, rounded
from flashd.units import GiB, KiB

HOST = "host"
# Memory that the default budget leaves to engines, the desktop and the kernel.
_HOST_RESERVE_BYTES = 10 * GiB


class Tier(StrEnum):
    STORED = "stored"
    HOST = "host"
    DEVICE = "device"


class Kind(StrEnum):
    """Kind of device. `unified`: a GPU that uses the host's memory. `simulated`: host memory in place of a GPU's."""

    HOST = "host"
    CUDA = "cuda"
    UNIFIED = "unified"
    SIMULATED = "simulated"


class Device(Protocol):
    """The driver of a device, which sizes and allocates its memory, and connects the streamer to it."""

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
        """The driver whose entry points the native streamer calls."""

    def default_budget_bytes(self) -> int: ...

    def context(self) -> int:
        """Returns the context that the streamer's threads must enter; 0 for none. The first call may take 0.5 s."""

    def rounded(self, size_bytes: int) -> int:
        """Rounds a size up to that of an arena."""

    def allocate(self, size_bytes: int, label: str) -> Arena:
        """Allocates an arena. Raises OutOfMemory or DeviceFailed."""

    def adopt(self, fd: int, size_bytes: int) -> Arena:
        """Adopts an arena that an earlier daemon made on this device, with its descriptor. Raises InvalidArgument."""

    def read(self, address: int, size_bytes: int) -> bytes:
        """Reads a little of its memory at an address mapped here."""

    def used_bytes(self) -> int:
        """Returns the bytes that all processes use now, as its driver counts; 0 if unknown."""


@dataclass(frozen=True, slots=True)
class HostDevice:
    """The machine's own memory: the host tier, and, if GPUs share it, also the device tier."""

    name: str
    total_bytes: int
    huge_pages: HugePages
    kind: Kind = Kind.HOST
    gpu: Gpu | None = None
    driver: Literal["host", "cuda"] = "host"
    registers_read_only: bool = True  # whether its GPUs can register read-only mappings

    @classmethod
    def probe(cls, *, use_huge_pages: bool = True) -> HostDevice:
        return cls(HOST, total_memory_bytes(), probe_huge_pages() if use_huge_pages else HugePages.NONE)

    def default_budget_bytes(self) -> int:
        """Half the memory of a small machine; all but a reserve of a large one's."""
        return max(self.total_bytes // 2, self.total_bytes - _HOST_RESERVE_BYTES - self.total_bytes // 10)

    def context(self) -> int:
        return 0

    def rounded(self, size_bytes: int) -> int:
        return rounded(size_bytes, self.huge_pages)

    def allocate(self, size_bytes: int, label: str) -> HostArena:
        if self.huge_pages is HugePages.HUGETLB:
            # The reserved pages may be in use by now; mapping tells (hugetlbpage, admin guide).
            with contextlib.suppress(OutOfMemory):
                return self._arena(size_bytes, label, HugePages.HUGETLB)
            return self._arena(size_bytes, label, HugePages.SHMEM)
        return self._arena(size_bytes, label, self.huge_pages)

    def _arena(self, size_bytes: int, label: str, huge_pages: HugePages) -> HostArena:
        return HostArena(size_bytes, label, huge_pages, registers_read_only=self.registers_read_only)

    def adopt(self, fd: int, size_bytes: int) -> HostArena:
        return HostArena.adopt(fd, size_bytes, self.huge_pages)

    def read(self, address: int, size_bytes: int) -> bytes:
        return ctypes.string_at(address, size_bytes)

    def used_bytes(self) -> int:
        fields = memory_fields()
        return fields["MemTotal"] - fields["MemAvailable"]


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """A GPU with its own memory."""

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

    def allocate(self, size_bytes: int, label: str) -> CudaArena:  # noqa: ARG002 -- CUDA allocations have no labels
        return CudaArena.allocate(self.gpu.ordinal, size_bytes, self.rounded(size_bytes))

    def adopt(self, fd: int, size_bytes: int) -> CudaArena:
        return CudaArena.adopt(self.gpu.ordinal, fd, size_bytes, self.rounded(size_bytes))

    def read(self, address: int, size_bytes: int) -> bytes:
        return cuda.read(self.gpu.ordinal, address, size_bytes)

    def used_bytes(self) -> int:
        with contextlib.suppress(FlashdError):  # a card that fell off the PCI bus must not break the bus objects
            return cuda.used_bytes(self.gpu)
        return 0


def simulated_device(total_bytes: int, host: HostDevice) -> HostDevice:
    """Returns a GPU simulated in host memory, for development and tests: same tiers, same code, another driver."""
    return HostDevice("sim:0", total_bytes, host.huge_pages, Kind.SIMULATED)


def usable(gpus: Sequence[Gpu]) -> list[Gpu]:
    """Selects the GPUs whose memory can be shared with other processes, as device arenas require."""
    return [gpu for gpu in gpus if gpu.maps_memory and gpu.exports_memory]


def total_memory_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    cgroup: Path = Path("/proc/self/cgroup"),
    hierarchy: Path = Path("/sys/fs/cgroup"),
) -> int:
    """Returns the machine's memory, or the limit of our control group or its ancestors (proc(5), cgroups(7)).

    MemoryMax= of a unit limits the unit's own group; that of its slice may be smaller.
    """
    limits = [memory_fields(meminfo)["MemTotal"]]
    with contextlib.suppress(OSError, StopIteration):
        lines = cgroup.read_text().splitlines()
        own = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
        for group in (hierarchy / own, *(hierarchy / own).parents):
            if not group.is_relative_to(hierarchy):
                break
            with contextlib.suppress(OSError, ValueError):  # "max" is not a number, and means no limit
                limits.append(int((group / "memory.max").read_text()))
    return min(limits)


def memory_fields(path: Path = Path("/proc/meminfo")) -> dict[str, int]:
    """Returns the kernel's accounting of memory, in bytes (proc(5))."""
    fields = (line.split(":", 1) for line in path.read_text().splitlines())
    return {name: int(value.split()[0]) * KiB for name, value in fields if value.strip().endswith("kB")}
