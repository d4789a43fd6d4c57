# SPDX-License-Identifier: Apache-2.0
"""Which memories can weights live in, and how large are they?"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flashd.errors import OutOfMemory
from flashd.memory.arena import Arena, HugePages, probe_huge_pages
from flashd.units import GiB, KiB

# What the default budget leaves to the rest of the machine: engines, the desktop, the kernel.
_RESERVE_BYTES = 10 * GiB


class Device(Protocol):
    """A driver: how memory of one kind is sized and allocated."""

    @property
    def name(self) -> str: ...

    @property
    def total_bytes(self) -> int: ...

    @property
    def huge_pages(self) -> HugePages: ...

    def default_budget_bytes(self) -> int: ...

    def allocate(self, size_bytes: int, label: str) -> Arena: ...


@dataclass(frozen=True, slots=True)
class HostDevice:
    """The machine's own memory: the host tier, and the device of machines without a GPU."""

    name: str
    total_bytes: int
    huge_pages: HugePages

    @classmethod
    def probe(cls, *, use_huge_pages: bool = True) -> HostDevice:
        return cls("host", total_memory_bytes(), probe_huge_pages() if use_huge_pages else HugePages.NONE)

    def default_budget_bytes(self) -> int:
        """Half of a small machine; all but a reserve of a large one."""
        return max(self.total_bytes // 2, self.total_bytes - _RESERVE_BYTES - self.total_bytes // 10)

    def allocate(self, size_bytes: int, label: str) -> Arena:
        if self.huge_pages is HugePages.HUGETLB:
            # The reserved ones may be taken by now, by us or by others; mapping tells (hugetlbpage, admin guide).
            with contextlib.suppress(OutOfMemory):
                return Arena(size_bytes, label, HugePages.HUGETLB)
            return Arena(size_bytes, label, HugePages.SHMEM)
        return Arena(size_bytes, label, self.huge_pages)


def total_memory_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """The machine's memory, or what its control group may use of it (proc(5), cgroup v2)."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    total_bytes = int(fields["MemTotal"].split()[0]) * KiB
    try:
        return min(total_bytes, int(cgroup.read_text()))
    except (OSError, ValueError):
        return total_bytes
