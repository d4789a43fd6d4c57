# SPDX-License-Identifier: Apache-2.0
"""Which requests may run now? The gate between the HTTP server and the model.

open     requests pass
held     requests wait: the model is being swapped under them, which takes milliseconds
parked   requests are refused at once: this engine holds no weights
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Any

HELD_AT_MOST_S = 30.0
_CUT_S = 5.0  # a request that was told to stop does so after the token it is at


class NotServing(Exception):
    """The engine cannot answer now; the message says why, for the client."""


class GateState(StrEnum):
    OPEN = "open"
    HELD = "held"
    PARKED = "parked"


class Gate:
    """To be used on the server's event loop only."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._parked = True
        self._inside: dict[object, threading.Event] = {}  # requests, and their work in threads
        self.seen = 0  # requests that were let in since the start
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active(self) -> int:
        """Requests inside now."""
        return sum(isinstance(who, threading.Event) for who in self._inside)

    @property
    def state(self) -> GateState:
        if self._parked:
            return GateState.PARKED
        return GateState.OPEN if self._open.is_set() else GateState.HELD

    @asynccontextmanager
    async def passage(self, cut: threading.Event | None = None) -> AsyncIterator[threading.Event]:
        """A request's time inside. The event, its own or a new one, is set when it must end early."""
        cut = cut or threading.Event()
        try:
            await asyncio.wait_for(self._admitted(), HELD_AT_MOST_S)
        except TimeoutError:
            raise NotServing("the engine was busy with a swap for too long; try again") from None
        self.seen += 1
        self._enter(cut, cut)
        try:
            yield cut
        finally:
            self._leave(cut)

    def track(self, work: asyncio.Future[Any], cut: threading.Event) -> None:
        """Work in a thread is inside until it has ended, even if whoever asked for it has left before."""
        self._enter(work, cut)
        work.add_done_callback(self._leave)

    async def drain(self, timeout_s: float) -> None:
        """Holds new requests; those inside finish, or are cut after `timeout_s`."""
        self._open.clear()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            for cut in self._inside.values():
                cut.set()
            await asyncio.wait_for(self._idle.wait(), _CUT_S)

    def open(self) -> None:
        self._parked = False
        self._open.set()

    def park(self) -> None:
        """Refuses whoever waits, and whoever comes."""
        self._parked = True
        self._open.set()

    def _enter(self, who: object, cut: threading.Event) -> None:
        self._inside[who] = cut
        self._idle.clear()

    def _leave(self, who: object) -> None:
        self._inside.pop(who, None)
        if not self._inside:
            self._idle.set()

    async def _admitted(self) -> None:
        await self._open.wait()
        if self._parked:
            raise NotServing("this engine is parked: swap to a model first (flash swap MODEL)")
