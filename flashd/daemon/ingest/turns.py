# SPDX-License-Identifier: Apache-2.0
"""The order of conversions: one at a time for each owner, and a few in total, because more only make the disk seek.

A conversion without progress loses its turn, because its file system may never answer. It continues if that answers.
Owners get turns in rotation, however many sources they have.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

AT_ONCE = 2
STILL_S = 3.0  # a conversion without progress for this time is stalled
MOST_STALLED = 8  # most stalled conversions of one owner, because each keeps threads; others of that owner wait
_LOOK_S = 0.5


class Turn:
    """A turn, from the permission to begin a conversion to the end of its thread. Any thread may call `moved`."""

    def __init__(self, owner: int, on_change: Callable[[bool], None]) -> None:
        self.owner = owner
        self.is_stalled = False
        self._on_change = on_change
        self._moved_at = time.monotonic()

    def moved(self) -> None:
        self._moved_at = time.monotonic()

    def look(self) -> None:
        """Reports when the conversion stalls or continues."""
        is_stalled = time.monotonic() - self._moved_at > STILL_S
        if is_stalled != self.is_stalled:
            self.is_stalled = is_stalled
            self._on_change(is_stalled)


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    turn: Turn
    begins: asyncio.Future[None]


class Turns:
    """The turns, and the conversions waiting for one. `on_stalled` is called repeatedly while a turn is stalled."""

    def __init__(self, on_stalled: Callable[[], None] = lambda: None) -> None:
        self._on_stalled = on_stalled
        self._waiting: list[_Waiting] = []
        self._turns: list[Turn] = []
        self._last: dict[int, float] = {}  # time of each owner's last turn
        self._timer: asyncio.TimerHandle | None = None

    async def take(self, owner: int, on_change: Callable[[bool], None] = lambda is_stalled: None) -> Turn:
        """Waits for a turn, which lasts until `end`. `on_change` is called with whether it stalls."""
        waiting = _Waiting(Turn(owner, on_change), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._admit()
        try:
            await waiting.begins
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            else:
                self.end(waiting.turn)  # it has just been given a turn
            raise
        return waiting.turn

    def end(self, turn: Turn) -> None:
        self._turns.remove(turn)
        self._admit()

    def _admit(self) -> None:
        while (waiting := self._next()) is not None:
            self._waiting.remove(waiting)
            waiting.turn.moved()
            self._turns.append(waiting.turn)
            self._last[waiting.turn.owner] = time.monotonic()
            waiting.begins.set_result(None)
        if self._turns and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def _next(self) -> _Waiting | None:
        moving = [turn.owner for turn in self._turns if not turn.is_stalled]
        stalled = Counter(turn.owner for turn in self._turns if turn.is_stalled)
        if len(moving) >= AT_ONCE:
            return None
        may = [
            waiting
            for waiting in self._waiting
            if not waiting.begins.done()  # it has just been cancelled
            and waiting.turn.owner not in moving
            and stalled[waiting.turn.owner] < MOST_STALLED
        ]
        return min(may, key=lambda waiting: self._last.get(waiting.turn.owner, 0.0), default=None)

    def _look(self) -> None:
        self._timer = None
        for turn in list(self._turns):
            turn.look()
        if any(turn.is_stalled for turn in self._turns):
            self._on_stalled()
        self._admit()
