# SPDX-License-Identifier: Apache-2.0
"""Where are the bytes of each checkpoint now, and who must make room?

A checkpoint is `stored` or in the `host` tier. `acquire` brings it there and holds it; whoever holds it may use its
arena, and it is not evicted meanwhile. Room is made before any byte moves, by evicting what nobody holds, least
recently used first; pinned checkpoints stay. Loads of one checkpoint asked for twice are one load.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

from flashd.checkpoint.files import Checkpoint
from flashd.errors import Busy, OutOfMemory
from flashd.memory.arena import Arena, rounded
from flashd.memory.device import Device
from flashd.memory.pool import Pool, Reservation
from flashd.streamer import OpenFile, Options, Read, TransferResult, load
from flashd.units import format_bytes

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_POLL_S = 0.02


class Tier(StrEnum):
    STORED = "stored"
    HOST = "host"


class Loader(Protocol):
    """Fills an arena with a checkpoint. Cancelling the coroutine ends the transfer before it returns."""

    def __call__(self, checkpoint: Checkpoint, arena: Arena, on_progress: Progress) -> Awaitable[None]: ...


@dataclass(slots=True)
class _Loading:
    """A load under way, and whoever waits for it, to be told of its progress. One that nobody awaits is abandoned."""

    task: asyncio.Task[None]
    reservation: Reservation
    waiters: list[Progress] = field(default_factory=list)


@dataclass(slots=True)
class _Resident:
    arena: Arena
    loading: _Loading  # what brought it here; its waiters will hold it as soon as they run
    holds: int = 0

    @property
    def is_free(self) -> bool:
        return not self.holds and not self.loading.waiters

    @property
    def size_bytes(self) -> int:
        return self.loading.reservation.size_bytes


class Hold:
    """A counted right to a checkpoint's arena; the arena stays until `release`."""

    def __init__(self, residency: Residency, checkpoint_id: str, arena: Arena, from_tier: Tier) -> None:
        self._residency: Residency | None = residency
        self.checkpoint_id = checkpoint_id
        self.arena = arena
        self.from_tier = from_tier

    def release(self) -> None:
        if self._residency is not None:
            self._residency._let_go(self.checkpoint_id)
            self._residency = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Residency:
    """The host tier of one machine. All calls on one event loop."""

    def __init__(
        self,
        device: Device,
        pool: Pool,
        loader: Loader,
        *,
        is_pinned: Callable[[str], bool] = lambda checkpoint_id: False,
        on_change: Callable[[str], None] = lambda checkpoint_id: None,
    ) -> None:
        self.device = device
        self.pool = pool
        self._loader = loader
        self._is_pinned = is_pinned
        self._on_change = on_change
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._loading: dict[str, _Loading] = {}

    def tier_of(self, checkpoint_id: str) -> Tier:
        return Tier.HOST if checkpoint_id in self._residents else Tier.STORED

    def holds(self, checkpoint_id: str) -> int:
        resident = self._residents.get(checkpoint_id)
        return resident.holds if resident else 0

    def in_use(self) -> Collection[str]:
        """Checkpoints that must not be deleted: held, or being loaded."""
        return {i for i, resident in self._residents.items() if not resident.is_free} | self._loading.keys()

    def fixed_bytes(self) -> int:
        """What of the pool cannot be evicted now: what is held, pinned, or being loaded."""
        return self.pool.used_bytes - sum(self._residents[i].size_bytes for i in self._evictable())

    def fits_without(self, checkpoint: Checkpoint, hold: Hold) -> bool:
        """Whether a checkpoint would fit if this hold were given up."""
        resident = self._residents[hold.checkpoint_id]
        given_up_bytes = resident.size_bytes if resident.holds == 1 and not self._is_pinned(hold.checkpoint_id) else 0
        return self._needed_bytes(checkpoint) <= self.pool.budget_bytes - self.fixed_bytes() + given_up_bytes

    async def acquire(self, checkpoint: Checkpoint, on_progress: Progress = lambda done, total: None) -> Hold:
        """Holds a checkpoint's arena, loading it first if it must.

        Raises OutOfMemory if it does not fit beside what is held and pinned, and whatever the load raises. Cancelling
        the call ends the load if nobody else waits for it.
        """
        from_tier = self.tier_of(checkpoint.id)
        while checkpoint.id not in self._residents:
            await self._join_load(checkpoint, on_progress)
        resident = self._residents[checkpoint.id]
        self._residents.move_to_end(checkpoint.id)
        resident.holds += 1
        self._on_change(checkpoint.id)
        return Hold(self, checkpoint.id, resident.arena, from_tier)

    def evict(self, checkpoint_id: str) -> None:
        """Back to `stored`. Raises Busy while somebody holds it."""
        resident = self._residents.get(checkpoint_id)
        if resident is None:
            return
        if not resident.is_free:
            hint = "park it, or wait until its leases end"
            raise Busy(f"its arena is in use {resident.holds + len(resident.loading.waiters)} times", hint=hint)
        self._drop(checkpoint_id)

    def close(self) -> None:
        """Gives all memory back. Descriptors handed out keep what they name."""
        for loading in self._loading.values():
            loading.task.cancel()
        for checkpoint_id in list(self._residents):
            self._drop(checkpoint_id)

    async def _join_load(self, checkpoint: Checkpoint, on_progress: Progress) -> None:
        """Waits for the load under way, or for one that it begins; the caller looks again whether that helped."""
        loading = self._loading.get(checkpoint.id)
        if loading is None:
            reservation = self._make_room(checkpoint)
            task = asyncio.create_task(self._load(checkpoint), name=f"load {checkpoint.id[:12]}")
            loading = self._loading[checkpoint.id] = _Loading(task, reservation)
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

    def _evictable(self) -> list[str]:
        """Least recently used first."""
        return [i for i, resident in self._residents.items() if resident.is_free and not self._is_pinned(i)]

    def _needed_bytes(self, checkpoint: Checkpoint) -> int:
        return rounded(checkpoint.manifest.data_bytes, self.device.huge_pages)

    def _make_room(self, checkpoint: Checkpoint) -> Reservation:
        """Evicts just enough, or, if even that is not enough, nothing."""
        needed_bytes = self._needed_bytes(checkpoint)
        fixed_bytes = self.fixed_bytes()
        if needed_bytes > self.pool.budget_bytes - fixed_bytes:
            raise OutOfMemory(
                f"{format_bytes(needed_bytes)} do not fit: of the {self.pool.name} pool's "
                f"{format_bytes(self.pool.budget_bytes)}, {format_bytes(fixed_bytes)} are leased or pinned",
                hint=f"park or unpin a model, end a lease, or raise memory.{self.pool.name}_budget",
            )
        for checkpoint_id in self._evictable():
            if needed_bytes <= self.pool.free_bytes:
                break
            self._drop(checkpoint_id)
        return self.pool.reserve(needed_bytes)

    async def _load(self, checkpoint: Checkpoint) -> None:
        arena: Arena | None = None
        try:
            arena = self.device.allocate(checkpoint.manifest.data_bytes, checkpoint.id[:12])
            await self._loader(checkpoint, arena, lambda done, total: self._tell(checkpoint.id, done, total))
            arena.seal()
        except BaseException:
            if arena is not None:
                arena.close()
            self._loading.pop(checkpoint.id).reservation.release()
            raise
        self._residents[checkpoint.id] = _Resident(arena, self._loading.pop(checkpoint.id))
        self._on_change(checkpoint.id)

    def _tell(self, checkpoint_id: str, done: int, total: int) -> None:
        for waiter in list(self._loading[checkpoint_id].waiters):
            waiter(done, total)

    def _let_go(self, checkpoint_id: str) -> None:
        self._residents[checkpoint_id].holds -= 1
        self._on_change(checkpoint_id)

    def _drop(self, checkpoint_id: str) -> None:
        resident = self._residents.pop(checkpoint_id)
        resident.arena.close()
        resident.loading.reservation.release()
        self._on_change(checkpoint_id)


class StreamLoader:
    """The loader of the product: the native streamer, straight into the arena."""

    def __init__(
        self, options: Options, *, verify: bool, on_loaded: Callable[[Checkpoint, TransferResult], None]
    ) -> None:
        self._options = options
        self._verify = verify
        self._on_loaded = on_loaded

    async def __call__(self, checkpoint: Checkpoint, arena: Arena, on_progress: Progress) -> None:
        extent = checkpoint.extent
        if not extent.length:
            return
        digests = checkpoint.digests() if self._verify else None
        with checkpoint.weights_path.open("rb") as file:
            transfer = load(
                [OpenFile(file.fileno(), str(checkpoint.weights_path))],
                [Read(0, extent.offset, 0, extent.length)],
                address=arena.address,
                size_bytes=arena.mapped_bytes,
                options=self._options,
                digests=digests,
                populate=True,
            )
            ended = asyncio.get_running_loop().run_in_executor(None, transfer.wait)
            try:
                while not ended.done():
                    on_progress(transfer.done_bytes, transfer.total_bytes)
                    await asyncio.wait({ended}, timeout=_POLL_S)
            finally:
                transfer.cancel()  # of no effect on one that has ended
                await _outlast(ended)
            self._on_loaded(checkpoint, ended.result())
            on_progress(transfer.total_bytes, transfer.total_bytes)


async def _outlast(ended: asyncio.Future[TransferResult]) -> None:
    """Waits whatever happens: file and memory must outlive what is in flight, however often we are cancelled."""
    while not ended.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({ended})
    ended.exception()  # looked at, though nobody may want it
