# SPDX-License-Identifier: Apache-2.0
"""The memory budgets of devices, from which arenas are reserved before any transfer."""

from __future__ import annotations

from flashd.errors import InvalidArgument, OutOfMemory
from flashd.units import format_bytes


class Pool:
    """The budget over all arenas of one device. Allocations need a reservation, which is released exactly once."""

    def __init__(self, name: str, budget_bytes: int) -> None:
        if budget_bytes <= 0:
            raise InvalidArgument(f"a budget of {budget_bytes} bytes is too small")
        self.name = name
        self.budget_bytes = budget_bytes
        self.used_bytes = 0

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self.used_bytes

    def reserve(self, size_bytes: int) -> Reservation:
        """Reserves memory. Raises OutOfMemory, with the numbers, if the budget does not suffice."""
        if size_bytes > self.free_bytes:
            raise OutOfMemory(
                f"{format_bytes(size_bytes)} do not fit: {format_bytes(self.used_bytes)} of the {self.name} pool's "
                f"{format_bytes(self.budget_bytes)} are in use",
                hint="end a lease, unpin or park a model, or raise the budget: flash config --explain memory",
            )
        self.used_bytes += size_bytes
        return Reservation(self, size_bytes)


class Reservation:
    """Bytes of a pool, until `release`."""

    def __init__(self, pool: Pool, size_bytes: int) -> None:
        self.pool = pool
        self._pool: Pool | None = pool  # None once it is released
        self.size_bytes = size_bytes

    def resize(self, size_bytes: int) -> None:
        """Resizes the reservation. Raises OutOfMemory, without any change, if the budget does not suffice."""
        assert self._pool is not None, "released"
        if size_bytes > self.size_bytes:
            self._pool.reserve(size_bytes - self.size_bytes)
        else:
            self._pool.used_bytes -= self.size_bytes - size_bytes
        self.size_bytes = size_bytes

    def split(self, size_bytes: int) -> Reservation:
        """Returns a reservation of a part of this memory, which this one has no more."""
        assert self._pool is not None and size_bytes <= self.size_bytes, "not reserved"
        self.size_bytes -= size_bytes
        return Reservation(self._pool, size_bytes)

    def release(self) -> None:
        if self._pool is not None:
            self._pool.used_bytes -= self.size_bytes
            self._pool = None
