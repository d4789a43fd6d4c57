# SPDX-License-Identifier: Apache-2.0
"""How do wheels that a caller has opened become the environment that new engines run in?

They reach us as descriptors, as sources of models do: the daemon has no network, and opens no path for a caller. What
downloads them is the caller, with the caller's rights, network and package index.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dbus_next import Variant

from flashd.daemon.exports import Caller
from flashd.daemon.jobs import Job, Jobs, JobState, Owner, Result
from flashd.daemon.threads import in_thread
from flashd.engines.environments import MUST_IMPORT, Environments
from flashd.errors import Cancelled, InvalidArgument, NotAuthorized

MAX_WHEELS = 1024  # of one environment: a client cannot use up our descriptors


@dataclass(slots=True)
class _Wheels:
    """Descriptors that are ours, until `close`."""

    kind: str
    fds: dict[str, int] = field(default_factory=dict)

    def add(self, files: Mapping[str, int]) -> None:
        if clash := self.fds.keys() & files.keys():
            raise InvalidArgument(f"{min(clash)!r} was sent twice")
        if len(self.fds) + len(files) > MAX_WHEELS:
            raise InvalidArgument(f"more than {MAX_WHEELS} wheels for one environment")
        self.fds |= {name: os.dup(fd) for name, fd in files.items()}

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.popitem()[1])


class Installations:
    """Environments that wait for wheels, and the changes of which one is current: one at a time."""

    def __init__(self, environments: Environments, jobs: Jobs, *, on_change: Callable[[str], Awaitable[None]]) -> None:
        """`on_change` hears which kind of engine has another environment now."""
        self._environments = environments
        self._jobs = jobs
        self._on_change = on_change
        self._waiting: dict[int, _Wheels] = {}
        self._turn = asyncio.Lock()

    def begin(self, caller: Caller, kind: str, files: Mapping[str, int], *, more: bool) -> Job:
        if kind not in MUST_IMPORT:
            raise InvalidArgument(f"there is no kind of engine {kind!r}", hint=f"there is: {', '.join(MUST_IMPORT)}")
        wheels = _Wheels(kind)
        wheels.add(files)
        job = self._jobs.create("install", kind, Owner(caller.peer, caller.uid), collecting=True)
        self._waiting[job.number] = wheels
        if not more:
            self._start(job)
        return job

    def add(self, caller: Caller, job: Job, files: Mapping[str, int], *, more: bool) -> None:
        if job.number not in self._waiting or job.state is not JobState.COLLECTING:
            raise InvalidArgument(f"job {job.number} waits for no wheels: it is {job.state}")
        if job.owner.peer != caller.peer:
            raise NotAuthorized(f"job {job.number} is another caller's installation")
        self._waiting[job.number].add(files)
        if not more:
            self._start(job)

    def ended(self, job: Job) -> None:
        """To be told of finished jobs. A job ends when its thread has: nobody reads the descriptors any more."""
        wheels = self._waiting.pop(job.number, None)
        if wheels is not None:
            wheels.close()

    def peer_left(self, peer: str) -> None:
        for number in list(self._waiting):
            job = self._jobs.get(number)
            if job.owner.peer == peer and job.state is JobState.COLLECTING:
                job.fail(Cancelled("its caller left the bus before all wheels were sent"))

    async def clean_up(self) -> None:
        async with self._turn:
            await asyncio.to_thread(self._environments.clean_up)

    async def listed(self) -> list[list[Any]]:
        """Each as (kind, number, version, current, fits, size_bytes, created_at)."""
        return await asyncio.to_thread(self._listed)

    def _listed(self) -> list[list[Any]]:
        current = {kind: self._environments.current(kind) for kind in MUST_IMPORT}
        return [
            [e.kind, e.number, e.version, e == current[e.kind], e.fits, e.size_bytes, int(e.created_at)]
            for e in self._environments.all()
        ]

    async def use(self, kind: str, number: int) -> None:
        async with self._turn:
            await asyncio.to_thread(self._environments.use, kind, number)
            await self._on_change(kind)

    async def remove(self, kind: str, number: int) -> None:
        async with self._turn:
            await asyncio.to_thread(self._environments.remove, kind, number)
            await self._on_change(kind)

    def _start(self, job: Job) -> None:
        wheels = self._waiting[job.number]

        async def work(job: Job) -> Result:
            job.report("waiting")
            async with self._turn:
                job.begin("installing")
                tell = job.progress_from_thread()
                made = await in_thread(
                    lambda cancelled: self._environments.make(
                        wheels.kind, wheels.fds, on_progress=tell, cancelled=cancelled
                    )
                )
                await self._on_change(wheels.kind)
            return {"environment": Variant("u", made.number), "version": Variant("s", made.version)}

        job.start(work)
