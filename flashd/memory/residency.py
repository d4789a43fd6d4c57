# SPDX-License-Identifier: Apache-2.0
"""Where are the bytes of each checkpoint now, and how do they move between the tiers?

stored → host → device: a checkpoint comes to a device from the host tier if it is there, else from the disk; to the
host from a device if it is there. device → host → stored: what must leave a device goes to the host tier, if that has
room or something that was not used since; what must leave the host tier is dropped, for the store has it. On a machine
whose GPU shares the host's memory both tiers are one, and nothing is ever copied between them.
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
from flashd.memory.moving import Mover, Progress, Region
from flashd.memory.place import Hold, Keeper, NoKeeper, Place, Resident
from flashd.memory.pool import Pool

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Memory:
    """A device and how much of it weights may take."""

    device: Device
    budget_bytes: int


class Residency:
    """All tiers of one machine. All calls on one event loop."""

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
        """The first memory is the host's. `on_host_resident` hears of arenas of the host tier as they come."""
        self._mover = mover
        self._on_host_resident = on_host_resident
        # Loads that read from the store. Only these are waited for by other places: they themselves wait for none.
        self._reading: set[tuple[Place, str]] = set()
        self._places: dict[str, Place] = {
            memory.device.name: Place(
                memory.device,
                Pool(memory.device.name, memory.budget_bytes),
                self._fill,
                is_pinned=is_pinned,
                on_change=on_change,
                let_down=self._let_down,
                keeper=keeper or NoKeeper(),
            )
            for memory in memories
        }
        self.host = next(iter(self._places.values()))
        gpu = self.host.device.gpu
        if self.host.device.kind is Kind.UNIFIED and gpu is not None:
            self._places[gpu.name] = self.host

    @property
    def places(self) -> Mapping[str, Place]:
        """By device name; on unified memory two names mean one place."""
        return self._places

    def resolve(self, device: str) -> str:
        """A device's name; `device` alone means the first that is not the host. Raises InvalidArgument."""
        if device == Tier.DEVICE:
            device = next((name for name in self._places if name != HOST), "")
            if not device:
                raise InvalidArgument("there is no GPU here, and so no device tier", hint="flash doctor says why")
        if device not in self._places:
            hint = f"there is: {', '.join(self._places)}"
            raise InvalidArgument(f"there is no device {device!r} here", hint=hint)
        return device

    def place(self, device: str) -> Place:
        """Raises InvalidArgument."""
        return self._places[self.resolve(device)]

    def tier_of(self, *forms: str) -> Tier:
        """The best tier that has one of these: a checkpoint, its images."""
        tiers = {self._tier(place) for place in self._places.values() if any(form in place for form in forms)}
        return Tier.DEVICE if Tier.DEVICE in tiers else Tier.HOST if tiers else Tier.STORED

    def devices_of(self, *forms: str) -> list[str]:
        return [name for name, place in self._places.items() if any(form in place for form in forms)]

    def holds(self, *forms: str) -> int:
        return sum(place.holds(form) for place in self._distinct() for form in forms)

    def in_use(self) -> Collection[str]:
        """Checkpoints that must not be deleted: held, or being loaded."""
        return {checkpoint_id for place in self._distinct() for checkpoint_id in place.in_use()}

    async def acquire(
        self,
        checkpoint: Checkpoint,
        on_progress: Progress = lambda done, total: None,
        *,
        device: str = HOST,
        may_evict: bool = True,
    ) -> Hold:
        """Holds a checkpoint's arena on a device, as Place.acquire does.

        Unless it `may_evict`, it is brought there only if there is room, and does not count as used.
        """
        from_tier, used_at = self.tier_of(checkpoint.id), None if may_evict else 0
        return await self.place(device).acquire(checkpoint, on_progress, from_tier=from_tier, used_at=used_at)

    async def evict(self, *forms: str) -> None:
        """Back to `stored`. Raises Busy while somebody holds one of these anywhere."""
        here = [(place, form) for place in self._distinct() for form in forms]
        for place, form in here:
            place.check_free(form)
        if leaving := {task for place, form in here if (task := place.begin_eviction(form))}:
            await asyncio.wait(leaving)

    async def adopt(self, device: str, checkpoint: Checkpoint, fd: int) -> None:
        """Takes over an arena that a daemon before us filled; the descriptor is ours from now on.

        Raises InvalidArgument if it is not what it is said to be, or OutOfMemory if the budget has become too small;
        it is closed then.
        """
        place = next((place for place in self._distinct() if place.name == device), None)
        if place is None:
            os.close(fd)
            raise InvalidArgument(f"there is no device {device!r} here", hint="it is another machine, or configuration")
        arena = place.device.adopt(fd, checkpoint.manifest.data_bytes)
        try:
            if checkpoint.id in place or not await self._mover.matches(checkpoint, Region(place.device, arena)):
                raise InvalidArgument(f"that memory does not hold checkpoint {checkpoint.id[:12]}")
            place.adopt(checkpoint, arena)
        except BaseException:
            arena.close()
            raise
        if place is self.host:
            self._on_host_resident(arena)

    async def stop(self) -> None:
        """Ends what moves, and lets nothing begin any more; returns when all has ended, and `close` is safe."""
        for place in self._distinct():
            place.begin_stop()
        for place in self._distinct():
            await place.stopped()

    def close(self) -> None:
        """Lets go of all memory. Descriptors handed out keep what they name."""
        for arena in self._give_up():
            arena.close()

    async def end(self) -> None:
        """As `close`, in a thread: unmapping gigabytes takes a while, and callers want their answers meanwhile."""
        arenas = self._give_up()

        def close() -> None:
            for arena in arenas:
                arena.close()

        await asyncio.to_thread(close)

    def _give_up(self) -> list[Arena]:
        return [arena for place in self._distinct() for arena in place.give_up()]

    def _distinct(self) -> list[Place]:
        return list(dict.fromkeys(self._places.values()))

    def _tier(self, place: Place) -> Tier:
        return Tier.HOST if place.device.kind is Kind.HOST else Tier.DEVICE

    async def _fill(self, place: Place, checkpoint: Checkpoint, arena: Arena, on_progress: Progress) -> None:
        target = Region(place.device, arena)
        for other in self._distinct():
            # Between two cards nothing is copied directly; the disk is asked again.
            if other is place or self.host not in {place, other}:
                continue
            if checkpoint.id not in other and (other, checkpoint.id) not in self._reading:
                continue
            # What only leaves a device is not in use there.
            hold = await other.borrow(checkpoint, on_progress, is_use=other is self.host)
            if hold is None:
                continue
            with hold:
                await self._mover.copy(checkpoint, hold.region, target, on_progress)
            break
        else:
            load = asyncio.current_task()
            assert load is not None
            self._reading.add((place, checkpoint.id))  # until it is there, not only until it is read
            load.add_done_callback(lambda _: self._reading.discard((place, checkpoint.id)))
            with self.host.reading(checkpoint.manifest.layout) as residents:
                await self._mover.load(checkpoint, target, on_progress, residents=residents)
        if place is self.host:
            self._on_host_resident(arena)

    async def _let_down(self, place: Place, resident: Resident) -> None:
        """What must leave a device stays in the host tier, if that costs nothing that was used since."""
        if place is self.host or resident.checkpoint.id in self.host:
            return
        try:
            hold = await self.host.acquire(
                resident.checkpoint, lambda done, total: None, from_tier=Tier.DEVICE, used_at=resident.used_at
            )
            hold.release()
        except (FlashdError, OSError) as error:
            log.info("%s leaves %s for the disk: %s", resident.checkpoint.id[:12], place.name, error)
