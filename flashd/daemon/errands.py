# SPDX-License-Identifier: Apache-2.0
"""Who downloads for a program that asks for a pull over the bus and does not download itself?

A user's daemon starts a process of that user's (flashd/errands.py), which downloads as any caller does, and ends with
its job. The machine's daemon has no network: there, who asks is told to download as themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable

from flashd import config, wire
from flashd.daemon.jobs import Job
from flashd.daemon.threads import Background
from flashd.errors import Unavailable


class Errands:
    """The processes that download, by the number of their job. The background waits for them."""

    def __init__(self, address: str, background: Background, *, is_shared: bool) -> None:
        self._address = address
        self._background = background
        self._is_shared = is_shared
        self._processes: dict[int, asyncio.subprocess.Process] = {}

    async def send(self, job: Job) -> Awaitable[None]:
        """Returns what ends when the process does. Raises Unavailable where nobody can be sent."""
        if self._is_shared:
            hint = f"run, as yourself: flash pull {job.subject}"
            raise Unavailable("the machine's flashd has no network, and cannot download", hint=hint)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flashd.errands", wire.job_path(job.number)),
            env=config.child_environment({"FLASHD_BUS_ADDRESS": self._address}),
            stdin=asyncio.subprocess.DEVNULL,
        )
        self._processes[job.number] = process
        self._background.start(self._until_gone(job.number, process))
        return _end_of(process)

    def ended(self, job: Job) -> None:
        """To be told of finished jobs."""
        if job.number in self._processes:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                self._processes[job.number].terminate()

    async def _until_gone(self, number: int, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        del self._processes[number]


async def _end_of(process: asyncio.subprocess.Process) -> None:
    await process.wait()
