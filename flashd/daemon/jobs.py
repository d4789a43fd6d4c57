# SPDX-License-Identifier: Apache-2.0
"""What long operations are under way, how far are they, and how did they end?

from          to                               when
collecting    queued, failed, cancelled        all files of an import are here; its caller left; Cancel
queued        running, failed, cancelled       its turn has come
running       done, failed, cancelled
done, failed, cancelled                        for good; forgotten after a while
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dbus_next import Variant

from flashd.daemon import journal
from flashd.daemon.exports import EVERYBODY, Audience
from flashd.errors import Busy, Cancelled, FlashdError, Internal, NotFound

log = logging.getLogger(__name__)

KEEP_FINISHED_S = 600.0
KEEP_FINISHED = 100


class JobState(StrEnum):
    COLLECTING = "collecting"
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


_ENDS = {JobState.FAILED, JobState.CANCELLED}
TRANSITIONS: Mapping[JobState, set[JobState]] = {
    JobState.COLLECTING: {JobState.QUEUED, *_ENDS},
    JobState.QUEUED: {JobState.RUNNING, *_ENDS},
    JobState.RUNNING: {JobState.DONE, *_ENDS},
    JobState.DONE: set(),
    JobState.FAILED: set(),
    JobState.CANCELLED: set(),
}

Result = Mapping[str, Variant]
Work = Callable[["Job"], Awaitable[Result]]


@dataclass(frozen=True, slots=True)
class Owner:
    """Who asked for it: a bus peer, and the user behind it. The inbox is nobody: an empty peer."""

    peer: str
    uid: int


class Job:
    """One operation; made and run by `Jobs`. To be used on the event loop only. `audience` may know of it."""

    def __init__(
        self,
        number: int,
        kind: str,
        subject: str,
        owner: Owner,
        state: JobState,
        changed: Callable[[Job], None],
        audience: Audience = EVERYBODY,
    ) -> None:
        self.number = number
        self.kind = kind
        self.subject = subject
        self.owner = owner
        self.state = state
        self.audience = audience
        self.phase = ""
        self.done_bytes = 0
        self.total_bytes = 0
        self.created_at = time.time()
        self.finished_at = 0.0
        self.result: Result = {}
        self.error: FlashdError | None = None
        self._changed = changed
        self._ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def finished(self) -> bool:
        return not TRANSITIONS[self.state]

    def begin(self, phase: str = "") -> None:
        """Its turn has come."""
        self._enter(JobState.RUNNING)
        self.report(phase)

    def report(self, phase: str | None = None, done_bytes: int | None = None, total_bytes: int | None = None) -> None:
        """How far it is; what is not given stays as it was. What a thread reports too late is ignored."""
        if self.finished:
            return
        self.phase = self.phase if phase is None else phase
        self.done_bytes = self.done_bytes if done_bytes is None else done_bytes
        self.total_bytes = self.total_bytes if total_bytes is None else total_bytes
        self._changed(self)

    def report_bytes(self, done_bytes: int, total_bytes: int) -> None:
        self.report(None, done_bytes, total_bytes)

    def progress_from_thread(self) -> Callable[[int, int], None]:
        """A function of (done_bytes, total_bytes) that any thread may call."""
        loop = asyncio.get_running_loop()

        def tell(done_bytes: int, total_bytes: int) -> None:
            loop.call_soon_threadsafe(self.report, None, done_bytes, total_bytes)

        return tell

    def start(self, work: Work) -> None:
        """Runs `work`, which calls `begin` when its turn has come."""
        if self.state is JobState.COLLECTING:
            self._enter(JobState.QUEUED)
        self._task = asyncio.create_task(self._run(work), name=f"job {self.number}: {self.kind} {self.subject}")
        # A task that is cancelled before its first step never runs a line.
        self._task.add_done_callback(self._ensure_ended)

    def cancel(self) -> None:
        """Asks it to end. What already ended stays as it is."""
        if self._task is not None:
            self._task.cancel()
        elif not self.finished:
            self.fail(self._cancelled())

    def fail(self, error: FlashdError) -> None:
        """The end of a job that does not run (yet)."""
        self._end(JobState.CANCELLED if isinstance(error, Cancelled) else JobState.FAILED, error=error)

    async def wait(self) -> None:
        """Returns when it has ended, however."""
        await self._ended.wait()

    async def _run(self, work: Work) -> None:
        try:
            result = await work(self)
        except asyncio.CancelledError:
            self.fail(self._cancelled())
        except FlashdError as error:
            log.info("%s of %s: %s", self.kind, self.subject, error, extra=self._about(error))
            self.fail(error)
        except Exception:  # the boundary of a job: nobody above could do more than this
            log.exception("defect in %s of %s", self.kind, self.subject, extra=self._about())
            self.fail(Internal("flashd has a defect", hint="its journal has the traceback: please report it"))
        else:
            self._end(JobState.DONE, result=result)

    def _about(self, error: FlashdError | None = None) -> Mapping[str, Any]:
        tier = next((str(self.result[key].value) for key in ("residency", "from_tier") if key in self.result), None)
        seconds = (self.finished_at or time.time()) - self.created_at
        return journal.fields(
            model=self.subject,
            job=self.number,
            tier=tier,
            size_bytes=self.total_bytes or None,
            seconds=seconds,
            error=error.bus_name() if error else None,
        )

    def _ensure_ended(self, _task: asyncio.Task[None]) -> None:
        if not self.finished:
            self.fail(self._cancelled())

    def _cancelled(self) -> Cancelled:
        return Cancelled(f"the {self.kind} of {self.subject} was cancelled")

    def _end(self, state: JobState, *, result: Result | None = None, error: FlashdError | None = None) -> None:
        self.finished_at = time.time()
        self.phase = ""
        self.result = result or {}
        self.error = error
        if state is JobState.DONE:
            self.done_bytes = self.total_bytes
            log.info("%s of %s is done", self.kind, self.subject, extra=self._about())
        self._enter(state)
        self._ended.set()

    def _enter(self, state: JobState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise Busy(f"job {self.number} is {self.state}", hint="flash jobs shows it")
        self.state = state
        self._changed(self)


class Jobs:
    """All jobs, the finished ones for a while. `on_change` hears of every change, `on_forget` of their end.

    `check_room` is told who wants another one, and who has those that have not ended; it may refuse.
    """

    def __init__(
        self,
        *,
        on_change: Callable[[Job], None],
        on_forget: Callable[[Job], None],
        check_room: Callable[[Owner, Collection[Owner]], None] = lambda owner, others: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._on_change = on_change
        self._on_forget = on_forget
        self._check_room = check_room
        self._clock = clock
        self._numbers = itertools.count(1)
        self._jobs: dict[int, Job] = {}

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def get(self, number: int) -> Job:
        if number not in self._jobs:
            raise NotFound(f"there is no job {number}", hint="it may be long finished; flash jobs lists them")
        return self._jobs[number]

    def create(
        self, kind: str, subject: str, owner: Owner, *, collecting: bool = False, audience: Audience = EVERYBODY
    ) -> Job:
        """Raises LimitExceeded."""
        self.forget_old()
        self._check_room(owner, [job.owner for job in self._jobs.values() if not job.finished])
        state = JobState.COLLECTING if collecting else JobState.QUEUED
        job = Job(next(self._numbers), kind, subject, owner, state, self._on_change, audience)
        self._jobs[job.number] = job
        self._on_change(job)
        return job

    def run(self, kind: str, subject: str, owner: Owner, work: Work, *, audience: Audience = EVERYBODY) -> Job:
        """Raises LimitExceeded."""
        job = self.create(kind, subject, owner, audience=audience)
        job.start(work)
        return job

    def forget_old(self) -> None:
        """Finished jobs go after KEEP_FINISHED_S, and sooner where there are more than KEEP_FINISHED."""
        finished = sorted((job for job in self._jobs.values() if job.finished), key=lambda job: job.finished_at)
        oldest_kept = self._clock() - KEEP_FINISHED_S
        surplus = max(0, len(finished) - KEEP_FINISHED)
        for age, job in enumerate(finished):
            if age < surplus or job.finished_at < oldest_kept:
                del self._jobs[job.number]
                self._on_forget(job)

    async def close(self) -> None:
        """Cancels what is under way and waits until it has cleaned up."""
        for job in self:
            job.cancel()
        await asyncio.gather(*(job.wait() for job in self))
