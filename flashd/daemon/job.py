# SPDX-License-Identifier: Apache-2.0
"""A long operation: its progress, its requesters, and its end.

from          to                               when
collecting    queued, failed, cancelled        all files of an import have come; its caller left; Cancel
queued        running, failed, cancelled       its turn has come
running       done, failed, cancelled
done, failed, cancelled                        final; forgotten after a while
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dbus_next import Variant

from flashd.daemon.lifecycle import journal
from flashd.dbus.object_tree import EVERYBODY, Audience
from flashd.errors import Busy, Cancelled, FlashdError, Internal

log = logging.getLogger(__name__)


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
    """The requester of a job: a bus connection and its user. The inbox has an empty peer."""

    peer: str
    uid: int


class Job:
    """An operation, created and run by `Jobs`, on the event loop only. Only its `audience` may see it."""

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
        self._wanted_by = {owner.peer: owner}  # by connection, or by user for connections that have left
        self._withdrawn: set[str] = set()
        self.is_cancelled = False  # cancellation was requested, but the job may still be running
        self._owner = owner
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
    def owner(self) -> Owner:
        """The first requester that has not withdrawn."""
        return next(iter(self._wanted_by.values()), self._owner)

    @property
    def askers(self) -> int:
        """Number of connections that have asked for the job and not withdrawn."""
        return len(self._wanted_by)

    def join(self, asker: Owner) -> None:
        """Adds another connection that asks for the same job."""
        self._withdrawn.discard(asker.peer)
        self._wanted_by[asker.peer] = asker
        self._changed(self)

    def has_asked(self, peer: str) -> bool:
        """Tells whether this connection has asked for the job, even if it has withdrawn."""
        return peer in self._wanted_by or peer in self._withdrawn

    def is_only_of(self, uid: int) -> bool:
        """Tells whether all remaining requesters are this user's."""
        return all(asker.uid == uid for asker in self._wanted_by.values())

    def is_also_of(self, uid: int) -> bool:
        """Tells whether a remaining requester is this user's."""
        return any(asker.uid == uid for asker in self._wanted_by.values())

    def withdraw(self, asker: Owner) -> None:
        """Withdraws the request of a connection, or, for an asker without a connection, all requests of its user.

        The job is cancelled when no requester is left.
        """
        gone = {
            key for key, other in self._wanted_by.items()
            if (key == asker.peer if asker.peer else other.uid == asker.uid)
        }  # fmt: skip
        if self.finished or not gone:
            return
        self._owner = self.owner
        self._withdrawn |= gone
        for key in gone:
            del self._wanted_by[key]
        if self._wanted_by:
            self._changed(self)
        else:
            self.cancel()

    def peer_left(self, peer: str) -> None:
        """Keeps the request of a connection that leaves the bus, as a request of its user."""
        self._withdrawn.discard(peer)
        if (asker := self._wanted_by.pop(peer, None)) is not None:
            self._wanted_by[f"user {asker.uid}"] = asker

    @property
    def finished(self) -> bool:
        return not TRANSITIONS[self.state]

    def begin(self, phase: str = "") -> None:
        """Enters RUNNING when the job's turn has come."""
        self._enter(JobState.RUNNING)
        self.report(phase)

    def report(self, phase: str | None = None, done_bytes: int | None = None, total_bytes: int | None = None) -> None:
        """Reports progress. Omitted arguments keep their values; reports after the end are ignored."""
        if self.finished:
            return
        self.phase = self.phase if phase is None else phase
        self.done_bytes = self.done_bytes if done_bytes is None else done_bytes
        self.total_bytes = self.total_bytes if total_bytes is None else total_bytes
        self._changed(self)

    def report_bytes(self, done_bytes: int, total_bytes: int) -> None:
        self.report(None, done_bytes, total_bytes)

    def progress_from_thread(self) -> Callable[[int, int], None]:
        """Returns a function of (done_bytes, total_bytes) that any thread may call."""
        loop = asyncio.get_running_loop()

        def tell(done_bytes: int, total_bytes: int) -> None:
            loop.call_soon_threadsafe(self.report, None, done_bytes, total_bytes)

        return tell

    def start(self, work: Work) -> None:
        """Runs `work`, which calls `begin` when the job's turn has come."""
        if self.state is JobState.COLLECTING:
            self._enter(JobState.QUEUED)
        self._task = asyncio.create_task(self._run(work), name=f"job {self.number}: {self.kind} {self.subject}")
        # A task that is cancelled before its first step never runs at all.
        self._task.add_done_callback(self._ensure_ended)

    def cancel(self) -> None:
        """Cancels the job for all requesters. Has no effect after its end."""
        self.is_cancelled = True
        if self._task is not None:
            self._task.cancel()
        elif not self.finished:
            self.fail(self._cancelled())

    def fail(self, error: FlashdError) -> None:
        """Ends a job that is not running (yet) with an error."""
        self._end(JobState.CANCELLED if isinstance(error, Cancelled) else JobState.FAILED, error=error)

    async def wait(self) -> None:
        """Waits for the job's end, in whatever state."""
        await self._ended.wait()

    async def _run(self, work: Work) -> None:
        try:
            result = await work(self)
        except asyncio.CancelledError:
            self.fail(self._cancelled())
        except FlashdError as error:
            log.info("%s of %s: %s", self.kind, self.subject, error, extra=self._about(error))
            self.fail(error)
        except Exception:  # the boundary of a job
            log.exception("bug in %s of %s", self.kind, self.subject, extra=self._about())
            self.fail(Internal("flashd has a bug", hint="please report it, with the traceback in the journal"))
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
            raise Busy(f"job {self.number} is {self.state}", hint="see flash jobs")
        self.state = state
        self._changed(self)
