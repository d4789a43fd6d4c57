# SPDX-License-Identifier: Apache-2.0
"""The connection on which the gateway asks the daemon for jobs, kept between them: a swap takes less time than a
connection to the bus."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flashd.client.client import Client, Job
from flashd.errors import FlashdError, Unavailable
from flashd.gateway.directory import Connect
from flashd.tasks import in_thread
from flashd.units import format_bytes


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is. `total_bytes` is 0 while it is unknown."""

    phase: str = ""
    done_bytes: int = 0
    total_bytes: int = 0

    def __str__(self) -> str:
        if not self.total_bytes:
            return self.phase
        return f"{self.phase}, {100 * self.done_bytes // self.total_bytes} % of {format_bytes(self.total_bytes)}"


class KeptClient:
    """A client that is lent to one thread at a time. A thread that finds it lent gets another, which is not kept."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._idle: list[Client] = []  # one at most; list.pop and append are atomic
        self._lent: set[Client] = set()

    @contextlib.contextmanager
    def lent(self) -> Iterator[Client]:
        """Raises Unavailable if there is no daemon."""
        client = self._taken() or self._connect(True)
        self._lent.add(client)
        is_good = False
        try:
            yield client
            is_good = True
        except Unavailable:
            raise
        except Exception:  # an answer of the daemon: the connection is as good as before
            is_good = True
            raise
        finally:
            self._lent.discard(client)
            if is_good and not self._idle:
                self._idle.append(client)
            else:
                client.close()

    async def run_job(self, begin: Callable[[Client], Job], on_progress: Callable[[Progress], None]) -> None:
        """Runs a job of the daemon to its end. Cancelling this cancels the job, if that can be.

        `begin` runs in a thread, `on_progress` on the event loop. Raises the error with which the job failed.
        """
        loop = asyncio.get_running_loop()
        jobs: list[Job] = []
        is_cancelled = threading.Event()

        def note(job: Job) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(
                    on_progress, Progress(job.phase or job.state, job.done_bytes, job.total_bytes)
                )

        def run() -> None:
            with self.lent() as client, client.subscribed() as events:  # before the job, so that it is read only once
                job = begin(client)
                jobs.append(job)
                if is_cancelled.is_set():  # whoever cancelled did not know of it
                    job.cancel()
                job.follow(events, note)

        work = asyncio.ensure_future(in_thread(lambda _: run()))  # a pull takes hours: pools have few threads
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            is_cancelled.set()
            for job in jobs:
                with contextlib.suppress(FlashdError):
                    await asyncio.to_thread(job.cancel)
            with contextlib.suppress(FlashdError):
                await work  # a swap that is nearly done is done
            raise

    def close(self) -> None:
        """Closes the idle connection, as when the daemon has ended."""
        if (client := self._taken()) is not None:
            client.close()

    def end(self) -> None:
        """Closes all connections. What waits on one in a thread fails with Unavailable."""
        self.close()
        for client in list(self._lent):
            client.close()

    def _taken(self) -> Client | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None
