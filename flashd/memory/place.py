# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints are on one device now, and who must make room?

`acquire` brings a checkpoint here and holds it; whoever holds it may use its arena, and it is not evicted meanwhile.
Room is made before any byte moves, by evicting what nobody holds, least recently used first; pinned checkpoints stay.
Loads of one checkpoint asked for twice are one load.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from asyncio import to_thread
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from flashd.checkpoint.files import Checkpoint
from flashd.errors import Busy, OutOfMemory
from flashd.memory.arena import Arena
from flashd.memory.device import Device, Kind, Tier
from flashd.memory.moving import Progress, Region
from flashd.memory.pool import Pool, Reservation
from flashd.units import format_bytes

log = logging.getLogger(__name__)

# Fills an arena with a checkpoint; cancelling it ends the transfer before it returns.
Fill = Callable[["Place", Checkpoint, Arena, Progress], Awaitable[None]]

_recency = itertools.count(1)


class Keeper(Protocol):
    """Whoever keeps arenas beyond this process."""

    def keep(self, device: str, checkpoint: Checkpoint, arena: Arena) -> None: ...

    async def forget(self, device: str, checkpoint_id: str) -> None:
        """Returns when it has let go of the memory."""


@dataclass(slots=True)
class _Loading:
    """A load under way, and whoever waits for it, to be told of its progress. One that nobody awaits is abandoned."""

    task: asyncio.Task[None]
    waiters: list[Progress] = field(default_factory=list)


@dataclass(slots=True)
class Resident:
    """A checkpoint that is here. `waiters` are of the load that brought it: they will hold it as soon as they run."""

    checkpoint: Checkpoint
    arena: Arena
    reservation: Reservation
    waiters: list[Progress]
    holds: int = 0
    used_at: int = 0  # a count, not a time: larger is later

    @property
    def is_free(self) -> bool:
        return not self.holds and not self.waiters

    @property
    def size_bytes(self) -> int:
        return self.reservation.size_bytes


class Hold:
    """A counted right to a checkpoint's arena; the arena stays until `release`."""

    def __init__(self, place: Place, checkpoint_id: str, arena: Arena, from_tier: Tier) -> None:
        self._place: Place | None = place
        self.place = place
        self.checkpoint_id = checkpoint_id
        self.arena = arena
        self.from_tier = from_tier

    @property
    def region(self) -> Region:
        return Region(self.place.device, self.arena)

    def release(self) -> None:
        if self._place is not None:
            self._place._let_go(self.checkpoint_id)
            self._place = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Place:
    """One device's memory, its ledger, and what is in it. All calls on one event loop."""

    def __init__(
        self,
        device: Device,
        pool: Pool,
        fill: Fill,
        *,
        is_pinned: Callable[[str], bool],
        on_change: Callable[[str], None],
        let_down: Callable[[Place, Resident], Awaitable[None]],
        keeper: Keeper,
    ) -> None:
        """`let_down` may bring a checkpoint that must leave to a lower tier first."""
        self.device = device
        self.pool = pool
        self._fill = fill
        self._is_pinned = is_pinned
        self._on_change = on_change
        self._let_down = let_down
        self._keeper = keeper
        self._residents: dict[str, Resident] = {}
        self._loading: dict[str, _Loading] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()  # to make room: nobody takes what was freed for somebody else

    @property
    def name(self) -> str:
        return self.device.name

    def __contains__(self, checkpoint_id: str) -> bool:
        return checkpoint_id in self._residents

    def residents(self) -> Collection[Resident]:
        return self._residents.values()

    def holds(self, checkpoint_id: str) -> int:
        resident = self._residents.get(checkpoint_id)
        return resident.holds if resident else 0

    def in_use(self) -> Collection[str]:
        """Checkpoints that must not be deleted: held, or being loaded."""
        return {i for i, resident in self._residents.items() if not resident.is_free} | self._loading.keys()

    def fixed_bytes(self) -> int:
        """What of the pool cannot be evicted now: what is held, pinned, or being loaded."""
        return self.pool.used_bytes - sum(resident.size_bytes for resident in self._evictable())

    def fits_without(self, checkpoint: Checkpoint, hold: Hold) -> bool:
        """Whether a checkpoint would fit if this hold were given up."""
        resident = self._residents[hold.checkpoint_id]
        given_up_bytes = resident.size_bytes if resident.holds == 1 and not self._is_pinned(hold.checkpoint_id) else 0
        return self._needed_bytes(checkpoint) <= self.pool.budget_bytes - self.fixed_bytes() + given_up_bytes

    async def acquire(
        self, checkpoint: Checkpoint, on_progress: Progress, *, from_tier: Tier, used_at: int | None = None
    ) -> Hold:
        """Holds a checkpoint's arena, loading it first if it must.

        Raises OutOfMemory if it does not fit beside what is held and pinned, and whatever the load raises. Cancelling
        the call ends the load if nobody else waits for it. With `used_at`, the checkpoint was used then, and only
        what was not used since makes room for it.
        """
        while checkpoint.id not in self._residents:
            await self._join_load(checkpoint, on_progress, used_at)
        resident = self._residents[checkpoint.id]
        resident.holds += 1
        resident.used_at = used_at or next(_recency)
        self._on_change(checkpoint.id)
        return Hold(self, checkpoint.id, resident.arena, from_tier)

    def adopt(self, checkpoint: Checkpoint, arena: Arena) -> None:
        """Takes over an arena that is filled already. Raises OutOfMemory if the budget cannot take it."""
        reservation = self.pool.reserve(self._needed_bytes(checkpoint))
        self._residents[checkpoint.id] = Resident(checkpoint, arena, reservation, [], used_at=next(_recency))
        self._on_change(checkpoint.id)

    async def evict(self, checkpoint_id: str) -> None:
        """Away from here. Raises Busy while somebody holds it."""
        resident = self._residents.get(checkpoint_id)
        if resident is None:
            return
        if not resident.is_free:
            hint = "park it, or wait until its leases end"
            raise Busy(f"its arena is in use {resident.holds + len(resident.waiters)} times", hint=hint)
        await self._drop(checkpoint_id)

    def close(self) -> None:
        """Lets go of all memory. Descriptors handed out, and kept by the keeper, keep what they name."""
        for loading in self._loading.values():
            loading.task.cancel()
        for checkpoint_id, resident in list(self._residents.items()):
            del self._residents[checkpoint_id]
            resident.arena.close()
            resident.reservation.release()

    async def _join_load(self, checkpoint: Checkpoint, on_progress: Progress, used_at: int | None) -> None:
        """Waits for the load under way, or for one that it begins; the caller looks again whether that helped."""
        loading = self._loading.get(checkpoint.id)
        if loading is None:
            task = asyncio.create_task(self._load(checkpoint, used_at), name=f"load {checkpoint.id[:12]}")
            loading = self._loading[checkpoint.id] = _Loading(task)
        elif not loading.waiters:
            await asyncio.wait([loading.task])  # abandoned: it ends, and another one begins
            return
        loading.waiters.append(on_progress)
        try:
            await asyncio.shield(loading.task)
        finally:
            loading.waiters.remove(on_progress)
            if not loading.waiters and not loading.task.done():
                loading.task.cancel()
                await asyncio.wait([loading.task])

    def _evictable(self) -> list[Resident]:
        """Least recently used first."""
        free = (resident for i, resident in self._residents.items() if resident.is_free and not self._is_pinned(i))
        return sorted(free, key=lambda resident: resident.used_at)

    def _needed_bytes(self, checkpoint: Checkpoint) -> int:
        return self.device.rounded(checkpoint.manifest.data_bytes)

    async def _make_room(self, needed_bytes: int, used_at: int | None) -> Reservation:
        """Evicts just enough, or, if even that is not enough, nothing."""
        async with self._turn:
            while True:
                while self._leaving:
                    await asyncio.wait(self._leaving)
                if needed_bytes <= self.pool.free_bytes:
                    return self.pool.reserve(needed_bytes)
                candidates = [r for r in self._evictable() if used_at is None or r.used_at < used_at]
                most_bytes = self.pool.free_bytes + sum(resident.size_bytes for resident in candidates)
                if needed_bytes > most_bytes:
                    raise OutOfMemory(
                        f"{format_bytes(needed_bytes)} do not fit: of the {self.pool.name} pool's "
                        f"{format_bytes(self.pool.budget_bytes)}, {format_bytes(self.pool.budget_bytes - most_bytes)} "
                        "are leased or pinned",
                        hint=f"park or unpin a model, end a lease, or raise {budget_setting(self.device)}",
                    )
                victim = candidates[0]
                await self._let_down(self, victim)
                if self._residents.get(victim.checkpoint.id) is victim and victim.is_free:
                    await self._drop(victim.checkpoint.id)

    async def _load(self, checkpoint: Checkpoint, used_at: int | None) -> None:
        arena: Arena | None = None
        reservation: Reservation | None = None
        try:
            reservation = await self._make_room(self._needed_bytes(checkpoint), used_at)
            arena = await to_thread(self.device.allocate, checkpoint.manifest.data_bytes, checkpoint.id[:12])
            await self._fill(self, checkpoint, arena, lambda done, total: self._tell(checkpoint.id, done, total))
            arena.seal()
        except BaseException:
            if arena is not None:
                arena.close()
            if reservation is not None:
                reservation.release()
            del self._loading[checkpoint.id]
            raise
        self._residents[checkpoint.id] = Resident(
            checkpoint, arena, reservation, self._loading.pop(checkpoint.id).waiters, used_at=next(_recency)
        )
        self._keeper.keep(self.name, checkpoint, arena)
        self._on_change(checkpoint.id)

    def _tell(self, checkpoint_id: str, done: int, total: int) -> None:
        for waiter in list(self._loading[checkpoint_id].waiters):
            waiter(done, total)

    def _let_go(self, checkpoint_id: str) -> None:
        resident = self._residents.get(checkpoint_id)
        if resident is None:
            return  # closed
        resident.holds -= 1
        resident.used_at = next(_recency)
        self._on_change(checkpoint_id)

    async def _drop(self, checkpoint_id: str) -> None:
        """Once begun it is done to its end, whoever is cancelled; the ledger counts the memory until it is free."""
        resident = self._residents.pop(checkpoint_id)
        task = asyncio.create_task(self._free(resident))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        self._on_change(checkpoint_id)
        await asyncio.shield(task)

    async def _free(self, resident: Resident) -> None:
        try:
            await self._keeper.forget(self.name, resident.checkpoint.id)
            await to_thread(resident.arena.close)  # unmapping gigabytes takes a while
        finally:
            resident.reservation.release()
            self._on_change(resident.checkpoint.id)


def budget_setting(device: Device) -> str:
    return "memory.host_budget" if device.kind in {Kind.HOST, Kind.UNIFIED} else "memory.device_budget"


class NoKeeper:
    """Arenas end with this process."""

    def keep(self, device: str, checkpoint: Checkpoint, arena: Arena) -> None:
        pass

    async def forget(self, device: str, checkpoint_id: str) -> None:
        pass
