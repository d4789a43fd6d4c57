# SPDX-License-Identifier: Apache-2.0
"""How does one model take over from another, without anybody losing what they had?

from        to                     what happens
idle        loading                a swap's turn has come
loading     making_way, switching  the new weights are brought into memory, while the old model answers
making_way  loading                both do not fit: the old engine is drained and parked, its weights may be evicted
switching   serving                an engine is rebound, woken or started with the new weights; the endpoint moves
serving     idle                   the old engine is drained and parked
any         rolling_back           something failed, or was cancelled
rolling_back idle                  the old model answers again, or, if its engine is gone, none does

Swaps happen one at a time, in the order asked. A swap to a model that a waiting swap already wants joins it. Until
`switching` has succeeded nothing of the old state is given up that cannot be had back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from flashd.checkpoint.files import Checkpoint
from flashd.engines.engine import Binding, Engine, EngineFactory, EngineState
from flashd.errors import FlashdError, NotFound, OutOfMemory, Unsupported
from flashd.memory.arena import rounded
from flashd.memory.residency import Hold, Progress, Residency, Tier

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
    SwapState.SERVING: frozenset({SwapState.IDLE, SwapState.ROLLING_BACK}),
    SwapState.ROLLING_BACK: frozenset({SwapState.IDLE}),
}


class How(StrEnum):
    """How the new model's first token became possible."""

    ALREADY_ACTIVE = "already-active"
    REBIND = "rebind"
    WAKE = "wake"
    START = "start"


@dataclass(frozen=True, slots=True)
class Target:
    """The model that a swap wants. `names` are what requests may call it."""

    model_name: str
    names: tuple[str, ...]
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class Outcome:
    """`phases` has the seconds spent in each state; `from_tier` is where the weights were."""

    model_name: str
    engine_number: int
    how: How
    from_tier: Tier
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits in seconds; `max_parked` engines stay parked, the one parked longest ago is stopped first."""

    drain_timeout_s: float = 10.0
    max_parked: int = 2


class Endpoint(Protocol):
    """The one address of whichever model is active."""

    def point_to(self, socket_path: Path | None) -> None: ...


@dataclass(slots=True)
class Seat:
    """An engine and what it holds in memory; no hold while it is parked."""

    engine: Engine
    target: Target
    hold: Hold | None


class Swapper:
    """Owns the engines. All calls on one event loop."""

    def __init__(
        self,
        residency: Residency,
        factory: EngineFactory,
        endpoint: Endpoint,
        policy: Policy,
        *,
        on_change: Callable[[], None] = lambda: None,
        on_lost: Callable[[Target], None] = lambda target: None,
    ) -> None:
        """`on_lost` is told of a model whose engine ended unasked while it was the active one."""
        self._residency = residency
        self._factory = factory
        self._endpoint = endpoint
        self._policy = policy
        self._on_change = on_change
        self._on_lost = on_lost
        self._turn = asyncio.Lock()  # fair: waiters get it in the order they asked
        self._active: Seat | None = None
        self._parked: list[Seat] = []  # parked longest ago first
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

        Raises Unsupported, OutOfMemory, CorruptCheckpoint, TransferFailed, EngineFailed or Cancelled, and then what was
        active before is active still. Cancelling the call is safe at every moment.
        """
        async with self._turn:
            started = time.monotonic()
            active = self._active
            if active and active.engine.state is EngineState.SERVING and _is_same(active.target, target):
                active.target = target
                return Outcome(target.model_name, active.engine.number, How.ALREADY_ACTIVE, Tier.HOST, 0.0)
            if reason := self._factory.refusal(target.checkpoint.manifest.architecture, target.checkpoint.side_files()):
                raise Unsupported(f"{target.model_name} cannot run: {reason}", hint="flash show tells its architecture")
            self._phases = {}
            self._enter(SwapState.LOADING)
            try:
                how, from_tier = await self._take_over(target, on_progress)
            finally:
                self._enter(SwapState.IDLE)
            assert self._active is not None
            seconds = time.monotonic() - started
            return Outcome(target.model_name, self._active.engine.number, how, from_tier, seconds, dict(self._phases))

    async def park(self) -> None:
        """Parks the active engine; no model is active then. Raises NotFound if none was."""
        async with self._turn:
            if self._active is None:
                raise NotFound("no model is active", hint="there is nothing to park")
            seat, self._active = self._active, None
            self._endpoint.point_to(None)
            await _to_the_end(self._retire(seat))
            await self._stop_surplus()

    async def stop_engine(self, number: int) -> None:
        """Ends one engine. Raises NotFound."""
        async with self._turn:
            for seat in self.seats:
                if seat.engine.number == number:
                    await self._discard(seat)
                    self._on_change()
                    return
            raise NotFound(f"there is no engine {number}", hint="flash status shows the engines")

    async def close(self) -> None:
        """Ends all engines."""
        async with self._turn:
            for seat in self.seats:
                await self._discard(seat)

    def engine_exited(self, engine: Engine) -> None:
        """To be called when a process ends unasked: its seat is given up, whatever the moment."""
        for seat in self.seats:
            if seat.engine is engine:
                was_active = seat is self._active
                self._forget(seat)
                self._on_change()
                if was_active and self._state is SwapState.IDLE:
                    self._on_lost(seat.target)

    async def _take_over(self, target: Target, on_progress: Progress) -> tuple[How, Tier]:
        """The swap itself; on any error, what was active before is active again."""
        old = self._active
        hold: Hold | None = None
        try:
            hold = await self._acquire(target, on_progress)
            self._enter(SwapState.SWITCHING)
            how = await self._switch(target, hold)
        except BaseException:
            self._enter(SwapState.ROLLING_BACK)
            if hold is not None:
                hold.release()
            await _to_the_end(self._restore(old))
            raise
        self._enter(SwapState.SERVING)
        seat = self._active
        assert seat is not None
        self._endpoint.point_to(seat.engine.socket_path)
        self._on_change()
        if old is not None and old is not seat and old.engine.state is EngineState.SERVING:
            await _to_the_end(self._retire(old))
        await self._stop_surplus()
        return how, hold.from_tier

    async def _acquire(self, target: Target, on_progress: Progress) -> Hold:
        """The new weights, beside the old ones if both fit, else in their place."""
        try:
            return await self._residency.acquire(target.checkpoint, on_progress)
        except OutOfMemory:
            old = self._active
            if old is None or old.hold is None or not self._fits_alone(target, old):
                raise
            self._enter(SwapState.MAKING_WAY)
            await self._make_way(old)
            self._enter(SwapState.LOADING)
            return await self._residency.acquire(target.checkpoint, on_progress)

    def _fits_alone(self, target: Target, old: Seat) -> bool:
        """Whether the pool could take the target if the old model gave up its place."""
        assert old.hold is not None
        fixed_bytes = self._residency.fixed_bytes()
        if self._residency.holds(old.hold.checkpoint_id) == 1:
            fixed_bytes -= old.hold.arena.mapped_bytes
        needed_bytes = rounded(target.checkpoint.manifest.data_bytes, self._residency.device.huge_pages)
        return needed_bytes <= self._residency.pool.budget_bytes - fixed_bytes

    async def _make_way(self, old: Seat) -> None:
        await old.engine.drain(self._policy.drain_timeout_s)
        await _to_the_end(old.engine.park())
        self._release(old)

    async def _switch(self, target: Target, hold: Hold) -> How:
        """Gives the weights to an engine: the active one, a parked one, or a new one."""
        key = target.checkpoint.manifest.architecture_key
        binding = _binding(target, hold)
        active = self._active
        if active and key and active.engine.state is EngineState.SERVING and _key(active) == key:
            await self._rebind(active, target, hold, binding)
            return How.REBIND
        for seat in ([active] if active else []) + list(reversed(self._parked)):
            if key and seat.engine.state is EngineState.PARKED and _key(seat) == key:
                await self._wake(seat, target, hold, binding)
                return How.WAKE
        engine = self._factory.create()
        engine.on_exit = lambda last_words: self._report_exit(engine, last_words)
        try:
            await engine.start(binding)
        except BaseException:
            await _to_the_end(engine.stop())
            raise
        self._seat_as_active(Seat(engine, target, hold))
        return How.START

    async def _rebind(self, seat: Seat, target: Target, hold: Hold, binding: Binding) -> None:
        await seat.engine.drain(self._policy.drain_timeout_s)
        await _to_the_end(seat.engine.rebind(binding))
        old_hold, seat.hold, seat.target = seat.hold, hold, target
        if old_hold is not None:
            old_hold.release()
        await _to_the_end(seat.engine.resume())

    async def _wake(self, seat: Seat, target: Target, hold: Hold, binding: Binding) -> None:
        await _to_the_end(seat.engine.wake(binding))
        seat.hold, seat.target = hold, target
        self._seat_as_active(seat)

    def _seat_as_active(self, seat: Seat) -> None:
        if seat in self._parked:
            self._parked.remove(seat)
        old, self._active = self._active, seat
        if old is not None and old is not seat and old.engine.state is EngineState.PARKED:
            self._parked.append(old)  # it made way

    async def _restore(self, old: Seat | None) -> None:
        """Puts back what was active. An engine that cannot be put back is stopped: never one in an unknown state."""
        self._active = old
        if old is None or old.engine.state is EngineState.FAILED:
            if old is not None:
                self._forget(old)
            self._endpoint.point_to(None)
            return
        try:
            if old.engine.state is EngineState.PARKED:
                hold = await self._residency.acquire(old.target.checkpoint)
                try:
                    await old.engine.wake(_binding(old.target, hold))
                except BaseException:
                    hold.release()
                    raise
                old.hold = hold
            await old.engine.resume()
            self._endpoint.point_to(old.engine.socket_path)
        except FlashdError as error:
            log.error("%s could not be put back: %s", old.target.model_name, error)
            await self._discard(old)
        self._on_change()

    async def _retire(self, seat: Seat) -> None:
        """Drains and parks an engine that is not needed now; one that cannot be parked is stopped."""
        try:
            await seat.engine.drain(self._policy.drain_timeout_s)
            await seat.engine.park()
            self._release(seat)
            self._parked.append(seat)
        except FlashdError as error:
            log.warning("engine %d could not be parked: %s", seat.engine.number, error)
            await self._discard(seat)
        self._on_change()

    async def _stop_surplus(self) -> None:
        while len(self._parked) > self._policy.max_parked:
            await _to_the_end(self._discard(self._parked[0]))
            self._on_change()

    async def _discard(self, seat: Seat) -> None:
        await seat.engine.stop()
        self._forget(seat)

    def _forget(self, seat: Seat) -> None:
        if seat is self._active:
            self._active = None
            self._endpoint.point_to(None)
        with contextlib.suppress(ValueError):
            self._parked.remove(seat)
        self._release(seat)

    def _release(self, seat: Seat) -> None:
        if seat.hold is not None:
            seat.hold.release()
            seat.hold = None

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


async def _to_the_end(step: Coroutine[Any, Any, None]) -> None:
    """Runs a short step that must not be left half done: a cancel that comes meanwhile comes too late."""
    task = asyncio.ensure_future(step)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    task.result()


def _is_same(one: Target, other: Target) -> bool:
    return one.model_name == other.model_name and one.checkpoint.id == other.checkpoint.id


def _key(seat: Seat) -> str:
    return seat.target.checkpoint.manifest.architecture_key


def _binding(target: Target, hold: Hold) -> Binding:
    checkpoint = target.checkpoint
    return Binding(
        model_name=target.model_name,
        names=target.names,
        checkpoint_id=checkpoint.id,
        architecture_key=checkpoint.manifest.architecture_key,
        arena_fd=hold.arena.fd,
        arena_bytes=hold.arena.size_bytes,
        layout=checkpoint.layout_json(),
        side_files=checkpoint.side_files(),
    )
