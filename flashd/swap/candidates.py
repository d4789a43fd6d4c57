# SPDX-License-Identifier: Apache-2.0
"""Which engine takes a model, and which engines make way for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

from flashd.engines.engine import EngineFactory, EngineState
from flashd.errors import FlashdError
from flashd.swap.slots import EngineSlot, Slots
from flashd.swap.weights import Recipient, Supplier, Target

# A new engine, and one with the least needs.
NEW_ENGINES = (Recipient(starts=True), Recipient(starts=True, makes_no_image=True))
_STATS_S = 2.0  # for an engine to say whether it is busy


class Candidates:
    """Chooses among the engines. Nothing here changes any."""

    def __init__(
        self,
        slots: Slots,
        supplier: Supplier,
        factories: Mapping[str, EngineFactory],
        *,
        per_architecture: int,
        free_bytes: Callable[[], int],
        without: Collection[EngineSlot] = (),
    ) -> None:
        """`free_bytes` returns the memory of the machine that another process may take. `without` are parked engines
        that do not count.
        """
        self._slots = slots
        self._supplier = supplier
        self._factories = factories
        self._per_architecture = per_architecture
        self._free_bytes = free_bytes
        self._without = without

    def without(self, ended: Collection[EngineSlot]) -> Candidates:
        """The candidates there would be if these parked engines were ended."""
        return Candidates(
            self._slots,
            self._supplier,
            self._factories,
            per_architecture=self._per_architecture,
            free_bytes=self._free_bytes,
            without=ended,
        )

    async def read_key(self, target: Target) -> None:
        """Computes the key in a thread, because the first time it reads files, whose contents factories cache."""
        await asyncio.to_thread(self.key, target)

    def key(self, target: Target) -> tuple[object, ...]:
        """Returns a key, which is equal for models that one engine can hold in turn; empty if no engine can."""
        factory = self._factories[target.engine_kind]
        key = factory.rebind_key(target.checkpoint, target.options)
        return (factory.kind, target.private_to, key) if key else ()

    def sharing(self, target: Target) -> list[EngineSlot]:
        """The engines that can take a model whose key was read."""
        key = self.key(target)
        return [
            slot
            for slot in self._slots
            if key and slot.takes_others and slot not in self._without and self.key(slot.target) == key
        ]

    async def takers(self, target: Target, *, is_active: bool) -> list[EngineSlot]:
        """The engines that can take a model, in the order in which they are to.

        A swap takes that of the model which it replaces; one that serves beside gives up its own only if no other can.
        """
        sharing = self.sharing(target)
        replaced = [slot for slot in sharing if is_active and slot is self._slots.active]
        return replaced + await self._in_order([slot for slot in sharing if slot not in replaced])

    async def recipients(self, target: Target, *, is_active: bool) -> list[Recipient]:
        """The engine that would take a model now, whose key was read.

        A new engine comes twice, the second time with the least needs, in case there is no room for more even if all
        others make way.
        """
        for slot in await self.takers(target, is_active=is_active):
            if slot.engine.state is EngineState.PARKED:
                return [Recipient.of(slot.engine)]
            if slot.engine.state is EngineState.SERVING:
                return [Recipient(identity=slot.engine.identity)]
        return [*NEW_ENGINES]

    def sleeper(self, target: Target, *, is_active: bool) -> EngineSlot | None:
        """The parked engine that would take a model now, whose key was read."""
        sharing = self.sharing(target)
        if is_active and self._slots.active in sharing:
            return None  # it gives up its engine
        return next((slot for slot in sharing if slot.engine.state is EngineState.PARKED), None)

    async def too_large(self, target: Target, *, is_active: bool) -> list[EngineSlot]:
        """The parked engines that would take a model whose key was read, but whose KV caches have no room now unless
        others make way. They took what was free at their starts; a new engine takes less.
        """
        replaced = list(self._slots.dispensable)
        if is_active and self._slots.active is not None and self._slots.active.supply is not None:
            replaced.append(self._slots.active.supply)
        found: list[EngineSlot] = []
        while (slot := self.without(found).sleeper(target, is_active=is_active)) is not None:
            engine = Recipient.of(slot.engine)
            if not await self._supplier.is_grown(target, engine) or await self._supplier.fits_without(
                target, replaced, to=engine
            ):
                break
            found.append(slot)
        return found

    def is_contended(self, target: Target) -> bool:
        """Tells whether models take turns too often in the engines that can take a model whose key was read, and there
        may be more of these."""
        sharing = self.sharing(target)
        return 0 < len(sharing) < self._per_architecture and all(
            slot.engine.state is EngineState.SERVING and slot.is_contended for slot in sharing
        )

    async def is_worth_another(self, target: Target) -> bool:
        """Tells whether another engine can start for a model whose engines are contended, since free memory suffices:
        that of the GPUs, and that of the machine for a process like those that there are."""
        engine_bytes = [await self._memory_bytes(slot) for slot in self.sharing(target)]
        return all(engine_bytes) and await self._supplier.fits_another(
            target, engine_bytes=max(engine_bytes, default=0), free_bytes=self._free_bytes()
        )

    def note_no_other(self, target: Target) -> None:
        """Notes that no other engine could be started for models that share these, lest each turn try it again."""
        for slot in self.sharing(target):
            slot.stays_shared = True

    async def way_for(self, target: Target, recipient: Recipient, *, is_active: bool) -> list[EngineSlot]:
        """The engines that have to be put away to make room for a model: as few as will do; none if nothing will.

        One that is replaced anyway, or whose engine the model takes, comes first.
        """
        sharing = self.sharing(target)
        candidates = [slot for slot in await self._in_order(self._slots.serving) if slot.supply is not None]
        if is_active:
            first = self._slots.active
        elif any(slot.engine.state is EngineState.PARKED for slot in sharing):
            first = None  # the model takes the engine of none that serves
        else:
            first = next((slot for slot in candidates if slot in sharing), None)
        candidates.sort(key=lambda slot: slot is not first)

        async def suffices(chosen: Sequence[EngineSlot]) -> bool:
            supplies = [slot.supply for slot in chosen if slot.supply is not None]
            supplies += self._slots.dispensable
            return await self._supplier.fits_without(target, supplies, to=recipient)

        chosen: list[EngineSlot] = []
        for slot in candidates:
            chosen.append(slot)
            if await suffices(chosen):
                break
        else:
            return []
        for slot in list(chosen):
            if len(chosen) > 1 and await suffices(rest := [other for other in chosen if other is not slot]):
                chosen = rest
        return chosen

    async def _in_order(self, slots: Sequence[EngineSlot]) -> list[EngineSlot]:
        """The order in which engines make way: parked ones, idle ones, and those that answer requests. Within each, the
        active one last, and of the others the one used longest ago first."""
        serving = [slot for slot in slots if slot.engine.state is EngineState.SERVING]
        others = [slot for slot in slots if slot not in serving]
        if len(serving) > 1:  # else the question would only delay a swap
            busy = await asyncio.gather(*[self._is_busy(slot) for slot in serving])
            ranks = {
                slot: (is_busy, slot is self._slots.active, slot.used_at)
                for slot, is_busy in zip(serving, busy, strict=True)
            }
            serving.sort(key=ranks.__getitem__)
        return sorted(others, key=lambda slot: slot.engine.state is not EngineState.PARKED) + serving

    async def _memory_bytes(self, slot: EngineSlot) -> int:
        """What the process of an engine takes besides weights; 0 if that is unknown."""
        try:
            async with asyncio.timeout(_STATS_S):
                return (await slot.engine.stats()).memory_bytes
        except (FlashdError, TimeoutError):
            return 0

    async def _is_busy(self, slot: EngineSlot) -> bool:
        try:
            async with asyncio.timeout(_STATS_S):
                return (await slot.engine.stats()).active_requests > 0
        except (FlashdError, TimeoutError):
            return False  # it hangs or is about to end: if any is to make way, this one
