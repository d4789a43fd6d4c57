# SPDX-License-Identifier: Apache-2.0
"""Prepares new models before they are requested, while the daemon is idle.

The newest comes first, one at a time. A swap to another model interrupts the preparation, which continues afterwards.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from flashd.daemon.events import Events
from flashd.daemon.job import Job, JobState, Owner
from flashd.daemon.jobs import Jobs
from flashd.daemon.lifecycle.settings import Settings
from flashd.daemon.serving.engine_stats import EngineStatsBook
from flashd.daemon.serving.loads import Loads
from flashd.errors import FlashdError
from flashd.store.catalog import Catalog, Model
from flashd.swap.swapper import Swapper
from flashd.tasks import Routine

log = logging.getLogger(__name__)

_LOOK_S = 0.5
_NEED_THE_MACHINE = {"swap", "serve", "park", "load", "import"}  # kinds of jobs


class Warmup(Routine):
    """Prepares new models in turn."""

    def __init__(
        self,
        warm_up: Callable[[str], Awaitable[Job | None]],
        events: Events,
        *,
        is_idle: Callable[[], bool],
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """`warm_up` begins to prepare a model, if it fits; `is_idle` tells whether nothing else runs; `is_wanted` tells
        whether new models shall be prepared at all.
        """
        super().__init__("warm-up", self._take_one)
        self._warm_up = warm_up
        self._is_idle = is_idle
        self._names: list[str] = []
        self._any = asyncio.Event()
        self._job: Job | None = None
        self._is_interrupted = False
        self._is_wanted = is_wanted
        events.model_published.subscribe(self._published)
        events.model_asked.subscribe(self._asked)

    def _published(self, model: Model) -> None:
        if self._is_wanted():
            self._add(model.name)

    def _add(self, name: str) -> None:
        if name in self._names:
            self._names.remove(name)
        self._names.append(name)
        self._any.set()

    def _asked(self, name: str) -> None:
        """Interrupts a preparation for a requested swap to another model."""
        if self._job is not None and self._job.subject != name and not self._job.finished:
            self._is_interrupted = True
            self._job.cancel()

    async def _take_one(self) -> None:
        await self._any.wait()
        while not self._is_idle():  # noqa: ASYNC110 -- polls, because it depends on many conditions and is not urgent
            await asyncio.sleep(_LOOK_S)
        name = self._names.pop()
        if not self._names:
            self._any.clear()
        try:
            await self._make_ready(name)
        except (FlashdError, OSError) as error:
            log.info("%s is not prepared: %s", name, error)

    async def _make_ready(self, name: str) -> None:
        self._is_interrupted = False
        self._job = await self._warm_up(name)
        if self._job is None:
            log.info("%s is not prepared: there is no free memory for it", name)
            return
        await self._job.wait()
        if self._job.state is JobState.CANCELLED and self._is_interrupted:
            self._add(name)


def warmup(
    settings: Settings,
    catalog: Catalog,
    loads: Loads,
    jobs: Jobs,
    swapper: Swapper,
    engine_stats: EngineStatsBook,
    ourselves: Owner,
    events: Events,
) -> Warmup:
    """Makes the daemon's warm-up, which works while no request runs, and no job needs the disk or an engine."""

    async def warm_up(name: str) -> Job | None:
        model, tier = catalog.get(name), settings.current.memory.prewarm_tier
        return await loads.warm_up(model, ourselves, tier) if model else None

    def is_idle() -> bool:
        is_asked = any(engine_stats.of(slot.engine.number).active_requests for slot in swapper.slots.serving)
        return not is_asked and not any(
            job.state in {JobState.QUEUED, JobState.RUNNING} and job.kind in _NEED_THE_MACHINE for job in jobs
        )

    return Warmup(warm_up, events, is_idle=is_idle, is_wanted=lambda: settings.current.engines.warm_new)
