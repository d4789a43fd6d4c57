# SPDX-License-Identifier: Apache-2.0
"""What do engines do and take, when last asked? And has the active one been idle for too long?"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

from flashd.daemon.threads import Routine, end
from flashd.engines.engine import EngineState, EngineStats
from flashd.engines.surroundings import family
from flashd.errors import FlashdError
from flashd.supply import Target
from flashd.swap import Swapper, SwapState

_ASK_EVERY_S = 2.0
_NOTHING = EngineStats(active_requests=0, memory_bytes=0, seen_requests=0)


class EngineStatsBook(Routine):
    """Asks every engine now and then. There is nothing to do while there is no engine."""

    def __init__(
        self,
        swapper: Swapper,
        *,
        idle_timeout_s: Callable[[Target], float],
        device_bytes: Callable[[], Mapping[int, int]],
        on_change: Callable[[int], None],
        on_idle: Callable[[Target], None],
    ) -> None:
        """`device_bytes` tells what processes have of GPUs, in a thread. `on_change` hears the number of an engine,
        `on_idle` of the active model when it was idle for so long."""
        super().__init__("engine stats", self._look)
        self._swapper = swapper
        self._idle_timeout_s = idle_timeout_s
        self._on_change = on_change
        self._on_idle = on_idle
        self._ask_devices = device_bytes
        self._known: dict[int, EngineStats] = {}
        self._device_bytes: dict[int, int] = {}
        self._busy_at = time.monotonic()
        self._asking: asyncio.Task[None] | None = None

    async def close(self) -> None:
        await super().close()
        await end(self._asking)

    def of(self, number: int) -> EngineStats:
        return self._known.get(number, _NOTHING)

    def device_bytes(self, number: int) -> int:
        """What an engine's processes have of all GPUs."""
        return self._device_bytes.get(number, 0)

    def note_activity(self) -> None:
        """A swap counts as use."""
        self._busy_at = time.monotonic()

    async def _look(self) -> None:
        await asyncio.sleep(_ASK_EVERY_S)
        active = self._swapper.active
        before = self.of(active.engine.number).seen_requests if active else 0
        await self._ask_all()
        if active is None or self._swapper.state is not SwapState.IDLE:
            self.note_activity()
            return
        limit_s, now = self._idle_timeout_s(active.target), self.of(active.engine.number)
        if now.active_requests or now.seen_requests != before:
            self.note_activity()
        elif limit_s and time.monotonic() - self._busy_at > limit_s:
            self.note_activity()
            self._on_idle(active.target)

    async def _ask_all(self) -> None:
        engines = [seat.engine for seat in self._swapper.seats]
        self._known = {number: stats for number, stats in self._known.items() if number in {e.number for e in engines}}
        for engine in engines:
            if engine.state not in {EngineState.SERVING, EngineState.PARKED}:
                continue
            with contextlib.suppress(FlashdError):  # it may be ending: whoever waits for it says so
                stats = await engine.stats()
                if stats != self._known.get(engine.number):
                    self._known[engine.number] = stats
                    self._on_change(engine.number)
        if engines and (self._asking is None or self._asking.done()):  # a driver may take its time, or hang
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
                self._on_change(number)
