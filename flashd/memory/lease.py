# SPDX-License-Identifier: Apache-2.0
"""Leases: counted rights to an arena, which end with their owner's connection."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from flashd.errors import NotFound
from flashd.memory.device_cache import Hold


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease. `owner` is a bus connection, with which the lease ends; `device` is the name given in the request."""

    number: int
    model_name: str
    owner: str
    owner_uid: int
    device: str
    hold: Hold
    created_at: float

    @property
    def checkpoint_id(self) -> str:
        return self.hold.checkpoint_id

    @property
    def size_bytes(self) -> int:
        return self.hold.arena.size_bytes


class LeaseBook:
    """All leases. Calls `on_end` for each lease that ends."""

    def __init__(self, on_end: Callable[[Lease], None] = lambda lease: None) -> None:
        self._on_end = on_end
        self._leases: dict[int, Lease] = {}
        self._last_number = 0

    def add(self, model_name: str, owner: str, owner_uid: int, device: str, hold: Hold) -> Lease:
        self._last_number += 1
        lease = Lease(self._last_number, model_name, owner, owner_uid, device, hold, time.time())
        self._leases[lease.number] = lease
        return lease

    def release(self, number: int) -> None:
        """Ends a lease. Raises NotFound if it has already ended."""
        lease = self._leases.pop(number, None)
        if lease is None:
            raise NotFound(f"there is no lease {number}", hint="it may have ended")
        lease.hold.release()
        self._on_end(lease)

    def release_owner(self, owner: str) -> None:
        """Ends all leases of a closed connection."""
        for lease in [lease for lease in self._leases.values() if lease.owner == owner]:
            self.release(lease.number)

    def all(self) -> list[Lease]:
        return list(self._leases.values())
