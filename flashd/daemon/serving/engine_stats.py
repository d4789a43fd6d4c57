# SPDX-License-Identifier: Apache-2.0
"""Statistics of engines: what each does and takes, and which have been idle for too long."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Mapping

from flashd.daemon.events import Events
from flashd.engines.engine import EngineState, EngineStats
from flashd.engines.process_info import family
from flashd.errors import FlashdError
from flashd.swap.slots import EngineSlot
from flashd.swap.swapper import Swapper, SwapState
from flashd.swap.weights import Target
from flashd.tasks import Routine, end

_ASK_EVERY_S = 2.0
_NOTHING = EngineStats(active_requests=0, memory_bytes=0, seen_requests=0)


class EngineStatsBook(Routine):
    """Asks all engines at intervals."""

    def __init__(
        self,
        swapper: Swapper,
        events: Events,
        *,
        idle_timeout_s: Callable[[Target], float],
        device_bytes: Callable[[], Mapping[int, int]],
    ) -> None:
        """`device_bytes` returns the GPU memory of processes, and is called in a thread."""
        super().__init__("engine stats", self._look)
        self._swapper = swapper
        self._idle_timeout_s = idle_timeout_s
        self._events = events
        self._ask_devices = device_bytes
        self._known: dict[int, EngineStats] = {}
        self._device_bytes: dict[int, int] = {}
        self._busy_at: dict[tuple[int, str], float] = {}  # by engine and model
        self._limits_s: dict[tuple[int, str], float] = {}  # in place of the configured idle time
        self._is_due = asyncio.Event()  # to look at once
        self._asking: asyncio.Task[None] | None = None
        events.engines_changed.subscribe(self.note_activity)

    async def close(self) -> None:
        await super().close()
        await end(self._asking)

    def of(self, number: int) -> EngineStats:
        return self._known.get(number, _NOTHING)

    def device_bytes(self, number: int) -> int:
        """Returns the GPU memory of an engine's processes on all GPUs."""
        return self._device_bytes.get(number, 0)

    def note_activity(self) -> None:
        """Counts from now on for what has just come to serve."""
        now, before = time.monotonic(), self._busy_at
        keys = [(slot.engine.number, slot.target.model_name) for slot in self._swapper.slots.serving]
        self._busy_at = {key: before.get(key, now) for key in keys}
        self._limits_s = {key: limit_s for key, limit_s in self._limits_s.items() if key in self._busy_at}

    def keep(self, slot: EngineSlot, limit_s: float) -> None:
        """Sets the idle time after which this model is parked, for as long as it serves; infinite for never."""
        self._limits_s[slot.engine.number, slot.target.model_name] = limit_s
        if limit_s == 0:
            self._is_due.set()

    async def _look(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ASK_EVERY_S):
                await self._is_due.wait()
        self._is_due.clear()
        before = {slot.engine.number: self.of(slot.engine.number).seen_requests for slot in self._swapper.slots.serving}
        await self._ask_all()
        if self._swapper.state is not SwapState.IDLE:
            self.note_activity()
            return
        now = time.monotonic()
        for slot in self._swapper.slots.serving:
            number = slot.engine.number
            stats = self.of(number)
            key = (number, slot.target.model_name)
            limit_s = self._limits_s.get(key, self._idle_timeout_s(slot.target) or math.inf)
            if stats.active_requests or (limit_s > 0 and stats.seen_requests != before.get(number)):
                self._busy_at[key] = slot.used_at = now
            elif limit_s == 0 or now - self._busy_at.get(key, now) > limit_s:
                self._busy_at[key] = now
                self._events.engine_idle(slot.target)

    async def _ask_all(self) -> None:
        engines = [slot.engine for slot in self._swapper.slots]
        self._known = {number: stats for number, stats in self._known.items() if number in {e.number for e in engines}}
        for engine in engines:
            if engine.state not in {EngineState.SERVING, EngineState.PARKED}:
                continue
            with contextlib.suppress(FlashdError):  # it may be ending, which is reported elsewhere
                stats = await engine.stats()
                if stats != self._known.get(engine.number):
                    self._known[engine.number] = stats
                    self._events.engine_changed(engine.number)
        if engines and (self._asking is None or self._asking.done()):  # a driver may be slow or hang
            pids = {engine.number: engine.pid for engine in engines}
            self._asking = asyncio.create_task(self._ask_drivers(pids), name="engines' device memory")

    async def _ask_drivers(self, pids: Mapping[int, int]) -> None:
        def ask() -> dict[int, int]:
            by_process = self._ask_devices()
            if not by_process:
                return {}
            return {number: sum(by_process.get(member, 0) for member in family(pid)) for number, pid in pids.items()}

        before, self._device_bytes = self._device_bytes, await asyncio.to_thread(ask)
        for number, size_bytes in self._device_bytes.items():
            if size_bytes != before.get(number, 0):
                self._events.engine_changed(number)
