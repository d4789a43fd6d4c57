# SPDX-License-Identifier: Apache-2.0
"""The gate between the HTTP server and the model, which decides when requests may run.

open     requests pass
held     requests wait, because the model is being swapped, which takes milliseconds
leaving  new requests are refused at once, because another engine answers now; those inside finish
parked   the same, and this engine holds no weights
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from flashd.engines.messages import GateState
from flashd.errors import EngineFailed

HELD_AT_MOST_S = 30.0
CUT_S = 3.0  # a request that is cut ends after its current token
_PARKED = "this engine is parked: swap to a model first (flash swap MODEL)"


class NotServing(Exception):
    """Raised if the engine cannot answer now, with a message for the client."""


class Elsewhere(NotServing):
    """Raised if another engine answers now, or none."""


class Gate:
    """The gate, for the server's event loop only.

    Checking the state and entering are one step, without an await in between, and `open` admits all waiting requests
    before the gate can be shut again. So `drain` waits for all admitted requests.
    """

    def __init__(self) -> None:
        self._state = GateState.PARKED
        self._waiting: dict[threading.Event, asyncio.Future[None]] = {}  # while held, in order of arrival
        self._inside: dict[object, threading.Event] = {}  # requests and their work in threads
        self._until_cut: set[object] = set()  # work inside that is cut instead of awaited
        self.seen = 0  # requests admitted since the start
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active(self) -> int:
        """Number of requests inside now."""
        return len({id(cut) for cut in list(self._inside.values())})  # called from another thread too

    @property
    def state(self) -> GateState:
        return self._state

    @property
    def serves(self) -> bool:
        """True if a request that comes now is answered here, perhaps after waiting."""
        return self._state in {GateState.OPEN, GateState.HELD}

    @asynccontextmanager
    async def passage(self, cut: threading.Event | None = None) -> AsyncIterator[threading.Event]:
        """Admits a request for the duration of the block. Yields `cut` or a new event, set when it must end early."""
        cut = cut or threading.Event()
        try:
            await self._admitted(cut)
            yield cut
        finally:
            self._leave(cut)

    def track(self, work: asyncio.Future[Any], cut: threading.Event, *, until_cut: bool = False) -> None:
        """Counts work in a thread as inside until it has ended, even if its client has left before.

        With `until_cut`, work that no longer needs the model, such as sending an answer to a slow client, counts only
        until it is cut.
        """
        self._enter(work, cut)
        if until_cut:
            self._until_cut.add(work)
        work.add_done_callback(self._leave)

    async def drain(self, timeout_s: float, *, leaving: bool = False) -> None:
        """Holds new requests, or refuses them if this engine is `leaving`, and waits for those inside.

        They are cut after `timeout_s`. Raises EngineFailed if one goes on in spite of that.
        """
        self._state = GateState.HELD
        if leaving:
            self._refuse(GateState.LEAVING)
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            for cut in list(self._inside.values()):
                cut.set()
            for who in list(self._until_cut):
                self._leave(who)
            try:
                async with asyncio.timeout(CUT_S):
                    await self._idle.wait()
            except TimeoutError:
                raise EngineFailed(f"{len(self._inside)} requests still run {CUT_S:g} s after they were cut") from None

    def open(self) -> None:
        self._state = GateState.OPEN
        for cut, waiter in self._waiting.items():
            if not waiter.done():
                self._admit(cut)
                waiter.set_result(None)

    def park(self) -> None:
        """Refuses waiting and new requests."""
        self._refuse(GateState.PARKED)

    def _refuse(self, state: GateState) -> None:
        self._state = state
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(Elsewhere(_PARKED))

    async def _admitted(self, cut: threading.Event) -> None:
        """Waits until this request is admitted. Raises NotServing if it is not."""
        match self._state:
            case GateState.OPEN:
                self._admit(cut)
            case GateState.LEAVING | GateState.PARKED:
                raise Elsewhere(_PARKED)
            case GateState.HELD:
                self._waiting[cut] = asyncio.get_running_loop().create_future()
                try:
                    async with asyncio.timeout(HELD_AT_MOST_S):
                        await self._waiting[cut]
                except TimeoutError:
                    if cut not in self._inside:  # otherwise it was admitted at the last moment
                        raise NotServing("the engine was busy with a swap for too long; try again") from None
                finally:
                    del self._waiting[cut]

    def _admit(self, cut: threading.Event) -> None:
        self.seen += 1
        self._enter(cut, cut)

    def _enter(self, who: object, cut: threading.Event) -> None:
        self._inside[who] = cut
        self._idle.clear()

    def _leave(self, who: object) -> None:
        self._inside.pop(who, None)
        self._until_cut.discard(who)
        if not self._inside:
            self._idle.set()
