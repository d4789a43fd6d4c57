# SPDX-License-Identifier: Apache-2.0
"""Starts another engine for models that take turns in one, beside all swaps, which do not wait for it.

Starting takes up to a minute, and the models go on taking turns meanwhile. The engine is parked once it has started, so
that the next model whose turn it is wakes it. Nobody has asked for it: it gives way to all that needs its memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from flashd.engines.engine import Engine
from flashd.errors import FlashdError
from flashd.swap.candidates import Candidates
from flashd.swap.slots import EngineSlot, Slots
from flashd.swap.weights import Recipient, Supplier, Supply, Target
from flashd.tasks import end, run_to_end

log = logging.getLogger(__name__)

Start = Callable[[Target, Supply], Awaitable[Engine]]
Keep = Callable[[EngineSlot], Awaitable[None]]


class Another:
    """The start of another engine, one at a time. For use on one event loop."""

    def __init__(self, slots: Slots, candidates: Candidates, supplier: Supplier, *, start: Start, keep: Keep) -> None:
        """`start` starts an engine with what it was given; `keep` parks it when no swap is under way."""
        self._slots = slots
        self._candidates = candidates
        self._supplier = supplier
        self._start = start
        self._keep = keep
        self._work: asyncio.Task[None] | None = None

    @property
    def is_starting(self) -> bool:
        return self._work is not None and not self._work.done()

    def begin(self, target: Target) -> None:
        """Begins a start if models take turns often in the engine that has just taken this one, whose key was read."""
        if not self.is_starting and self._candidates.is_contended(target):
            self._work = asyncio.create_task(self._done(target), name=f"another engine for {target.model_name}")

    async def give_up(self) -> bool:
        """Ends the start, and frees its memory. Returns False if there was none."""
        if not self.is_starting:
            return False
        if await run_to_end(end(self._work)):
            raise asyncio.CancelledError
        return True

    async def ended(self) -> None:
        """Waits for the end of the start, if there is one."""
        if self._work is not None:
            await asyncio.wait({self._work})

    async def _done(self, target: Target) -> None:
        try:
            if await self._candidates.is_worth_another(target):
                supply = await self._supplier.provide(target, to=Recipient(starts=True))
                try:
                    await self._started(target, supply)
                finally:
                    self._slots.dispensable.remove(supply)
        except (FlashdError, OSError) as error:
            log.warning("models like %s go on sharing an engine, since no other starts: %s", target.model_name, error)
            self._candidates.note_no_other(target)

    async def _started(self, target: Target, supply: Supply) -> None:
        self._slots.dispensable.append(supply)
        try:
            engine = await self._start(target, supply)
        except BaseException:
            supply.release()
            raise
        slot = EngineSlot(engine, target, supply)
        try:
            await self._keep(slot)
        except BaseException:
            if slot not in self._slots:
                await run_to_end(engine.stop())
                supply.release()
                self._supplier.engine_ended(engine)
            raise
