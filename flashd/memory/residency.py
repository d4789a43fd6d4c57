# SPDX-License-Identifier: Apache-2.0
"""Residency of checkpoints: the tiers that hold them, and their moves between tiers.

Upwards (stored → host → device), a checkpoint is loaded to a device from the host tier if it is there, else from the
disk, and to the host from a device if it is there. Downwards (device → host → stored), a checkpoint that has to leave a
device moves to the host tier, if that has free memory or checkpoints not used since; one that has to leave the host
tier is dropped, because it is in the store. If a GPU shares the host's memory, both tiers are one, and nothing is ever
copied between them.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from flashd.checkpoint.files import Checkpoint
from flashd.errors import FlashdError, InvalidArgument
from flashd.memory.arena import Arena
from flashd.memory.device import HOST, Device, Kind, Tier
from flashd.memory.device_cache import DeviceCache, Hold, Keeper, NoKeeper, Resident
from flashd.memory.pool import Pool, Reservation
from flashd.memory.transfers import Mover, Progress, Region

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Memory:
    """A device, and the budget for weights in its memory."""

    device: Device
    budget_bytes: int


class Residency:
    """The tiers of one machine. For use on one event loop."""

    def __init__(
        self,
        memories: Sequence[Memory],
        mover: Mover,
        *,
        is_pinned: Callable[[str], bool] = lambda checkpoint_id: False,
        on_change: Callable[[str], None] = lambda checkpoint_id: None,
        on_host_resident: Callable[[Arena], None] = lambda arena: None,
        keeper: Keeper | None = None,
    ) -> None:
        """`memories` begins with the host's. `on_host_resident` is called for each arena of the host tier when it is
        filled and sealed.
        """
        self._mover = mover
        self._on_host_resident = on_host_resident
        # Loads that read from the store. Only these are waited for by other caches: they themselves wait for none.
        self._reading: set[tuple[DeviceCache, str]] = set()
        self._caches: dict[str, DeviceCache] = {
            memory.device.name: DeviceCache(
                memory.device,
                Pool(memory.device.name, memory.budget_bytes),
                self._fill,
                is_pinned=is_pinned,
                on_change=on_change,
                let_down=self._let_down,
                on_filled=self._filled,
                keeper=keeper or NoKeeper(),
            )
            for memory in memories
        }
        self.host = next(iter(self._caches.values()))
        gpu = self.host.device.gpu
        if self.host.device.kind is Kind.UNIFIED and gpu is not None:
            self._caches[gpu.name] = self.host

    @property
    def caches(self) -> Mapping[str, DeviceCache]:
        """Caches by device name. On unified memory two names mean one cache."""
        return self._caches

    def resolve(self, device: str) -> str:
        """Returns a device's name; `device` means the first one that is not the host. Raises InvalidArgument."""
        if device == Tier.DEVICE:
            device = next((name for name in self._caches if name != HOST), "")
            if not device:
                raise InvalidArgument("there is no GPU, and so no device tier", hint="see flash doctor for the reason")
        if device not in self._caches:
            hint = f"choose one of: {', '.join(self._caches)}"
            raise InvalidArgument(f"there is no device {device!r}", hint=hint)
        return device

    def cache(self, device: str) -> DeviceCache:
        """Finds the cache of a device. Raises InvalidArgument."""
        return self._caches[self.resolve(device)]

    def tier_of(self, *forms: str) -> Tier:
        """Returns the fastest tier that holds one of these forms: a checkpoint or its images."""
        tiers = {self._tier(cache) for cache in self._caches.values() if any(form in cache for form in forms)}
        return Tier.DEVICE if Tier.DEVICE in tiers else Tier.HOST if tiers else Tier.STORED

    def devices_of(self, *forms: str) -> list[str]:
        return [name for name, cache in self._caches.items() if any(form in cache for form in forms)]

    def holds(self, *forms: str) -> int:
        return sum(cache.holds(form) for cache in self.distinct() for form in forms)

    def in_use(self) -> Collection[str]:
        """Checkpoints that must not be deleted: held, or being loaded."""
        return {checkpoint_id for cache in self.distinct() for checkpoint_id in cache.in_use()}

    async def acquire(
        self,
        checkpoint: Checkpoint,
        on_progress: Progress = lambda done, total: None,
        *,
        device: str = HOST,
        may_evict: bool = True,
        room: Reservation | None = None,
    ) -> Hold:
        """Holds a checkpoint's arena on a device, as DeviceCache.acquire does.

        Unless it `may_evict`, the checkpoint is loaded only into free memory, and does not count as used.
        """
        from_tier, used_at = self.tier_of(checkpoint.id), None if may_evict else 0
        cache = self.cache(device)
        return await cache.acquire(checkpoint, on_progress, from_tier=from_tier, used_at=used_at, room=room)

    async def evict(self, *forms: str) -> None:
        """Evicts these forms from all memory. Raises Busy if one of them is held on any device."""
        here = [(cache, form) for cache in self.distinct() for form in forms]
        for cache, form in here:
            cache.check_free(form)
        if leaving := {task for cache, form in here if (task := cache.begin_eviction(form))}:
            await asyncio.wait(leaving)

    async def adopt(self, device: str, checkpoint: Checkpoint, fd: int) -> None:
        """Takes over an arena that an earlier daemon has filled, with its descriptor.

        Raises InvalidArgument if its contents are wrong, or OutOfMemory if the budget has become too small, after
        closing the descriptor.
        """
        cache = next((cache for cache in self.distinct() if cache.name == device), None)
        if cache is None:
            os.close(fd)
            raise InvalidArgument(
                f"there is no device {device!r}", hint="the machine or the configuration may have changed"
            )
        arena = cache.device.adopt(fd, checkpoint.manifest.data_bytes)
        try:
            if checkpoint.id in cache or not await self._mover.matches(checkpoint, Region(cache.device, arena)):
                raise InvalidArgument(f"that memory does not hold checkpoint {checkpoint.id[:12]}")
            cache.adopt(checkpoint, arena)
        except BaseException:
            arena.close()
            raise
        if cache is self.host:
            self._on_host_resident(arena)

    async def stop(self) -> None:
        """Ends all transfers and refuses new ones. Afterwards `close` is safe."""
        for cache in self.distinct():
            cache.begin_stop()
        for cache in self.distinct():
            await cache.stopped()

    def close(self) -> None:
        """Closes all arenas. Descriptors in other processes keep their memory alive."""
        for arena in self._give_up():
            arena.close()

    async def end(self) -> None:
        """Closes like `close`, in a thread, because unmapping gigabytes takes long, and calls must be answered
        meanwhile.
        """
        arenas = self._give_up()

        def close() -> None:
            for arena in arenas:
                arena.close()

        await asyncio.to_thread(close)

    def _give_up(self) -> list[Arena]:
        return [arena for cache in self.distinct() for arena in cache.give_up()]

    def distinct(self) -> list[DeviceCache]:
        """Lists each cache once, also where two names mean one."""
        return list(dict.fromkeys(self._caches.values()))

    def _tier(self, cache: DeviceCache) -> Tier:
        return Tier.HOST if cache.device.kind is Kind.HOST else Tier.DEVICE

    async def _fill(self, cache: DeviceCache, checkpoint: Checkpoint, arena: Arena, on_progress: Progress) -> None:
        target = Region(cache.device, arena)
        for other in self.distinct():
            # Weights are never copied between two GPUs, but read from the disk again.
            if other is cache or self.host not in {cache, other}:
                continue
            if checkpoint.id not in other and (other, checkpoint.id) not in self._reading:
                continue
            # A copy for the host tier is not a use on the device.
            hold = await other.borrow(checkpoint, on_progress, is_use=other is self.host)
            if hold is None:
                continue
            with hold:
                await self._mover.copy(checkpoint, hold.region, target, on_progress)
            break
        else:
            load = asyncio.current_task()
            assert load is not None
            self._reading.add((cache, checkpoint.id))  # until the whole load has ended, not only its reads
            load.add_done_callback(lambda _: self._reading.discard((cache, checkpoint.id)))
            with self.host.reading(checkpoint.manifest.layout) as residents:
                await self._mover.load(checkpoint, target, on_progress, residents=residents)

    def _filled(self, cache: DeviceCache, arena: Arena) -> None:
        if cache is self.host:
            self._on_host_resident(arena)

    async def _let_down(self, cache: DeviceCache, resident: Resident) -> None:
        """Moves a checkpoint that leaves a device to the host tier, unless that would evict one used more recently."""
        if cache is self.host or resident.checkpoint.id in self.host:
            return
        try:
            hold = await self.host.acquire(
                resident.checkpoint, lambda done, total: None, from_tier=Tier.DEVICE, used_at=resident.used_at
            )
            hold.release()
        except (FlashdError, OSError) as error:
            log.info("%s is dropped from %s: %s", resident.checkpoint.id[:12], cache.name, error)
