# SPDX-License-Identifier: Apache-2.0
"""Starts downloads for programs that request a pull over the bus without downloading themselves.

A user's daemon starts a process of that user (client/pull_worker.py), which downloads like any caller, and ends with
its job. The machine's daemon has no network access, so callers are told to download themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable

from flashd.config.environment import child_environment
from flashd.daemon.events import Events
from flashd.daemon.job import Job
from flashd.dbus import wire
from flashd.errors import Unavailable
from flashd.tasks import Background


class PullWorkers:
    """The download processes, by the number of their job. Background tasks wait for them."""

    def __init__(self, address: str, background: Background, events: Events, *, is_shared: bool) -> None:
        self._address = address
        self._background = background
        self._is_shared = is_shared
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        events.job_ended.subscribe(self._ended)

    async def send(self, job: Job) -> Awaitable[None]:
        """Starts a process, and returns an awaitable for its end. Raises Unavailable on the machine's daemon."""
        if self._is_shared:
            hint = f"run it as yourself: flash pull {job.subject}"
            raise Unavailable("the machine's flashd has no network access, so it cannot download", hint=hint)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flashd.client.pull_worker", wire.job_path(job.number)),
            env=child_environment({"FLASHD_BUS_ADDRESS": self._address}),
            stdin=asyncio.subprocess.DEVNULL,
        )
        self._processes[job.number] = process
        self._background.start(self._until_gone(job.number, process))
        return _end_of(process)

    def _ended(self, job: Job) -> None:
        if job.number in self._processes:
            with contextlib.suppress(ProcessLookupError):  # it has already ended
                self._processes[job.number].terminate()

    async def _until_gone(self, number: int, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        del self._processes[number]


async def _end_of(process: asyncio.subprocess.Process) -> None:
    await process.wait()
