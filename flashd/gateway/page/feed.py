# SPDX-License-Identifier: Apache-2.0
"""The state of the machine as a client may know it, and its changes as they happen.

All of it comes from what the gateway knows anyway by the daemon's signals: nothing here asks the daemon anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from flashd.client.results import Model
from flashd.client.tiers import tiers
from flashd.gateway.access import ACCESS, Access
from flashd.gateway.directory import Directory
from flashd.gateway.dispatch import Dispatcher
from flashd.gateway.metrics.daemon_news import DaemonNews
from flashd.gateway.page.history import NOTHING, History
from flashd.gateway.page.jobs import Jobs
from flashd.gateway.page.requests import Requests
from flashd.gateway.page.rights import rights
from flashd.gateway.page.schema import DaemonState, JobState, State, as_json, engine_state, model_state, patch

_GATHER_S = 0.04  # changes come in bursts; half of the time in which people see what happens as one
_SILENT_S = 15.0  # then a comment shows both ends that the connection lives
_LONGEST_S = 600.0  # then the client connects again, and shows that its token has not been revoked
_MOST_CACHED = 32
_OF_THE_STORE = frozenset({"scrub", "install"})  # kinds of jobs that are about no model

Row = tuple[Model, str, int, int]


class Feed:
    """On the event loop."""

    def __init__(self, dispatcher: Dispatcher, news: DaemonNews, machine: str, history: History = NOTHING) -> None:
        """`machine` is the bus that the gateway was told to use."""
        self._dispatcher = dispatcher
        self._news = news
        self._machine = machine
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()  # set and replaced whenever something may be new
        self._is_closed = False
        self._states: dict[Access, State] = {}  # until then
        self._rows: dict[str, tuple[Row, dict[str, Any]]] = {}  # of models, by name
        self.jobs = Jobs(self._changed_elsewhere, history)
        self.requests = Requests(self.change, history)
        dispatcher.on_news = self.change

    def change(self) -> None:
        """Notes that something may be new."""
        self._states.clear()
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        """Ends all streams of changes, which would last as long as their clients."""
        self._is_closed = True
        self.change()

    def _changed_elsewhere(self) -> None:
        """`change`, for other threads."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.change)

    def state(self) -> State:
        """All that the client of this request may know. It must not be changed."""
        access = ACCESS.get()
        if (found := self._states.get(access)) is None:
            if len(self._states) >= _MOST_CACHED:
                self._states.clear()
            found = self._states[access] = self._made(access)
        return found

    async def changes(self) -> AsyncGenerator[State | None, None]:
        """Yields the state, then merge patches as it changes; None where nothing has happened for a while."""
        until = time.monotonic() + _LONGEST_S
        changed, before = self._changed, self.state()
        yield before
        while time.monotonic() < until and not self._is_closed:
            try:
                async with asyncio.timeout(_SILENT_S):
                    await changed.wait()
            except TimeoutError:
                yield None
                continue
            await asyncio.sleep(_GATHER_S)
            changed, now = self._changed, self.state()
            if found := patch(before, now):
                yield found
            before = now

    def _made(self, access: Access) -> State:
        known = self._dispatcher.directory
        engines = [engine for engine in self._news.engines if engine.model in known.models]
        models = list(known.models.values())
        if len(self._rows) > 2 * len(models) + _MOST_CACHED:
            self._rows.clear()  # models were removed
        return {
            "daemon": as_json(self._daemon(known, access)),
            "rights": as_json(rights(access, self._dispatcher.settings, self._machine)),
            "models": {name: self._row(model, known) for name, model in known.models.items()},
            "engines": {str(engine.pid): engine_state(engine) for engine in engines},
            "jobs": {number: as_json(job) for number, job in self.jobs.all().items() if self._shows(job, known)},
            "requests": {
                number: request for number, request in self.requests.all().items() if request["model"] in known.models
            },
            "tiers": [as_json(tier) for tier in tiers(models, engines, self._news.devices, self._news.status)],
        }

    def _daemon(self, known: Directory, access: Access) -> DaemonState:
        status = self._news.status
        if status is None:
            return DaemonState(known.is_connected, "", known.active, known.resting, "", "", (), ())
        problems = [{"what": each.what, "remedy": each.remedy} for each in status.problems]
        inbox = [{"name": each.name, "state": each.state, "detail": each.detail} for each in status.inbox_items]
        shows_files = access.sees_private  # their names are for the daemon's own user
        return DaemonState(
            connected=known.is_connected,
            version=status.version,
            active=known.active,
            resting=known.resting,
            default_engine=status.default_engine,
            default_engine_reason=status.default_engine_reason,
            problems=tuple(problems) if shows_files else (),
            inbox=tuple(inbox) if shows_files else (),
        )

    def _row(self, model: Model, known: Directory) -> Mapping[str, Any]:
        engine = known.engine_of(model.name) if model.serving else None
        key = (
            model,
            engine.kind if engine else "",
            self._dispatcher.waiting(model.name),
            self._dispatcher.in_progress(model.name),
        )
        cached = self._rows.get(model.name)
        if cached is None or cached[0] != key:
            cached = self._rows[model.name] = key, model_state(*key)
        return cached[1]

    def _shows(self, job: JobState, known: Directory) -> bool:
        """False for a job of a model that the client may not know of, and for one whose model nobody knows yet and
        which may become private."""
        access = ACCESS.get()
        if job.subject in known.models or access.sees_private:
            return True
        if access.models or self._dispatcher.is_here(job.subject):
            return False
        return job.kind in _OF_THE_STORE or (job.kind == "pull" and not job.finished_at)
