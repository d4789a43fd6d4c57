# SPDX-License-Identifier: Apache-2.0
"""The checkpoints in one device's memory, and their eviction.

`acquire` loads a checkpoint and returns a hold: the arena may be used, and is not evicted, until the hold is released.
Memory is freed before any transfer begins, by evicting checkpoints without holds, least recently used first; pinned
checkpoints stay. Concurrent requests for one checkpoint share a load.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from asyncio import to_thread
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from flashd.checkpoint.files import Checkpoint
from flashd.errors import AlreadyExists, Busy, FlashdError, OutOfMemory
from flashd.memory.arena import Arena
from flashd.memory.device import Device, Kind, Tier
from flashd.memory.pool import Pool, Reservation
from flashd.memory.transfers import Progress, Region
from flashd.tasks import run_to_end
from flashd.units import format_bytes

log = logging.getLogger(__name__)

# Fills an arena with a checkpoint. Cancelling it ends the transfer before it returns.
Fill = Callable[["DeviceCache", Checkpoint, Arena, Progress], Awaitable[None]]

_recency = itertools.count(1)


class Keeper(Protocol):
    """Keeps arenas after the end of this process."""

    def keep(self, device: str, checkpoint: Checkpoint, arena: Arena) -> None: ...

    async def forget(self, device: str, checkpoint_id: str) -> None:
        """Waits until the keeper has released the memory."""


@dataclass(slots=True, eq=False)
class _Loading:
    """A running load and the callbacks of its waiters, for progress. A load without waiters is abandoned.

    With `used_at`, it evicts only checkpoints that were not used since. `room` is memory that was reserved for it.
    """

    used_at: int | None
    room: Reservation | None = None
    task: asyncio.Task[None] = field(init=False)
    waiters: list[Progress] = field(default_factory=list)


@dataclass(slots=True)
class Resident:
    """A checkpoint in memory. `waiters` of its load will hold it as soon as they run."""

    checkpoint: Checkpoint
    arena: Arena
    reservation: Reservation
    waiters: list[Progress]
    holds: int = 0
    used_at: int = 0  # a count, not a time: larger is later
    readers: set[asyncio.Future[None]] = field(default_factory=set)  # of the loads that copy from it

    @property
    def is_free(self) -> bool:
        return not self.holds and not self.waiters

    @property
    def size_bytes(self) -> int:
        return self.reservation.size_bytes


class Hold:
    """A counted right to a checkpoint's arena, which stays until `release`. `is_use`: it counts as used until then."""

    def __init__(
        self, cache: DeviceCache, checkpoint_id: str, arena: Arena, from_tier: Tier, *, is_use: bool = True
    ) -> None:
        self._cache: DeviceCache | None = cache
        self.cache = cache
        self.checkpoint_id = checkpoint_id
        self.arena = arena
        self.from_tier = from_tier
        self._is_use = is_use

    @property
    def region(self) -> Region:
        return Region(self.cache.device, self.arena)

    def release(self) -> None:
        if self._cache is not None:
            self._cache._let_go(self.checkpoint_id, is_use=self._is_use)
            self._cache = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class DeviceCache:
    """A device's memory with its pool and its checkpoints. For use on one event loop."""

    def __init__(
        self,
        device: Device,
        pool: Pool,
        fill: Fill,
        *,
        is_pinned: Callable[[str], bool],
        on_change: Callable[[str], None],
        let_down: Callable[[DeviceCache, Resident], Awaitable[None]],
        on_filled: Callable[[DeviceCache, Arena], None],
        keeper: Keeper,
    ) -> None:
        """`let_down` may first move a checkpoint that has to leave to a lower tier. `on_filled` is called when an arena
        is filled and sealed.
        """
        self.device = device
        self.pool = pool
        self._fill = fill
        self._is_pinned = is_pinned
        self._on_change = on_change
        self._let_down = let_down
        self._on_filled = on_filled
        self._keeper = keeper
        self._residents: dict[str, Resident] = {}
        self._loading: dict[str, _Loading] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()  # while making room, so that no other load takes the memory freed for this one
        self._is_stopped = False

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
        """Returns the bytes of the pool that cannot be evicted now: held, pinned, or being loaded."""
        return self.pool.used_bytes - sum(resident.size_bytes for resident in self._evictable())

    def missing_bytes(self, checkpoint: Checkpoint) -> int:
        """Returns the bytes that must be free before a checkpoint can be loaded."""
        if checkpoint.id in self._residents or checkpoint.id in self._loading:
            return 0  # already reserved, by the running load
        return self.device.rounded(checkpoint.manifest.data_bytes)

    def given_up_bytes(self, hold: Hold) -> int:
        """Returns the additional bytes that could be evicted if this hold were released."""
        resident = self._residents[hold.checkpoint_id]
        return resident.size_bytes if resident.holds == 1 and not self._is_pinned(hold.checkpoint_id) else 0

    async def acquire(
        self,
        checkpoint: Checkpoint,
        on_progress: Progress,
        *,
        from_tier: Tier,
        used_at: int | None = None,
        room: Reservation | None = None,
    ) -> Hold:
        """Holds a checkpoint's arena, which is loaded first if necessary.

        Raises OutOfMemory if it does not fit in addition to held and pinned checkpoints, and the errors of the load.
        Cancelling the call ends the load, unless other callers wait for it. With `used_at`, the checkpoint counts as
        used at that time, not now, and only checkpoints that were not used since are evicted for it. A load takes
        the memory of `room`, if that suffices, and so evicts nothing.
        """
        while checkpoint.id not in self._residents:
            await self._join_load(checkpoint, on_progress, used_at, room)
        return self._hold(self._residents[checkpoint.id], from_tier, is_use=used_at is None)

    async def borrow(self, checkpoint: Checkpoint, on_progress: Progress, *, is_use: bool) -> Hold | None:
        """Holds a checkpoint that is here or being loaded; None if it is neither. Never begins a load."""
        loading = self._loading.get(checkpoint.id)
        if loading is not None and loading.waiters:
            try:
                await self._wait_for(loading, on_progress)
            except (FlashdError, OSError):
                return None  # reported to the callers that began the load
        resident = self._residents.get(checkpoint.id)
        return self._hold(resident, Tier.STORED, is_use=is_use) if resident else None

    @contextmanager
    def reading(self, layout: str) -> Iterator[Sequence[tuple[Checkpoint, Region]]]:
        """Yields the checkpoints here with this layout, to copy from. If one is evicted meanwhile, its memory is freed,
        and counted, only afterwards.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Other layouts have little in common, and an eviction should not have to wait for them.
        residents = [found for found in self._residents.values() if found.checkpoint.manifest.layout == layout]
        for resident in residents:
            resident.readers.add(done)
        try:
            yield [(resident.checkpoint, Region(self.device, resident.arena)) for resident in residents]
        finally:
            done.set_result(None)
            for resident in residents:
                resident.readers.discard(done)

    async def claim(self, size_bytes: int) -> Reservation:
        """Reserves memory for other uses than our checkpoints, evicting as for a load. Raises OutOfMemory."""
        return await self._make_room(size_bytes, _Loading(None))

    @asynccontextmanager
    async def undisturbed(self) -> AsyncIterator[None]:
        """A context in which no load or claim makes room, so that free memory is not meant for one of them."""
        async with self._turn:
            yield

    def check_admission(self, checkpoint: Checkpoint, arena: Arena, claim: Reservation) -> None:
        """Resizes the claim for an arena to the arena's size. Call it `undisturbed` if that may be larger.

        Raises OutOfMemory if the size exceeds claim and free memory, or AlreadyExists if the checkpoint is here.
        """
        if checkpoint.id in self._residents or checkpoint.id in self._loading:
            raise AlreadyExists(f"{checkpoint.id[:12]} is on {self.name}")
        claim.resize(arena.mapped_bytes)

    def admit(self, checkpoint: Checkpoint, arena: Arena, claim: Reservation) -> Hold:
        """Takes over an arena that another process has filled in claimed memory, and holds it.

        Raises like `check_admission`; arena and claim then still belong to the caller.
        """
        self.check_admission(checkpoint, arena, claim)
        self._residents[checkpoint.id] = resident = Resident(checkpoint, arena, claim, [], used_at=next(_recency))
        self._keeper.keep(self.name, checkpoint, arena)
        return self._hold(resident, Tier.DEVICE, is_use=True)

    def adopt(self, checkpoint: Checkpoint, arena: Arena) -> None:
        """Takes over a filled arena of an earlier daemon. Raises OutOfMemory if the budget is too small."""
        reservation = self.pool.reserve(arena.mapped_bytes)  # whatever kind of pages the earlier daemon used
        self._residents[checkpoint.id] = Resident(checkpoint, arena, reservation, [], used_at=next(_recency))
        self._on_change(checkpoint.id)

    def check_free(self, checkpoint_id: str) -> None:
        """Checks that a checkpoint is not held. Raises Busy."""
        resident = self._residents.get(checkpoint_id)
        if resident is not None and not resident.is_free:
            hint = "park it, or wait until its leases end"
            raise Busy(f"its arena is in use {resident.holds + len(resident.waiters)} times", hint=hint)

    def begin_eviction(self, checkpoint_id: str) -> asyncio.Task[None] | None:
        """Begins an eviction. The task ends when the memory is free; None if it is not here. Raises Busy."""
        self.check_free(checkpoint_id)
        return self._begin_drop(checkpoint_id) if checkpoint_id in self._residents else None

    def begin_stop(self) -> None:
        """Begins to end all loads, and refuses new ones."""
        self._is_stopped = True
        for loading in self._loading.values():
            loading.task.cancel()

    async def stopped(self) -> None:
        """Waits until all transfers here have ended."""
        while tasks := {*(loading.task for loading in self._loading.values()), *self._leaving}:
            await asyncio.wait(tasks)

    def give_up(self) -> list[Arena]:
        """Removes all arenas and returns them, for the caller to close. Descriptors elsewhere keep their memory alive.

        No transfer to or from this place may be running: see `stopped`.
        """
        self.begin_stop()
        residents = list(self._residents.values())
        self._residents.clear()
        for resident in residents:
            resident.reservation.release()
        return [resident.arena for resident in residents]

    def _hold(self, resident: Resident, from_tier: Tier, *, is_use: bool) -> Hold:
        resident.holds += 1
        if is_use:
            resident.used_at = next(_recency)
        self._on_change(resident.checkpoint.id)
        return Hold(self, resident.checkpoint.id, resident.arena, from_tier, is_use=is_use)

    async def _join_load(
        self, checkpoint: Checkpoint, on_progress: Progress, used_at: int | None, room: Reservation | None
    ) -> None:
        """Waits for the running load, or begins one. The caller has to check the result, and perhaps call again."""
        loading = self._loading.get(checkpoint.id)
        if loading is None:
            loading = self._begin_load(checkpoint, used_at, room)
        elif not loading.waiters:
            await asyncio.wait([loading.task])  # an abandoned load ends, and another one begins
            return
        elif used_at is None:
            loading.used_at = None  # it is wanted now, so it may evict as much as any other load
        await self._wait_for(loading, on_progress)

    def _begin_load(self, checkpoint: Checkpoint, used_at: int | None, room: Reservation | None) -> _Loading:
        if self._is_stopped:
            raise Busy("the daemon is stopping", hint="start it again: flash start")

        def ended(task: asyncio.Task[None]) -> None:
            if self._loading.get(checkpoint.id) is loading:
                del self._loading[checkpoint.id]  # the load was cancelled before it began
            if loading.room is not None:
                loading.room.release()
            if not task.cancelled():
                task.exception()  # retrieved, because no caller may be waiting

        size_bytes = self.device.rounded(checkpoint.manifest.data_bytes)
        is_reserved = room is not None and room.size_bytes >= size_bytes
        loading = _Loading(used_at, room.split(size_bytes) if room is not None and is_reserved else None)
        self._loading[checkpoint.id] = loading
        loading.task = asyncio.create_task(self._load(checkpoint, loading), name=f"load {checkpoint.id[:12]}")
        loading.task.add_done_callback(ended)
        return loading

    async def _wait_for(self, loading: _Loading, on_progress: Progress) -> None:
        loading.waiters.append(on_progress)
        try:
            await asyncio.shield(loading.task)
        finally:
            loading.waiters.remove(on_progress)
            if not loading.waiters and not loading.task.done():
                loading.task.cancel()
                await asyncio.wait([loading.task])

    def _evictable(self) -> list[Resident]:
        """Lists the residents that may be evicted, least recently used first."""
        free = (resident for i, resident in self._residents.items() if resident.is_free and not self._is_pinned(i))
        return sorted(free, key=lambda resident: resident.used_at)

    async def _make_room(self, needed_bytes: int, loading: _Loading) -> Reservation:
        """Evicts just enough and reserves the memory; evicts nothing if all would not be enough. Raises OutOfMemory."""
        async with self._turn:
            while True:
                while self._leaving:
                    await asyncio.wait(self._leaving)
                if needed_bytes <= self.pool.free_bytes:
                    return self.pool.reserve(needed_bytes)
                used_at = loading.used_at
                candidates = [r for r in self._evictable() if used_at is None or r.used_at < used_at]
                most_bytes = self.pool.free_bytes + sum(resident.size_bytes for resident in candidates)
                if needed_bytes > most_bytes:
                    raise OutOfMemory(
                        f"{format_bytes(needed_bytes)} do not fit: of the {self.pool.name} pool's "
                        f"{format_bytes(self.pool.budget_bytes)}, {format_bytes(self.pool.budget_bytes - most_bytes)} "
                        f"are {'leased or pinned' if used_at is None else 'leased, pinned, or used since'}",
                        hint=f"park or unpin a model, end a lease, or raise {budget_setting(self.device)}",
                    )
                victim = candidates[0]
                await self._let_down(self, victim)
                if self._residents.get(victim.checkpoint.id) is victim and victim.is_free:
                    # Once begun, an eviction is completed, even if the load is cancelled.
                    await asyncio.shield(self._begin_drop(victim.checkpoint.id))

    async def _load(self, checkpoint: Checkpoint, loading: _Loading) -> None:
        arena: Arena | None = None
        reservation: Reservation | None = None
        try:
            reservation, loading.room = loading.room, None
            if reservation is None:
                reservation = await self._make_room(self.device.rounded(checkpoint.manifest.data_bytes), loading)
            arena = await self._allocate(checkpoint)
            await self._fill(self, checkpoint, arena, lambda done, total: self._tell(checkpoint.id, done, total))
            await _in_thread(arena.seal)  # in a thread, because unmapping gigabytes takes long
        except BaseException:
            if arena is not None:
                await _close(arena)
            if reservation is not None:
                reservation.release()
            del self._loading[checkpoint.id]
            raise
        used_at = next(_recency) if loading.used_at is None else loading.used_at
        del self._loading[checkpoint.id]
        self._residents[checkpoint.id] = Resident(checkpoint, arena, reservation, loading.waiters, used_at=used_at)
        self._keeper.keep(self.name, checkpoint, arena)
        self._on_filled(self, arena)
        self._on_change(checkpoint.id)

    async def _allocate(self, checkpoint: Checkpoint) -> Arena:
        made: list[Arena] = []

        def allocate() -> None:
            made.append(self.device.allocate(checkpoint.manifest.data_bytes, checkpoint.id[:12]))

        try:
            await _in_thread(allocate)
        except BaseException:
            for arena in made:  # we were cancelled meanwhile
                await _close(arena)
            raise
        return made[0]

    def _tell(self, checkpoint_id: str, done: int, total: int) -> None:
        for waiter in list(self._loading[checkpoint_id].waiters):
            waiter(done, total)

    def _let_go(self, checkpoint_id: str, *, is_use: bool) -> None:
        resident = self._residents.get(checkpoint_id)
        if resident is None:
            return  # closed
        resident.holds -= 1
        if is_use:
            resident.used_at = next(_recency)
        self._on_change(checkpoint_id)

    def _begin_drop(self, checkpoint_id: str) -> asyncio.Task[None]:
        """Begins to free a checkpoint. The pool counts its memory until it is free."""
        resident = self._residents.pop(checkpoint_id)
        task = asyncio.create_task(self._free(resident))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        self._on_change(checkpoint_id)
        return task

    async def _free(self, resident: Resident) -> None:
        """Frees a resident. Never raises, because a failure does not concern the caller that needs the memory."""
        try:
            await self._keeper.forget(self.name, resident.checkpoint.id)
        except OSError as error:
            log.warning("the keeper may not have released %s: %s", resident.checkpoint.id[:12], error)
        finally:
            while resident.readers:
                await asyncio.wait(resident.readers)
            await _close(resident.arena)
            resident.reservation.release()
            self._on_change(resident.checkpoint.id)


async def _in_thread(function: Callable[[], Any]) -> None:
    """Runs a function like to_thread, but waits for its end even when cancelled."""
    if await run_to_end(to_thread(function)):
        raise asyncio.CancelledError


async def _close(arena: Arena) -> None:
    """Closes an arena in a thread, because unmapping gigabytes takes long. Not interrupted by cancellation."""
    try:
        await _in_thread(arena.close)
    except (FlashdError, OSError) as error:
        log.error("an arena could not be closed: %s", error)
    except asyncio.CancelledError:
        pass


def budget_setting(device: Device) -> str:
    return "memory.host_budget" if device.kind in {Kind.HOST, Kind.UNIFIED} else "memory.device_budget"


class NoKeeper:
    """A keeper that keeps nothing, so that arenas end with this process."""

    def keep(self, device: str, checkpoint: Checkpoint, arena: Arena) -> None:
        pass

    async def forget(self, device: str, checkpoint_id: str) -> None:
        pass
