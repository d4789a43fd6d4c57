# SPDX-License-Identifier: Apache-2.0
"""Which models shall be ready before anybody has asked for them? New ones, while nothing else is to do.

The newest comes first, one at a time. Whoever swaps to another model interrupts it; it is gone on with afterwards.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from flashd.daemon.jobs import Job, JobState
from flashd.daemon.threads import Routine
from flashd.errors import FlashdError

log = logging.getLogger(__name__)

_LOOK_S = 0.5


class Newcomers(Routine):
    """Has each warmed up in its turn."""

    def __init__(self, warm_up: Callable[[str], Awaitable[Job | None]], *, is_idle: Callable[[], bool]) -> None:
        """`warm_up` begins to make a model ready, unless it does not fit; `is_idle` tells whether nothing else runs."""
        super().__init__("newcomers", self._take_one)
        self._warm_up = warm_up
        self._is_idle = is_idle
        self._names: list[str] = []
        self._any = asyncio.Event()
        self._job: Job | None = None
        self._is_interrupted = False

    def arrived(self, name: str) -> None:
        """A model is new, or has a new version."""
        if name in self._names:
            self._names.remove(name)
        self._names.append(name)
        self._any.set()

    def asked(self, name: str) -> None:
        """Somebody swaps to a model: to whatever is done for another one, that comes first."""
        if self._job is not None and self._job.subject != name and not self._job.finished:
            self._is_interrupted = True
            self._job.cancel()

    async def _take_one(self) -> None:
        await self._any.wait()
        while not self._is_idle():  # noqa: ASYNC110 -- many things count, and none of them is in a hurry
            await asyncio.sleep(_LOOK_S)
        name = self._names.pop()
        if not self._names:
            self._any.clear()
        try:
            await self._make_ready(name)
        except (FlashdError, OSError) as error:
            log.info("%s is not made ready: %s", name, error)

    async def _make_ready(self, name: str) -> None:
        self._is_interrupted = False
        self._job = await self._warm_up(name)
        if self._job is None:
            log.info("%s is not made ready: no memory is free for it", name)
            return
        await self._job.wait()
        if self._job.state is JobState.CANCELLED and self._is_interrupted:
            self.arrived(name)
