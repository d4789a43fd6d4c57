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
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from flashd.checkpoint.files import Checkpoint
from flashd.errors import AlreadyExists, Busy, FlashdError, OutOfMemory
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


@dataclass(slots=True, eq=False)
class _Loading:
    """A load under way, and whoever waits for it, to be told of its progress. One that nobody awaits is abandoned.

    With `used_at`, it makes room only of what was not used since.
    """

    used_at: int | None
    task: asyncio.Task[None] = field(init=False)
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
    readers: set[asyncio.Future[None]] = field(default_factory=set)  # loads that copy from it, and how to wait for them

    @property
    def is_free(self) -> bool:
        return not self.holds and not self.waiters

    @property
    def size_bytes(self) -> int:
        return self.reservation.size_bytes


class Hold:
    """A counted right to a checkpoint's arena; the arena stays until `release`. `is_use`: it was used until then."""

    def __init__(self, place: Place, checkpoint_id: str, arena: Arena, from_tier: Tier, *, is_use: bool = True) -> None:
        self._place: Place | None = place
        self.place = place
        self.checkpoint_id = checkpoint_id
        self.arena = arena
        self.from_tier = from_tier
        self._is_use = is_use

    @property
    def region(self) -> Region:
        return Region(self.place.device, self.arena)

    def release(self) -> None:
        if self._place is not None:
            self._place._let_go(self.checkpoint_id, is_use=self._is_use)
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
        """What of the pool cannot be evicted now: what is held, pinned, or being loaded."""
        return self.pool.used_bytes - sum(resident.size_bytes for resident in self._evictable())

    def missing_bytes(self, checkpoint: Checkpoint) -> int:
        """The room that must be made before a checkpoint is here."""
        if checkpoint.id in self._residents or checkpoint.id in self._loading:
            return 0  # it is made already, or whoever loads it sees to it
        return self.device.rounded(checkpoint.manifest.data_bytes)

    def given_up_bytes(self, hold: Hold) -> int:
        """What could be evicted more if this hold were released."""
        resident = self._residents[hold.checkpoint_id]
        return resident.size_bytes if resident.holds == 1 and not self._is_pinned(hold.checkpoint_id) else 0

    async def acquire(
        self, checkpoint: Checkpoint, on_progress: Progress, *, from_tier: Tier, used_at: int | None = None
    ) -> Hold:
        """Holds a checkpoint's arena, loading it first if it must.

        Raises OutOfMemory if it does not fit beside what is held and pinned, and whatever the load raises. Cancelling
        the call ends the load if nobody else waits for it. With `used_at`, the checkpoint was used then, not now, and
        only what was not used since makes room for it.
        """
        while checkpoint.id not in self._residents:
            await self._join_load(checkpoint, on_progress, used_at)
        return self._hold(self._residents[checkpoint.id], from_tier, is_use=used_at is None)

    async def borrow(self, checkpoint: Checkpoint, on_progress: Progress, *, is_use: bool) -> Hold | None:
        """Holds what is here, or comes by the load under way. None if it does not: nothing is loaded for a borrower."""
        loading = self._loading.get(checkpoint.id)
        if loading is not None and loading.waiters:
            try:
                await self._wait_for(loading, on_progress)
            except (FlashdError, OSError):
                return None  # whoever asked for that load hears of it
        resident = self._residents.get(checkpoint.id)
        return self._hold(resident, Tier.STORED, is_use=is_use) if resident else None

    @contextmanager
    def reading(self, layout: str) -> Iterator[Sequence[tuple[Checkpoint, Region]]]:
        """What is here of this layout, to copy from. It may be evicted meanwhile, but its memory counts until then."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Others would have little in common, and whoever evicts one should not wait for nothing.
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
        """Room for what is no checkpoint of ours, or none yet, made as for a load. Raises OutOfMemory."""
        return await self._make_room(size_bytes, _Loading(None))

    def check_admission(self, checkpoint: Checkpoint, arena: Arena, claim: Reservation) -> None:
        """What was claimed for an arena becomes what it takes. Raises OutOfMemory if it takes more than was claimed and
        there is; AlreadyExists if the checkpoint is here."""
        if checkpoint.id in self._residents or checkpoint.id in self._loading:
            raise AlreadyExists(f"{checkpoint.id[:12]} is on {self.name}")
        claim.resize(arena.mapped_bytes)

    def admit(self, checkpoint: Checkpoint, arena: Arena, claim: Reservation) -> Hold:
        """Holds what somebody else has filled in room that was claimed for it.

        Raises as `check_admission`; arena and claim stay the caller's then.
        """
        self.check_admission(checkpoint, arena, claim)
        self._residents[checkpoint.id] = resident = Resident(checkpoint, arena, claim, [], used_at=next(_recency))
        self._keeper.keep(self.name, checkpoint, arena)
        return self._hold(resident, Tier.DEVICE, is_use=True)

    def adopt(self, checkpoint: Checkpoint, arena: Arena) -> None:
        """Takes over an arena that is filled already. Raises OutOfMemory if the budget cannot take it."""
        reservation = self.pool.reserve(arena.mapped_bytes)  # whatever pages the daemon before us had
        self._residents[checkpoint.id] = Resident(checkpoint, arena, reservation, [], used_at=next(_recency))
        self._on_change(checkpoint.id)

    def check_free(self, checkpoint_id: str) -> None:
        """Raises Busy while somebody holds it."""
        resident = self._residents.get(checkpoint_id)
        if resident is not None and not resident.is_free:
            hint = "park it, or wait until its leases end"
            raise Busy(f"its arena is in use {resident.holds + len(resident.waiters)} times", hint=hint)

    def begin_eviction(self, checkpoint_id: str) -> asyncio.Task[None] | None:
        """Away from here; the task is done when its memory is free. None if it is not here. Raises Busy."""
        self.check_free(checkpoint_id)
        return self._begin_drop(checkpoint_id) if checkpoint_id in self._residents else None

    def begin_stop(self) -> None:
        """Ends all loads, and begins none any more."""
        self._is_stopped = True
        for loading in self._loading.values():
            loading.task.cancel()

    async def stopped(self) -> None:
        """Returns when nothing moves here any more."""
        while tasks := {*(loading.task for loading in self._loading.values()), *self._leaving}:
            await asyncio.wait(tasks)

    def give_up(self) -> list[Arena]:
        """Lets go of all arenas, which are the caller's to close. Descriptors handed out, and kept by the keeper, keep
        what they name.

        Nothing may move any more, here or from here elsewhere: see `stopped`.
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

    async def _join_load(self, checkpoint: Checkpoint, on_progress: Progress, used_at: int | None) -> None:
        """Waits for the load under way, or for one that it begins; the caller looks again whether that helped."""
        loading = self._loading.get(checkpoint.id)
        if loading is None:
            loading = self._begin_load(checkpoint, used_at)
        elif not loading.waiters:
            await asyncio.wait([loading.task])  # abandoned: it ends, and another one begins
            return
        elif used_at is None:
            loading.used_at = None  # it is wanted now: it may make as much room as any other
        await self._wait_for(loading, on_progress)

    def _begin_load(self, checkpoint: Checkpoint, used_at: int | None) -> _Loading:
        if self._is_stopped:
            raise Busy("the daemon is stopping", hint="start it again: flash start")

        def ended(task: asyncio.Task[None]) -> None:
            if self._loading.get(checkpoint.id) is loading:
                del self._loading[checkpoint.id]  # it was cancelled before it began
            if not task.cancelled():
                task.exception()  # looked at, though nobody may wait for it any more

        loading = self._loading[checkpoint.id] = _Loading(used_at)
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
        """Least recently used first."""
        free = (resident for i, resident in self._residents.items() if resident.is_free and not self._is_pinned(i))
        return sorted(free, key=lambda resident: resident.used_at)

    async def _make_room(self, needed_bytes: int, loading: _Loading) -> Reservation:
        """Evicts just enough, or, if even that is not enough, nothing."""
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
                    # Once begun it is done to its end, whoever is cancelled.
                    await asyncio.shield(self._begin_drop(victim.checkpoint.id))

    async def _load(self, checkpoint: Checkpoint, loading: _Loading) -> None:
        arena: Arena | None = None
        reservation: Reservation | None = None
        try:
            reservation = await self._make_room(self.device.rounded(checkpoint.manifest.data_bytes), loading)
            arena = await self._allocate(checkpoint)
            await self._fill(self, checkpoint, arena, lambda done, total: self._tell(checkpoint.id, done, total))
            await _in_thread(arena.seal)  # unmapping gigabytes takes a while
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
        """The ledger counts the memory until it is free."""
        resident = self._residents.pop(checkpoint_id)
        task = asyncio.create_task(self._free(resident))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        self._on_change(checkpoint_id)
        return task

    async def _free(self, resident: Resident) -> None:
        """Raises nothing: whoever needs the room has no part in what fails here."""
        try:
            await self._keeper.forget(self.name, resident.checkpoint.id)
        except OSError as error:
            log.warning("%s may be kept beyond us: %s", resident.checkpoint.id[:12], error)
        finally:
            while resident.readers:
                await asyncio.wait(resident.readers)
            await _close(resident.arena)
            resident.reservation.release()
            self._on_change(resident.checkpoint.id)


async def _in_thread(function: Callable[[], Any]) -> None:
    """As to_thread, but awaited to its end: whoever is cancelled hears of it when the thread has done its work."""
    task = asyncio.ensure_future(to_thread(function))
    is_cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            is_cancelled = True
    task.result()
    if is_cancelled:
        raise asyncio.CancelledError


async def _close(arena: Arena) -> None:
    """In a thread: unmapping gigabytes takes a while. A cancel changes nothing of it, and is for others to obey."""
    try:
        await _in_thread(arena.close)
    except (FlashdError, OSError) as error:
        log.error("an arena could not be closed: %s", error)
    except asyncio.CancelledError:
        pass


def budget_setting(device: Device) -> str:
    return "memory.host_budget" if device.kind in {Kind.HOST, Kind.UNIFIED} else "memory.device_budget"


class NoKeeper:
    """Arenas end with this process."""

    def keep(self, device: str, checkpoint: Checkpoint, arena: Arena) -> None:
        pass

    async def forget(self, device: str, checkpoint_id: str) -> None:
        pass
