# SPDX-License-Identifier: Apache-2.0
"""What do engines do and take, when last asked? And has the active one been idle for too long?"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from flashd.engines.engine import EngineState, EngineStats
from flashd.errors import FlashdError
from flashd.supply import Target
from flashd.swap import Swapper, SwapState

_ASK_EVERY_S = 2.0
_NOTHING = EngineStats(active_requests=0, memory_bytes=0, seen_requests=0)


class EngineStatsBook:
    """Asks every engine now and then, until `close`. There is nothing to do while there is no engine."""

    def __init__(
        self,
        swapper: Swapper,
        *,
        idle_timeout_s: Callable[[Target], float],
        on_change: Callable[[int], None],
        on_idle: Callable[[Target], None],
    ) -> None:
        """`on_change` hears the number of an engine, `on_idle` of the active model when it was idle for so long."""
        self._swapper = swapper
        self._idle_timeout_s = idle_timeout_s
        self._on_change = on_change
        self._on_idle = on_idle
        self._known: dict[int, EngineStats] = {}
        self._busy_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="engine stats")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def of(self, number: int) -> EngineStats:
        return self._known.get(number, _NOTHING)

    def note_activity(self) -> None:
        """A swap counts as use."""
        self._busy_at = time.monotonic()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_ASK_EVERY_S)
            active = self._swapper.active
            before = self.of(active.engine.number).seen_requests if active else 0
            await self._ask_all()
            if active is None or self._swapper.state is not SwapState.IDLE:
                self.note_activity()
                continue
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
