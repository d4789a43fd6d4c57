# SPDX-License-Identifier: Apache-2.0
"""How does one model take over from another, without anybody losing what they had?

from        to                     what happens
idle        loading                a swap's turn has come
loading     making_way, switching  the new weights are brought into memory, while the old model answers
making_way  loading                both do not fit: the old engine is put away, its weights may be evicted
switching   serving                an engine is rebound, woken or started with the new weights; the endpoint moves
serving     idle                   the new model answers; the old engine is put away: drained, and parked if it can be
any but serving  rolling_back      something failed, or was cancelled
rolling_back idle                  the old model answers again: in its own engine if that is intact, else in another

Swaps happen one at a time, in the order asked; one that finds its model active already has nothing to do. An order to
an engine is always awaited to its end, within a limit: a cancel is obeyed between orders, and comes too late once an
engine has been told to take the new weights, for then the new model answers in a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from flashd.engines.engine import Binding, Engine, EngineFactory, EngineState, Holding, Made
from flashd.errors import Busy, EngineFailed, EngineOutOfMemory, FlashdError, NotFound, OutOfMemory, Unsupported
from flashd.memory.device import Tier
from flashd.memory.moving import Progress
from flashd.supply import Supplier, Supply, Target

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
    """How the new model's first token became possible."""

    ALREADY_ACTIVE = "already-active"
    REBIND = "rebind"
    WAKE = "wake"
    START = "start"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`seconds` is the time until the new model could answer; `phases` has the seconds spent in each state.

    `from_tier` is where the weights were.
    """

    model_name: str
    engine_number: int
    how: How
    from_tier: Tier
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits in seconds; `max_parked` engines stay parked, the one parked longest ago is stopped first.

    An engine that has not carried out an order after `order_timeout_s` is taken for dead, and ended. Starting is not an
    order: engines limit that themselves.
    """

    drain_timeout_s: float = 10.0
    max_parked: int = 2
    order_timeout_s: float = 60.0


class Endpoint(Protocol):
    """The one address of whichever model is active."""

    def point_to(self, socket_path: Path | None, *, is_private: bool = False) -> None: ...


@dataclass(slots=True, eq=False)
class Seat:
    """An engine, the model it has or had last, and what it was given for it: nothing while it is parked.

    It `is_shut` from drain until it takes weights or resumes, and while parked: requests are held back, or refused.
    """

    engine: Engine
    target: Target
    supply: Supply | None
    is_shut: bool = False

    @property
    def takes_others(self) -> bool:
        """Not on a GPU with weights that are no image: what made them none, an engine may hold as well."""
        return self.supply is None or self.supply.plan is None or self.supply.is_image


# What an engine was given by a daemon before us: nothing, if it is parked. Raises if it cannot be found again.
Recall = Callable[[Engine, Holding], Awaitable[tuple[Target, Supply | None]]]


class Swapper:
    """Owns the engines. All calls on one event loop."""

    def __init__(
        self,
        supplier: Supplier,
        factories: Mapping[str, EngineFactory],
        endpoint: Endpoint,
        policy: Policy,
        *,
        on_change: Callable[[], None] = lambda: None,
        on_lost: Callable[[Target], None] = lambda target: None,
    ) -> None:
        """`on_lost` is told of a model whose engine ended unasked while it was the active one."""
        self._supplier = supplier
        self._factories = factories
        self._endpoint = endpoint
        self._policy = policy
        self._on_change = on_change
        self._on_lost = on_lost
        self._turn = asyncio.Lock()  # fair: waiters get it in the order they asked
        self._active: Seat | None = None
        self._parked: list[Seat] = []  # parked, or about to be; longest ago first
        self._closed = False
        self._state = SwapState.IDLE
        self._entered_at = 0.0
        self._phases: dict[str, float] = {}

    @property
    def state(self) -> SwapState:
        return self._state

    @property
    def active(self) -> Seat | None:
        return self._active

    @property
    def seats(self) -> list[Seat]:
        """All engines, the active one first."""
        return ([self._active] if self._active else []) + list(reversed(self._parked))

    async def swap(self, target: Target, on_progress: Progress = lambda done, total: None) -> Outcome:
        """Makes `target` the active model.

        Raises Unsupported, OutOfMemory, CorruptCheckpoint, TransferFailed or EngineFailed, and then what was active
        before is active again. Cancelling the call is safe at every moment.
        """
        async with self._turn:
            if self._closed:
                raise Busy("the daemon is stopping", hint="start it again: flash start")
            active = self._active
            if active and active.engine.state is EngineState.SERVING and active.target.is_same(target):
                return Outcome(target.model_name, active.engine.number, How.ALREADY_ACTIVE, Tier.HOST, 0.0)
            factory = self._factories[target.engine_kind]
            if reason := factory.refusal(target.checkpoint.manifest.architecture, target.checkpoint.side_files()):
                hint = "put the config.json of what it was made from beside its weights"
                raise Unsupported(f"{target.model_name} cannot run: {reason}", hint=hint)
            self._phases = {}
            self._enter(SwapState.LOADING)
            try:
                outcome = await self._take_over(target, on_progress)
            finally:
                self._enter(SwapState.IDLE)
            return replace(outcome, phases=dict(self._phases))

    async def prepare(self, target: Target) -> bool:
        """Has a parked engine make the image of a model that has none yet, in memory that is free, so that the first
        swap to it maps one.

        False if there is nothing to make, no room, or no such engine. Whoever answers is not touched. A cancel is
        obeyed between orders to the engine, for which swaps wait too. Raises what a swap raises.
        """
        async with self._turn:
            await self._read_key(target)
            sleeping = [seat for seat in self._takers(target) if seat.engine.state is EngineState.PARKED]
            if self._closed or not sleeping or not await self._supplier.fits_beside(target):
                return False
            seat, supply = sleeping[0], await self._supplier.provide(target)
            try:
                binding = await self._supplier.binding(target, supply)
                if not binding.wants_image:
                    return False
                await self._order(seat.engine, self._given(seat.engine, target, supply, seat.engine.wake(binding)))
            finally:
                if seat.engine.state is EngineState.SERVING:
                    seat.supply, seat.target, seat.is_shut = supply, target, False
                else:
                    supply.release()
                await _to_the_end(self._tidy())
            return supply.is_image

    async def park(self, target: Target | None = None, *, move_endpoint: Callable[[], None] | None = None) -> None:
        """Parks the active engine, if it has `target`; no model is active then. Raises NotFound if none was.

        The endpoint is gone then, unless `move_endpoint` makes it lead elsewhere.
        """
        async with self._turn:
            if self._active is None or (target is not None and not self._active.target.is_same(target)):
                raise NotFound("no model is active", hint="there is nothing to park")
            self._activate(None, move_endpoint)
            await _to_the_end(self._tidy())

    @property
    def has_parked(self) -> bool:
        return any(seat.engine.state is EngineState.PARKED for seat in self._parked)

    async def stop_parked(self, *, at_most: int) -> int:
        """Ends parked engines, those parked longest ago first; returns how many."""
        async with self._turn:
            return await self._stop_parked(at_most)

    async def stop_engine(self, number: int) -> None:
        """Ends one engine. Raises NotFound."""
        async with self._turn:
            for seat in self.seats:
                if seat.engine.number == number:
                    await _to_the_end(self._discard(seat))
                    return
            raise NotFound(f"there is no engine {number}", hint="flash status shows the engines")

    async def take_over(self, engines: Iterable[Engine], recall: Recall, active: Path | None) -> None:
        """Takes up engines that a daemon before us has left, each as soon as it says what it holds.

        The one with the socket `active`, to which the endpoint leads, is the active one; the others are parked, if they
        are not. What nobody can tell the state of is ended. May take as long as an order that was under way.
        """
        async with self._turn:
            rejoining = [asyncio.ensure_future(self._rejoined(engine, recall)) for engine in engines]
            try:
                for found in asyncio.as_completed(rejoining):
                    if (seat := await found) is not None:
                        await self._take_up(seat, is_active=seat.engine.socket_path == active)
            finally:
                for unfinished in rejoining:
                    unfinished.cancel()
            if self._active is None and active is not None:
                self._endpoint.point_to(None)
            await _to_the_end(self._tidy())

    async def _take_up(self, seat: Seat, *, is_active: bool) -> None:
        self._parked.append(seat)
        if not is_active or seat.engine.state is not EngineState.SERVING:
            self._on_change()
        elif await self._resumed(seat):
            self._activate(seat)

    async def _rejoined(self, engine: Engine, recall: Recall) -> Seat | None:
        engine.on_exit = lambda last_words: self._report_exit(engine, last_words)
        try:
            async with asyncio.timeout(self._policy.order_timeout_s + self._policy.drain_timeout_s):
                found = await engine.rejoin()
                target, supply = await recall(engine, found.holding)
        except (FlashdError, OSError, TimeoutError) as error:
            log.warning("engine %d, which a daemon before us left, is ended: %s", engine.number, error)
            await _to_the_end(engine.stop())
            return None
        log.info("engine %d, which a daemon before us left, is %s", engine.number, engine.state)
        return Seat(engine, target, supply, found.is_shut)

    async def close(self) -> bool:
        """Leaves the engines that are kept beyond us, and ends the others; swaps that still wait are refused.

        True if any was left.
        """
        self._closed = True
        async with self._turn:
            for seat in self.seats:
                if seat.engine.is_kept:
                    await seat.engine.leave()
                else:
                    await self._discard(seat)
        return bool(self.seats)

    def engine_exited(self, engine: Engine) -> None:
        """To be called when a process ends unasked: its seat is given up, whatever the moment."""
        seat = next((seat for seat in self.seats if seat.engine is engine), None)
        if seat is None:
            return
        was_active = seat is self._active
        self._forget(seat)
        if was_active and self._state in {SwapState.IDLE, SwapState.SERVING}:  # else the swap under way sees to it
            self._on_lost(seat.target)

    async def _take_over(self, target: Target, on_progress: Progress) -> Outcome:
        """The swap itself; on any error, what was active before is active again."""
        started = time.monotonic()
        before = self._active
        previous = before.target if before else None
        supply: Supply | None = None
        try:
            supply = await self._provide(target, on_progress)
            self._enter(SwapState.SWITCHING)
            how, engine = await self._switch(target, supply)
        except BaseException:
            self._enter(SwapState.ROLLING_BACK)
            await _to_the_end(self._roll_back(before, previous, supply))
            raise
        outcome = Outcome(target.model_name, engine.number, how, supply.from_tier, time.monotonic() - started)
        self._enter(SwapState.SERVING)
        await _to_the_end(self._tidy())
        return outcome

    async def _provide(self, target: Target, on_progress: Progress) -> Supply:
        """The new weights, beside the old ones if both fit, else in their place."""
        await self._read_key(target)
        old, starts = self._active, self._starts(target)
        try:
            return await self._supplier.provide(target, on_progress, starts=starts)
        except OutOfMemory:
            fits_without = self._supplier.fits_without
            if old is None or old.supply is None or not await fits_without(target, old.supply, starts=starts):
                raise
            self._enter(SwapState.MAKING_WAY)
            await self._put_away(old)
            self._enter(SwapState.LOADING)
            return await self._supplier.provide(target, on_progress, starts=self._starts(target))

    async def _switch(self, target: Target, supply: Supply) -> tuple[How, Engine]:
        """Gives the weights to an engine and makes it the active one: the one that is, a parked one, or a new one."""
        binding = await self._supplier.binding(target, supply)
        for seat in self._takers(target):
            if seat is self._active and seat.engine.state is EngineState.SERVING:
                await self._drain(seat)
                await _to_the_end(self._rebind(seat, target, supply, binding))
                return How.REBIND, seat.engine
            if seat.engine.state is EngineState.PARKED and await self._woken(seat, target, supply, binding):
                return How.WAKE, seat.engine
        try:
            return How.START, await self._started(target, supply, binding)
        except EngineOutOfMemory as error:
            # What parked engines take beside their weights is in no ledger.
            if not await self._stop_parked(len(self._parked)):
                raise
            log.warning("parked engines were stopped, for %s", error.message)
            return How.START, await self._started(target, supply, binding)

    async def _started(self, target: Target, supply: Supply, binding: Binding) -> Engine:
        if binding.is_image:
            layout = await asyncio.to_thread(target.checkpoint.layout_json)
            binding = replace(binding, checkpoint_layout=layout)
        engine = self._factories[target.engine_kind].create(target.options)
        engine.on_exit = lambda last_words: self._report_exit(engine, last_words)
        try:
            await self._given(engine, target, supply, engine.start(binding))
            supply.has_started()
            self._activate(Seat(engine, target, supply))
        except BaseException:
            await _to_the_end(engine.stop())
            raise
        return engine

    def _starts(self, target: Target) -> bool:
        """Whether a swap to it now would start an engine."""
        ready = {EngineState.SERVING, EngineState.PARKED}
        return not any(seat.engine.state in ready for seat in self._takers(target))

    async def _read_key(self, target: Target) -> None:
        """Files are read for it, the first time; factories remember what was in them."""
        await asyncio.to_thread(self._key, target)

    def _takers(self, target: Target) -> list[Seat]:
        """The engines that can take a model whose key was read, the active one first."""
        key = self._key(target)
        return [seat for seat in self.seats if key and seat.takes_others and self._key(seat.target) == key]

    def _key(self, target: Target) -> tuple[object, ...]:
        """What two models have in common that one engine can take in turn; empty if no engine can."""
        factory = self._factories[target.engine_kind]
        key = factory.rebind_key(target.checkpoint, target.options)
        return (factory.kind, target.private_to, key) if key else ()

    async def _rebind(self, seat: Seat, target: Target, supply: Supply, binding: Binding) -> None:
        await self._order(seat.engine, self._given(seat.engine, target, supply, seat.engine.rebind(binding)))
        old, seat.supply, seat.target, seat.is_shut = seat.supply, supply, target, False
        if old is not None:
            old.release()
        self._activate(seat)

    async def _woken(self, seat: Seat, target: Target, supply: Supply, binding: Binding) -> bool:
        """False if the engine turns out to have died in its sleep: another one can take its place."""
        try:
            await _to_the_end(self._wake(seat, target, supply, binding))
        except EngineFailed:
            if seat.engine.state is not EngineState.FAILED:
                raise
            await _to_the_end(self._discard(seat))
            return False
        return True

    async def _wake(self, seat: Seat, target: Target, supply: Supply, binding: Binding) -> None:
        self._release(seat)
        await self._order(seat.engine, self._given(seat.engine, target, supply, seat.engine.wake(binding)))
        seat.supply, seat.target, seat.is_shut = supply, target, False
        self._activate(seat)

    async def _given(self, engine: Engine, target: Target, supply: Supply, order: Awaitable[Made | None]) -> None:
        """What an engine makes of what it is given is ours. Its memory has an owner before a cancel counts."""
        if (made := await order) is not None:
            is_cancelled = await _to_the_end(self._supplier.take_in(target, supply, made))
            if supply.is_image:
                engine.has_become(supply.forms)
            if is_cancelled:
                raise asyncio.CancelledError

    async def _roll_back(self, before: Seat | None, previous: Target | None, supply: Supply | None) -> None:
        """Undoes a swap. What was active is put back where it was, or into whichever engine can take it."""
        for seat in self.seats:
            if seat.engine.state is EngineState.FAILED or (supply is not None and seat.supply is supply):
                await self._discard(seat)  # dead, or bound to the new model already
        if supply is not None:
            supply.release()
        if before is None or previous is None:
            return
        try:
            if not await self._resumed(before):
                with contextlib.ExitStack() as on_error:
                    supply = await self._supplier.provide(previous, starts=self._starts(previous))
                    on_error.callback(supply.release)
                    await self._switch(previous, supply)
                    on_error.pop_all()
        except (FlashdError, OSError) as error:
            log.error("%s could not be put back: %s", previous.model_name, error)
            self._activate(None)
            await self._tidy()

    async def _resumed(self, seat: Seat) -> bool:
        """Whether an engine that was drained at most, if at all, answers again."""
        if seat.engine.state is not EngineState.SERVING:
            return False
        try:
            if seat.is_shut:
                await self._resume(seat)
        except EngineFailed:
            await self._discard(seat)
            return False
        return True

    def _activate(self, seat: Seat | None, move_endpoint: Callable[[], None] | None = None) -> None:
        """Moves the endpoint; whoever was active is among the parked, and soon will be parked."""
        if move_endpoint is not None:
            move_endpoint()
        elif seat is None:
            self._endpoint.point_to(None)
        else:
            self._endpoint.point_to(seat.engine.socket_path, is_private=seat.target.private_to is not None)
        old, self._active = self._active, seat
        if seat in self._parked:
            self._parked.remove(seat)
        if old is not None and old is not seat:
            self._parked.append(old)
        self._on_change()

    async def _tidy(self) -> None:
        """Puts away whoever is not active any more, and stops those that are too many."""
        for seat in list(self._parked):
            await self._put_away(seat)
        await self._stop_parked(len(self._parked) - self._policy.max_parked)

    async def _put_away(self, seat: Seat) -> None:
        """Parks it, or stops it if it cannot be parked, or never would be woken; what it is answering has its time."""
        try:
            if seat.engine.state is EngineState.SERVING:
                await (self._park(seat) if self._key(seat.target) else self._drain(seat))
        except EngineFailed as error:
            log.warning("engine %d could not be parked: %s", seat.engine.number, error)
        if seat.engine.state is not EngineState.PARKED:
            await _to_the_end(self._discard(seat))

    async def _stop_parked(self, at_most: int) -> int:
        doomed = [seat for seat in self._parked if seat.engine.state is EngineState.PARKED][: max(0, at_most)]
        for seat in doomed:
            await _to_the_end(self._discard(seat))
        return len(doomed)

    async def _park(self, seat: Seat) -> None:
        await self._drain(seat)
        try:
            await self._order(seat.engine, seat.engine.park())
        finally:
            if seat.engine.state is not EngineState.SERVING:
                self._release(seat)  # also if we are cancelled: it has let go of it
            self._on_change()

    async def _drain(self, seat: Seat) -> None:
        limit_s = self._policy.drain_timeout_s
        seat.is_shut = True
        await self._order(seat.engine, seat.engine.drain(limit_s), extra_s=limit_s)

    async def _resume(self, seat: Seat) -> None:
        await self._order(seat.engine, seat.engine.resume())
        seat.is_shut = False

    async def _order(self, engine: Engine, order: Coroutine[Any, Any, None], extra_s: float = 0.0) -> None:
        """Awaits what an engine was told to do to its end, and obeys a cancel then.

        One that does not answer is ended: nobody could say what it holds.
        """
        limit_s = self._policy.order_timeout_s + extra_s
        try:
            is_cancelled = await _to_the_end(asyncio.wait_for(order, limit_s))
        except TimeoutError:
            await _to_the_end(engine.stop())
            hint = "its log may tell what kept it; the next swap gets another engine"
            raise EngineFailed(
                f"engine {engine.number} did not answer for {limit_s:.0f} s and was ended", hint=hint
            ) from None
        if is_cancelled:
            raise asyncio.CancelledError

    async def _discard(self, seat: Seat) -> None:
        await seat.engine.stop()
        self._forget(seat)

    def _forget(self, seat: Seat) -> None:
        self._release(seat)
        if seat in self._parked:
            self._parked.remove(seat)
        if seat is self._active:
            self._active = None
            self._endpoint.point_to(None)
        self._on_change()

    def _release(self, seat: Seat) -> None:
        if seat.supply is not None:
            seat.supply.release()
            seat.supply = None

    def _report_exit(self, engine: Engine, last_words: str) -> None:
        log.error("engine %d ended unasked: %s", engine.number, last_words)
        self.engine_exited(engine)

    def _enter(self, state: SwapState) -> None:
        assert state in TRANSITIONS[self._state], f"{self._state} to {state}"
        now = time.monotonic()
        if self._state is not SwapState.IDLE:
            self._phases[self._state] = self._phases.get(self._state, 0.0) + now - self._entered_at
        self._state, self._entered_at = state, now
        self._on_change()


async def _to_the_end(step: Coroutine[Any, Any, None]) -> bool:
    """Runs a step that must not be left half done. True if a cancel came meanwhile: the caller's to obey or ignore."""
    task = asyncio.ensure_future(step)
    is_cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            is_cancelled = True
    task.result()
    return is_cancelled
