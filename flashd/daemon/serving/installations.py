# SPDX-License-Identifier: Apache-2.0
"""Makes environments for new engines from wheels that a caller has opened.

Like sources of models, wheels are sent as descriptors: the daemon has no network access, and opens no path for a
caller. The caller downloads the wheels, with its own rights, network and package index.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dbus_next import Variant

from flashd.daemon.events import Events
from flashd.daemon.job import Job, Owner, Result
from flashd.daemon.jobs import Jobs
from flashd.dbus.collected_files import CollectedFiles
from flashd.dbus.object_tree import Caller
from flashd.engines.environments import MUST_IMPORT, Environment, Environments
from flashd.errors import Cancelled, InvalidArgument
from flashd.tasks import Stop, aside, in_thread


@dataclass(frozen=True, slots=True)
class _Installation:
    """An installation: the kind of engine that it is for, and the wheels sent for it."""

    kind: str
    wheels: CollectedFiles


class Installations:
    """Installations that are waiting for wheels, and changes of the current environment, one at a time."""

    def __init__(
        self, environments: Environments, jobs: Jobs, events: Events, *, on_change: Callable[[str], Awaitable[None]]
    ) -> None:
        """`on_change` is awaited when a kind of engine has another environment."""
        self._environments = environments
        self._jobs = jobs
        self._on_change = on_change
        self._waiting: dict[int, _Installation] = {}
        self._turn = asyncio.Lock()
        events.job_ended.subscribe(self._ended)
        events.peer_left.subscribe(self._peer_left)

    def begin(self, caller: Caller, kind: str, files: Mapping[str, int], *, more: bool) -> Job:
        if kind not in MUST_IMPORT:
            raise InvalidArgument(
                f"there is no kind of engine {kind!r}", hint=f"choose one of: {', '.join(MUST_IMPORT)}"
            )
        wheels = CollectedFiles("installation", caller.peer)
        with contextlib.ExitStack() as on_error:
            on_error.callback(wheels.close)
            wheels.add(files, more=more)
            job = self._jobs.create("install", kind, Owner(caller.peer, caller.uid), collecting=True)
            on_error.pop_all()
        self._waiting[job.number] = _Installation(kind, wheels)
        if not more:
            self._start(job)
        return job

    def add(self, caller: Caller, job: Job, files: Mapping[str, int], *, more: bool) -> None:
        waiting = self._waiting.get(job.number)
        if waiting is not None:
            waiting.wheels.check_sender(caller, job.number)
        if waiting is None or waiting.wheels.is_complete:
            raise InvalidArgument(f"job {job.number} is not waiting for wheels: it is {job.state}")
        waiting.wheels.add(files, more=more)
        if not more:
            self._start(job)

    def _ended(self, job: Job) -> None:
        """Closes the wheels of an installation that was cancelled before its turn."""
        ended = self._waiting.pop(job.number, None)
        if ended is not None:
            aside(ended.wheels.close)

    def _peer_left(self, peer: str) -> None:
        for number, waiting in list(self._waiting.items()):
            if waiting.wheels.is_cut_short(peer):
                self._jobs.get(number).fail(Cancelled("its caller left the bus before all wheels were sent"))

    async def clean_up(self) -> None:
        async with self._turn:
            await asyncio.to_thread(self._environments.clean_up)

    async def listed(self) -> list[list[Any]]:
        """Lists environments as (kind, number, version, current, fits, size_bytes, created_at)."""
        return await asyncio.to_thread(self._listed)

    def _listed(self) -> list[list[Any]]:
        current = {kind: self._environments.current(kind) for kind in MUST_IMPORT}
        return [
            [e.kind, e.number, e.version, e == current[e.kind], e.fits, e.size_bytes, int(e.created_at)]
            for e in self._environments.all()
        ]

    async def use(self, kind: str, number: int) -> None:
        async with self._turn:
            try:
                await asyncio.to_thread(self._environments.use, kind, number)
            finally:  # a change without the disk's confirmation is in place all the same
                if kind in MUST_IMPORT:  # otherwise it was refused
                    await self._on_change(kind)

    async def remove(self, kind: str, number: int) -> None:
        async with self._turn:
            await asyncio.to_thread(self._environments.remove, kind, number)
            await self._on_change(kind)

    def _make(self, kind: str, wheels: CollectedFiles, tell: Callable[[int, int], None], stop: Stop) -> Environment:
        with wheels.taken() as fds:  # else the end of the job would close what is being read
            return self._environments.make(kind, fds, on_progress=tell, cancelled=stop, commit=stop.commit)

    def _start(self, job: Job) -> None:
        waiting = self._waiting[job.number]

        async def work(job: Job) -> Result:
            job.report("waiting")
            async with self._turn:
                job.begin("installing")
                tell = job.progress_from_thread()
                try:
                    made = await in_thread(functools.partial(self._make, waiting.kind, waiting.wheels, tell))
                finally:  # a change without the disk's confirmation is in place all the same
                    await self._on_change(waiting.kind)
            return {"environment": Variant("u", made.number), "version": Variant("s", made.version)}

        job.start(work)
