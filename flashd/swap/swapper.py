# SPDX-License-Identifier: Apache-2.0
"""Has models serve, one in place of another or beside others, without anybody losing what they had.

One of the models that serve is the active one: the endpoint leads to it, and a swap replaces it. Others serve beside
it, each in its engine, as long as there is room.

from        to                     what happens
idle        loading                a swap's turn has come
loading     making_way, switching  the new weights are brought into memory, while what served answers
making_way  loading                not all fit: an engine is put away, or several are; their weights may be evicted
switching   serving                an engine is rebound, woken or started with the new weights; the endpoint moves
serving     idle                   the new model answers; one that it replaces is put away: drained, and parked if it
                                   can be
any but serving  rolling_back      something failed, or was cancelled
rolling_back idle                  what served answers again: in its own engine if that is intact, else in another

Swaps run one at a time, in the order of the calls; a swap to the active model has nothing to do. An order to an engine
is always awaited to its end, within a time limit. A cancellation is obeyed between orders; it is too late once an
engine has been ordered to take the new weights, because the new model then answers in a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from flashd.engines.engine import Binding, BindingRecord, Engine, EngineFactory, EngineImage, EngineState
from flashd.errors import Busy, EngineFailed, EngineOutOfMemory, FlashdError, NotFound, OutOfMemory, Unsupported
from flashd.memory.device import Tier
from flashd.memory.transfers import Progress
from flashd.swap.another import Another
from flashd.swap.candidates import NEW_ENGINES, Candidates
from flashd.swap.slots import Endpoint, EngineSlot, Slots
from flashd.swap.weights import Recipient, Supplier, Supply, Target
from flashd.tasks import run_to_end

log = logging.getLogger(__name__)


class SwapState(StrEnum):
    IDLE = "idle"
    LOADING = "loading"
    MAKING_WAY = "making_way"
    SWITCHING = "switching"
    SERVING = "serving"
    ROLLING_BACK = "rolling_back"


TRANSITIONS: Mapping[SwapState, frozenset[SwapState]] = {
    SwapState.IDLE: frozenset({SwapState.LOADING}),
    SwapState.LOADING: frozenset({SwapState.MAKING_WAY, SwapState.SWITCHING, SwapState.ROLLING_BACK}),
    SwapState.MAKING_WAY: frozenset({SwapState.LOADING, SwapState.ROLLING_BACK}),
    SwapState.SWITCHING: frozenset({SwapState.SERVING, SwapState.ROLLING_BACK}),
    SwapState.SERVING: frozenset({SwapState.IDLE}),
    SwapState.ROLLING_BACK: frozenset({SwapState.IDLE}),
}


class How(StrEnum):
    """The ways in which an engine got the new model."""

    ALREADY_ACTIVE = "already-active"
    REBIND = "rebind"
    WAKE = "wake"
    START = "start"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a swap. `seconds` is the time until the new model could answer; `phases` has the seconds in each state.

    `from_tier` is the tier in which the weights were before.
    """

    model_name: str
    engine_number: int
    how: How
    from_tier: Tier
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits of swaps. At most `max_parked` engines stay parked; the one parked longest ago is stopped first.

    An engine that has not carried out an order after `order_timeout_s` is considered dead, and is ended. Engines limit
    the time of their start themselves. Requests have `drain_timeout_s` to finish; an engine that has not ended them
    `cut_timeout_s` later is stuck, and is ended. Models of one architecture that take turns in an engine get at most
    `per_architecture` engines.
    """

    drain_timeout_s: float = 10.0
    max_parked: int = 2
    order_timeout_s: float = 60.0
    cut_timeout_s: float = 5.0
    per_architecture: int = 1


# Updates the target of a swap when its turn has come. Raises NotFound if the model was removed or is no longer visible.
Renew = Callable[[Target], Awaitable[Target]]


async def _as_it_was(target: Target) -> Target:
    return target


@dataclass(frozen=True, slots=True)
class _Served:
    """What an engine served before a swap began."""

    slot: EngineSlot
    target: Target
    is_active: bool


# What an engine was given by a daemon before us: nothing, if it is parked. Raises if it cannot be found again.
Recall = Callable[[Engine, BindingRecord], Awaitable[tuple[Target, Supply | None]]]


class Swapper:
    """Owns the engines and swaps models between them. All calls are made on one event loop."""

    def __init__(
        self,
        supplier: Supplier,
        factories: Mapping[str, EngineFactory],
        endpoint: Endpoint,
        policy: Policy,
        *,
        on_change: Callable[[], None] = lambda: None,
        on_lost: Callable[[Target, bool], None] = lambda target, was_active: None,
        on_displaced: Callable[[Target], bool] = lambda target: False,
        free_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        """`on_lost` is told of a model whose engine ended unasked while it served, and whether it was the active one.

        `on_displaced` is told of the active model when another one takes its engine to serve in it; it returns whether
        it made the endpoint lead elsewhere. `free_bytes` returns the memory of the machine that an engine may take that
        is started before anybody needs it.
        """
        self._supplier = supplier
        self._factories = factories
        self._endpoint = endpoint
        self._policy = policy
        self._on_change = on_change
        self._on_lost = on_lost
        self.slots = Slots(endpoint, on_change, on_displaced, supplier.engine_ended)
        self._candidates = Candidates(
            self.slots, supplier, factories, per_architecture=policy.per_architecture, free_bytes=free_bytes
        )
        self._another = Another(self.slots, self._candidates, supplier, start=self._started, keep=self._keep_for_later)
        self._turn = asyncio.Lock()  # fair: waiters get it in the order they asked
        self._lost: Target | None = None  # the active model whose engine ended during the swap under way
        self._closed = False
        self._state = SwapState.IDLE
        self._entered_at = 0.0
        self._phases: dict[str, float] = {}

    @property
    def state(self) -> SwapState:
        return self._state

    async def swap(
        self, target: Target, on_progress: Progress = lambda done, total: None, *, renew: Renew = _as_it_was
    ) -> Outcome:
        """Makes `target` the active model, as updated by `renew` when the swap's turn has come.

        Raises Unsupported, OutOfMemory, CorruptCheckpoint, TransferFailed or EngineFailed after making the previous
        model active again. The call may be cancelled at any moment.
        """
        return await self._bring(target, on_progress, renew, lambda: True)

    async def serve(
        self,
        target: Target,
        on_progress: Progress = lambda done, total: None,
        *,
        renew: Renew = _as_it_was,
        becomes_active: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Has `target` serve beside what serves already.

        Where there is no room for all, others make way: idle ones first, and of these the one used longest ago. A model
        of the same architecture gives up its engine, and `on_displaced` is told if that was the active one; if they
        take turns often and there is free memory, another engine is started for the next turns. If `becomes_active`
        says so when its turn has come, it is swapped to. Raises what a swap raises, and then what served before serves
        again.
        """
        return await self._bring(target, on_progress, renew, becomes_active)

    async def displaced_by(self, target: Target) -> list[Target]:
        """The models that would cease to serve if this one came to serve now. Others may change that any time."""
        if any(slot.target.is_same(target) and slot.answers for slot in self.slots.serving):
            return []
        await self._candidates.read_key(target)
        candidates = self._candidates.without(await self._candidates.too_large(target, is_active=False))
        makes_way = []
        takers = await candidates.takers(target, is_active=False)
        if takers and takers[0].engine.state is EngineState.SERVING:
            makes_way.append(takers[0])
        for recipient in await candidates.recipients(target, is_active=False):
            if await self._supplier.fits_without(target, self.slots.dispensable, to=recipient):
                break
            if way := await candidates.way_for(target, recipient, is_active=False):
                makes_way += [slot for slot in way if slot not in makes_way]
                break
        return [slot.target for slot in makes_way]

    async def _bring(
        self, target: Target, on_progress: Progress, renew: Renew, becomes_active: Callable[[], bool]
    ) -> Outcome:
        async with self._turn:
            if self._closed:
                raise Busy("the daemon is stopping", hint="start it again: flash start")
            target, is_active = await renew(target), becomes_active()
            slot = next((slot for slot in self.slots.serving if slot.answers and slot.target.is_same(target)), None)
            if slot is not None:
                if is_active and slot is not self.slots.active:
                    self.slots.activate(slot)
                    await run_to_end(self._tidy())
                slot.used_at = time.monotonic()
                return Outcome(target.model_name, slot.engine.number, How.ALREADY_ACTIVE, Tier.HOST, 0.0)
            factory = self._factories[target.engine_kind]
            if reason := factory.refusal(target.checkpoint.manifest.architecture, target.checkpoint.side_files()):
                hint = "add the config.json of the original model to the source"
                hint = hint if "config.json" in reason else "name no engine: the model then gets one that can run it"
                raise Unsupported(f"{target.model_name} cannot run: {reason}", hint=hint)
            self._phases = {}
            self._enter(SwapState.LOADING)
            try:
                outcome = await self._take_over(target, on_progress, is_active=is_active)
            finally:
                self._enter(SwapState.IDLE)
            if not is_active and not self._closed:
                self._another.begin(target)
            return replace(outcome, phases=dict(self._phases))

    async def prepare(self, target: Target, *, renew: Renew = _as_it_was) -> bool:
        """Has a parked engine make the missing image of a model in free memory, so that the first swap can map it.

        Returns False if no image is needed, or there is no memory or no suitable engine for it. The active engine is
        not affected. A cancellation is obeyed between orders to the engine; swaps wait for these orders too. Raises the
        same errors as a swap.
        """
        async with self._turn:
            target = await renew(target)
            await self._candidates.read_key(target)
            sleeping = [slot for slot in self._candidates.sharing(target) if slot.engine.state is EngineState.PARKED]
            if self._closed or not sleeping:
                return False
            slot = sleeping[0]
            engine = Recipient(stays_parked=True, identity=slot.engine.identity)
            if not await self._supplier.fits_beside(target, to=engine):
                return False
            supply = await self._supplier.provide(target, to=engine)
            try:
                binding = await self._supplier.binding(target, supply)
                if not binding.weights.wants_image:
                    return False
                await self._order(slot.engine, self._image_made(slot.engine, target, supply, binding))
            finally:
                supply.release()
                await run_to_end(self._tidy())
            return supply.is_image

    async def _image_made(self, engine: Engine, target: Target, supply: Supply, binding: Binding) -> None:
        """Adopts the image that a parked engine makes, before any cancellation is obeyed."""
        made = await engine.make_image(binding)
        if made is not None and await run_to_end(self._supplier.take_in(target, supply, made, engine.identity)):
            raise asyncio.CancelledError

    async def park(
        self, target: Target | None = None, *, name: str = "", move_endpoint: Callable[[], None] | None = None
    ) -> bool:
        """Parks the engine in which `target` serves, or a model of this name, or the active one; returns whether it was
        the active one. Raises NotFound if there is none.

        If it is the active one, the endpoint is gone then, unless `move_endpoint` makes it lead elsewhere.
        """
        async with self._turn:
            slot = self.slots.of(name) if name else self.slots.active
            if target is not None:
                slot = next((slot for slot in self.slots.serving if slot.target.is_same(target)), None)
            if slot is None and (name or target is not None):
                name = name or (target.model_name if target is not None else "")
                raise NotFound(f"{name} does not serve", hint="flash status shows which models do")
            if slot is None:
                raise NotFound("no model is active", hint="there is nothing to park")
            if was_active := slot is self.slots.active:
                self.slots.activate(None, move_endpoint)
            else:
                self.slots.retire(slot)
            await run_to_end(self._tidy())
            return was_active

    @property
    def has_parked(self) -> bool:
        """True if an engine is parked, or is started to be."""
        return self._another.is_starting or any(slot.engine.state is EngineState.PARKED for slot in self.slots.parked)

    async def stop_parked(self, *, at_most: int) -> int:
        """Ends parked engines, first one that is only starting to be, then those parked longest ago. Returns the number
        ended."""
        given_up = int(at_most > 0 and await self._another.give_up())
        async with self._turn:
            return given_up + await self._stop_parked(at_most - given_up)

    async def settled(self) -> None:
        """Waits until no engine is being started before anybody needs it, and nothing of ended engines is left."""
        await self._another.ended()
        await self._supplier.settled()

    async def stop_engine(self, number: int) -> None:
        """Ends one engine. Raises NotFound."""
        async with self._turn:
            for slot in self.slots:
                if slot.engine.number == number:
                    await run_to_end(self._discard(slot))
                    return
            raise NotFound(f"there is no engine {number}", hint="flash status shows the engines")

    async def take_over(
        self, engines: Iterable[Engine], recall: Recall, active: Path | None, beside: Collection[Path] = ()
    ) -> None:
        """Takes up engines that a daemon before us has left, each as soon as it says what it holds.

        The one with the socket `active`, to which the endpoint leads, is the active one; those with a socket of
        `beside` serve on, and the others are parked, if they are not. What nobody can tell the state of is ended. May
        take as long as an order that was under way.
        """
        async with self._turn:
            rejoining = [asyncio.ensure_future(self._rejoined(engine, recall)) for engine in engines]
            try:
                for found in asyncio.as_completed(rejoining):
                    if (slot := await found) is None:
                        continue
                    path = slot.engine.socket_path
                    try:
                        await self._take_up(slot, is_active=path == active, serves=path == active or path in beside)
                    except (FlashdError, OSError) as error:
                        log.warning("engine %d of the previous daemon is ended: %s", slot.engine.number, error)
                        await run_to_end(self._discard(slot))
            finally:
                for unfinished in rejoining:
                    unfinished.cancel()
            if self.slots.active is None and active is not None:
                self._endpoint.point_to(None)
            there = {slot.engine.identity for slot in self.slots}
            await self._supplier.remove_images(unless=lambda maker: maker in there)
            await run_to_end(self._tidy())

    async def _take_up(self, slot: EngineSlot, *, is_active: bool, serves: bool) -> None:
        self.slots.parked.append(slot)
        if not serves or slot.engine.state is not EngineState.SERVING:
            self._endpoint.shut(slot.engine.socket_path)
            self._on_change()
        elif await self._resumed(slot):
            self.slots.place(slot, is_active=is_active)

    async def _rejoined(self, engine: Engine, recall: Recall) -> EngineSlot | None:
        engine.on_exit = lambda last_words: self._report_exit(engine, last_words)
        try:
            async with asyncio.timeout(self._policy.order_timeout_s + self._policy.drain_timeout_s):
                found = await engine.rejoin()
                target, supply = await recall(engine, found.record)
        except (FlashdError, OSError, TimeoutError) as error:
            log.warning("engine %d of the previous daemon is ended: %s", engine.number, error)
            await run_to_end(engine.stop())
            self._endpoint.shut(engine.socket_path)
            return None
        log.info("engine %d of the previous daemon is %s", engine.number, engine.state)
        return EngineSlot(engine, target, supply, found.is_shut)

    async def close(self, *, leaving: bool = True) -> bool:
        """Ends all engines, except, if we are `leaving`, those kept for the next daemon. Refuses waiting swaps.

        Returns True if any engine was left running.
        """
        self._closed = True
        await self._another.give_up()
        async with self._turn:
            for slot in self.slots:
                if leaving and slot.engine.is_kept:
                    await slot.engine.leave()
                else:
                    await self._discard(slot)
        return bool(self.slots)

    def engine_exited(self, engine: Engine) -> None:
        """Gives up the slot of a process that ended unasked, whatever the moment."""
        slot = next((slot for slot in self.slots if slot.engine is engine), None)
        if slot is None:
            return
        was_active, served = slot is self.slots.active, slot in self.slots.serving
        self.slots.forget(slot)
        if was_active and self._state not in {SwapState.IDLE, SwapState.SERVING}:
            self._lost = slot.target  # the swap under way may replace it
        elif served:
            self._on_lost(slot.target, was_active)

    async def _take_over(self, target: Target, on_progress: Progress, *, is_active: bool) -> Outcome:
        """The swap itself; on any error, what served before serves again."""
        started = time.monotonic()
        before = [_Served(slot, slot.target, slot is self.slots.active) for slot in self.slots.serving]
        # A new version of the active model takes its place.
        is_active = is_active or any(one.is_active and one.target.model_name == target.model_name for one in before)
        supply, self._lost = None, None
        try:
            await self._candidates.read_key(target)
            supply = await self._provide(target, on_progress, is_active=is_active)
            self._enter(SwapState.SWITCHING)
            how, engine = await self._switch(target, supply, is_active=is_active)
        except BaseException:
            self._enter(SwapState.ROLLING_BACK)
            await run_to_end(self._roll_back(before, supply))
            raise
        self.slots.retire_other_versions(target, engine)
        if self._lost is not None and not is_active:
            self._on_lost(self._lost, True)
        outcome = Outcome(target.model_name, engine.number, how, supply.from_tier, time.monotonic() - started)
        self._enter(SwapState.SERVING)
        await run_to_end(self._tidy())
        return outcome

    async def _provide(self, target: Target, on_progress: Progress, *, is_active: bool) -> Supply:
        """The new weights, beside all others if they fit, else in place of some."""
        await self._end_too_large(target, is_active=is_active)
        recipients = await self._candidates.recipients(target, is_active=is_active)
        for recipient in recipients:
            try:
                return await self._supplied(target, recipient, on_progress)
            except OutOfMemory:
                if making_way := await self._candidates.way_for(target, recipient, is_active=is_active):
                    await self._make_way(making_way, is_active=is_active)
                    return await self._supplied_now(target, on_progress, is_active=is_active)
                if recipient is recipients[-1]:
                    raise
        raise AssertionError("somebody takes it")

    async def _make_way(self, making_way: Sequence[EngineSlot], *, is_active: bool) -> None:
        self._enter(SwapState.MAKING_WAY)
        for slot in making_way:
            if slot in self.slots.beside:
                self.slots.retire(slot)
            elif slot is not self.slots.active:
                continue  # it ended while another was put away
            elif not is_active:
                self.slots.displace_active()
            await self._put_away(slot)
        self._enter(SwapState.LOADING)

    async def _supplied_now(
        self, target: Target, on_progress: Progress = lambda done, total: None, *, is_active: bool
    ) -> Supply:
        """The new weights in free memory, for whichever engine would take them now."""
        recipients = await self._candidates.recipients(target, is_active=is_active)
        return await self._supplied_to(target, recipients, on_progress)

    async def _supplied_to(
        self, target: Target, recipients: Sequence[Recipient], on_progress: Progress = lambda done, total: None
    ) -> Supply:
        """The new weights in free memory, for the first of these for which it suffices."""
        for recipient in recipients[:-1]:
            with contextlib.suppress(OutOfMemory):
                return await self._supplied(target, recipient, on_progress)
        return await self._supplied(target, recipients[-1], on_progress)

    async def _supplied(self, target: Target, recipient: Recipient, on_progress: Progress) -> Supply:
        """The new weights in free memory, for which an engine that nobody needs yet is given up."""
        try:
            return await self._supplier.provide(target, on_progress, to=recipient)
        except OutOfMemory:
            if not await self._another.give_up():
                raise
            return await self._supplier.provide(target, on_progress, to=recipient)

    async def _end_too_large(self, target: Target, *, is_active: bool) -> None:
        """Ends the parked engines that would take the model, but have become too large."""
        for slot in await self._candidates.too_large(target, is_active=is_active):
            what = f"its KV cache of {slot.engine.cache_bytes} bytes has no room now"
            log.info("engine %d is ended: %s", slot.engine.number, what)
            await run_to_end(self._discard(slot))

    async def _switch(self, target: Target, supply: Supply, *, is_active: bool) -> tuple[How, Engine]:
        """Gives the weights to an engine and has it serve: a parked one, one that serves, or a new one."""
        binding = await self._supplier.binding(target, supply)
        for slot in await self._candidates.takers(target, is_active=is_active):
            if not supply.is_for(slot.engine):
                continue
            if slot.engine.state is EngineState.SERVING:
                # Connections that lead to the active model are not for the one that takes over its engine.
                is_displaced = slot is self.slots.active and not is_active
                if is_displaced:
                    self.slots.displace_active()
                if await self._drained(slot, leaving=is_displaced) and await self._rebound(
                    slot, target, supply, binding, is_active=is_active
                ):
                    return How.REBIND, slot.engine
                continue
            if (
                slot.engine.state is EngineState.PARKED
                and await self._supplier.claim_cache(supply, slot.engine.cache_bytes)
                and await self._woken(slot, target, supply, binding, is_active=is_active)
            ):
                return How.WAKE, slot.engine
        if supply.maker:  # the only engine that could map its image is gone
            supply.release()
            supply.exchange(await self._supplied_to(target, NEW_ENGINES))
        try:
            await self._supplier.claim_start(target, supply)
        except OutOfMemory:
            if not await self._another.give_up():
                raise
            await self._supplier.claim_start(target, supply)
        try:
            return How.START, await self._started_to_serve(target, supply, is_active=is_active)
        except EngineOutOfMemory as error:
            # No pool counts the memory of parked engines besides weights, nor that of other programs.
            is_smaller = await self._supplier.shrink_cache(target, supply)
            is_freed = await self._another.give_up()
            if not await self._stop_parked(len(self.slots.parked)) and not is_smaller and not is_freed:
                raise
            log.warning("parked engines were stopped, or its KV cache is smaller, for %s", error.message)
            return How.START, await self._started_to_serve(target, supply, is_active=is_active)

    async def _started_to_serve(self, target: Target, supply: Supply, *, is_active: bool) -> Engine:
        engine = await self._started(target, supply)
        try:
            self.slots.place(EngineSlot(engine, target, supply), is_active=is_active)
        except BaseException:
            await run_to_end(engine.stop())
            self._supplier.engine_ended(engine)
            raise
        return engine

    async def _started(self, target: Target, supply: Supply) -> Engine:
        """A new engine with these weights, which is in no slot yet."""
        binding = await self._supplier.binding(target, supply)
        if binding.weights.is_image:
            layout = await asyncio.to_thread(target.checkpoint.layout_json)
            binding = replace(binding, weights=replace(binding.weights, checkpoint_layout=layout))
        await self._supplier.let_cache_grow(supply)
        engine = self._factories[target.engine_kind].create(target.options, cache_bytes=supply.cache_bytes)
        engine.on_exit = lambda last_words: self._report_exit(engine, last_words)
        try:
            await self._given(engine, target, supply, engine.start(binding))
            supply.has_started()
        except BaseException:
            await run_to_end(engine.stop())
            self._supplier.engine_ended(engine)
            raise
        return engine

    async def _rebound(
        self, slot: EngineSlot, target: Target, supply: Supply, binding: Binding, *, is_active: bool
    ) -> bool:
        """False if the engine has ended, because it cannot hold these weights: a new one can take its place."""
        try:
            await run_to_end(self._rebind(slot, target, supply, binding, is_active=is_active))
        except EngineFailed as error:
            if slot.engine.state is not EngineState.FAILED:
                raise
            log.warning("engine %d could not take %s: %s", slot.engine.number, target.model_name, error)
            await run_to_end(self._discard(slot))
            return False
        return True

    async def _rebind(
        self, slot: EngineSlot, target: Target, supply: Supply, binding: Binding, *, is_active: bool
    ) -> None:
        await self._order(slot.engine, self._given(slot.engine, target, supply, slot.engine.rebind(binding)))
        old = slot.supply
        slot.takes(target, supply)
        slot.note_turn()
        if old is not None:
            supply.keeps_cache_of(old)
            old.release()
        self.slots.place(slot, is_active=is_active)

    async def _woken(
        self, slot: EngineSlot, target: Target, supply: Supply, binding: Binding, *, is_active: bool
    ) -> bool:
        """False if the engine has died in its sleep, or its KV cache has become too large: another one can take its
        place.
        """
        try:
            await run_to_end(self._wake(slot, target, supply, binding, is_active=is_active))
        except EngineFailed as error:
            is_short = isinstance(error, EngineOutOfMemory) and await self._supplier.shrink_cache(target, supply)
            if slot.engine.state is not EngineState.FAILED and not is_short:
                raise
            await run_to_end(self._discard(slot))
            return False
        return True

    async def _wake(
        self, slot: EngineSlot, target: Target, supply: Supply, binding: Binding, *, is_active: bool
    ) -> None:
        slot.release()
        await self._order(slot.engine, self._given(slot.engine, target, supply, slot.engine.wake(binding)))
        slot.takes(target, supply)
        self.slots.place(slot, is_active=is_active)

    async def _given(
        self, engine: Engine, target: Target, supply: Supply, order: Awaitable[EngineImage | None]
    ) -> None:
        """Gives weights to an engine and adopts the image that it makes, before any cancellation is obeyed."""
        if (made := await order) is not None:
            is_cancelled = await run_to_end(self._supplier.take_in(target, supply, made, engine.identity))
            if supply.is_image:
                engine.has_become(supply.arena_ids)
            if is_cancelled:
                raise asyncio.CancelledError
        elif supply.wants_image:
            self._supplier.note_no_image(supply)
        if not supply.is_image and self._factories[target.engine_kind].copies_checkpoints:
            supply.was_copied()

    async def _roll_back(self, before: Sequence[_Served], supply: Supply | None) -> None:
        """Undoes a swap. What served is put back where it was, or into whichever engine can take it."""
        for slot in self.slots:
            if slot.engine.state is EngineState.FAILED or (supply is not None and slot.supply is supply):
                await self._discard(slot)  # dead, or already bound to the new model
        if supply is not None:
            supply.release()
        for one in reversed(before):  # the one that began longest ago first, as they were
            try:
                if one.slot.target is one.target and await self._resumed(one.slot):
                    if one.slot not in self.slots.serving:
                        self.slots.place(one.slot, is_active=one.is_active)
                    continue
                await self._end_too_large(one.target, is_active=one.is_active)
                with contextlib.ExitStack() as on_error:
                    again = await self._supplied_now(one.target, is_active=one.is_active)
                    on_error.callback(again.release)
                    await self._switch(one.target, again, is_active=one.is_active)
                    on_error.pop_all()
            except (FlashdError, OSError) as error:
                log.error("%s could not be put back: %s", one.target.model_name, error)
                if one.is_active and self.slots.active is not None:  # else it rests, if it may
                    self.slots.activate(None)
        await self._tidy()

    async def _resumed(self, slot: EngineSlot) -> bool:
        """Resumes an engine that may have been drained. Returns False if it does not answer again."""
        if slot.engine.state is not EngineState.SERVING:
            return False
        try:
            if slot.is_shut:
                await self._resume(slot)
        except EngineFailed:
            await self._discard(slot)
            return False
        return True

    async def _tidy(self) -> None:
        """Parks engines that are no longer active, and stops those beyond the limit."""
        await self._supplier.sweep()
        for slot in list(self.slots.parked):
            await self._put_away(slot)
        await self._stop_parked(len(self.slots.parked) - self._policy.max_parked)

    async def _keep_for_later(self, slot: EngineSlot) -> None:
        """Parks an engine that was started before anybody needed it."""
        async with self._turn:
            self.slots.parked.append(slot)
            await run_to_end(self._tidy())
            if slot.engine.state is not EngineState.PARKED:
                self._candidates.note_no_other(slot.target)

    async def _put_away(self, slot: EngineSlot) -> None:
        """Drains an engine, then parks it, or stops it if it cannot be parked or would never be woken."""
        try:
            if slot.engine.state is EngineState.SERVING:
                await (self._park(slot) if self._candidates.key(slot.target) else self._drain(slot, leaving=True))
        except EngineFailed as error:
            log.warning("engine %d could not be parked: %s", slot.engine.number, error)
        if slot.engine.state is not EngineState.PARKED:
            await run_to_end(self._discard(slot))

    async def _stop_parked(self, at_most: int) -> int:
        doomed = [slot for slot in self.slots.parked if slot.engine.state is EngineState.PARKED][: max(0, at_most)]
        for slot in doomed:
            await run_to_end(self._discard(slot))
        return len(doomed)

    async def _park(self, slot: EngineSlot) -> None:
        await self._drain(slot, leaving=True)
        try:
            await self._order(slot.engine, slot.engine.park())
        finally:
            if slot.engine.state is not EngineState.SERVING:
                slot.release()  # even if we are cancelled, because the engine has given up the memory
            self._on_change()

    async def _drain(self, slot: EngineSlot, *, leaving: bool = False) -> None:
        limit_s = self._policy.drain_timeout_s
        slot.is_shut, slot.is_leaving = True, leaving
        drain = slot.engine.drain(limit_s, leaving=leaving)
        await self._order(slot.engine, drain, limit_s + self._policy.cut_timeout_s)

    async def _drained(self, slot: EngineSlot, *, leaving: bool) -> bool:
        """False if it is stuck in what it was answering: it is ended, and another engine can take its place."""
        try:
            await self._drain(slot, leaving=leaving)
        except EngineFailed as error:
            log.warning("engine %d is stuck, and ended: %s", slot.engine.number, error)
            await run_to_end(self._discard(slot))
            return False
        return True

    async def _resume(self, slot: EngineSlot) -> None:
        await self._order(slot.engine, slot.engine.resume())
        slot.is_shut = slot.is_leaving = False

    async def _order(self, engine: Engine, order: Coroutine[Any, Any, None], limit_s: float | None = None) -> None:
        """Awaits an order to an engine to its end, and only then obeys a cancellation.

        An engine that does not answer is ended, because its binding is unknown.
        """
        limit_s = self._policy.order_timeout_s if limit_s is None else limit_s
        try:
            is_cancelled = await run_to_end(asyncio.wait_for(order, limit_s))
        except TimeoutError:
            await run_to_end(engine.stop())
            hint = "see its log for the reason; the next swap gets another engine"
            raise EngineFailed(
                f"engine {engine.number} did not answer for {limit_s:.0f} s and was ended", hint=hint
            ) from None
        if is_cancelled:
            raise asyncio.CancelledError

    async def _discard(self, slot: EngineSlot) -> None:
        await slot.engine.stop()
        self.slots.forget(slot)

    def _report_exit(self, engine: Engine, last_words: str) -> None:
        log.error("engine %d ended unexpectedly: %s", engine.number, last_words)
        self.engine_exited(engine)

    def _enter(self, state: SwapState) -> None:
        assert state in TRANSITIONS[self._state], f"{self._state} to {state}"
        now = time.monotonic()
        if self._state is not SwapState.IDLE:
            self._phases[self._state] = self._phases.get(self._state, 0.0) + now - self._entered_at
        self._state, self._entered_at = state, now
        self._on_change()
