# SPDX-License-Identifier: Apache-2.0
"""The jobs of the daemon: all unfinished ones, and recently finished ones."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from flashd.daemon.events import Events
from flashd.daemon.job import Job, JobState, Owner, Work
from flashd.dbus.object_tree import EVERYBODY, Audience
from flashd.errors import NotFound

KEEP_FINISHED_S = 600.0
KEEP_FINISHED = 100


class Jobs:
    """The unfinished jobs, and recently finished ones.

    `check_room` takes the requester of another job and the owners of unfinished jobs, and may raise LimitExceeded.
    """

    def __init__(
        self,
        events: Events,
        *,
        check_room: Callable[[Owner, Iterable[Owner]], None] = lambda owner, others: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._events = events
        self._check_room = check_room
        self._clock = clock
        self._numbers = itertools.count(1)
        self._jobs: dict[int, Job] = {}
        self._finished: deque[Job] = deque()  # in the order of their ends
        events.peer_left.subscribe(self._peer_left)

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def get(self, number: int) -> Job:
        if number not in self._jobs:
            raise NotFound(f"there is no job {number}", hint="it may have ended long ago; see flash jobs")
        return self._jobs[number]

    def create(
        self, kind: str, subject: str, owner: Owner, *, collecting: bool = False, audience: Audience = EVERYBODY
    ) -> Job:
        """Creates a job without running it. Raises LimitExceeded. A job that cannot be announced is not kept."""
        self.forget_old()
        self._check_room(owner, (job.owner for job in self._jobs.values() if not job.finished))
        state = JobState.COLLECTING if collecting else JobState.QUEUED
        job = Job(next(self._numbers), kind, subject, owner, state, self._changed, audience)
        self._jobs[job.number] = job
        try:
            self._events.job_changed(job)
        except BaseException:
            del self._jobs[job.number]
            raise
        return job

    def run(self, kind: str, subject: str, owner: Owner, work: Work, *, audience: Audience = EVERYBODY) -> Job:
        """Creates a job and starts it. Raises LimitExceeded."""
        job = self.create(kind, subject, owner, audience=audience)
        job.start(work)
        return job

    def forget_old(self) -> None:
        """Removes jobs KEEP_FINISHED_S after their end, and sooner if there are more than KEEP_FINISHED."""
        oldest_kept = self._clock() - KEEP_FINISHED_S
        while self._finished and (len(self._finished) > KEEP_FINISHED or self._finished[0].finished_at < oldest_kept):
            job = self._finished.popleft()
            del self._jobs[job.number]
            self._events.job_forgotten(job)

    def _changed(self, job: Job) -> None:
        if job.finished and job.number in self._jobs:  # otherwise it was never announced
            self._finished.append(job)
        self._events.job_changed(job)
        if job.finished:
            self._events.job_ended(job)

    def _peer_left(self, peer: str) -> None:
        for job in self._jobs.values():
            job.peer_left(peer)

    async def close(self) -> None:
        """Cancels unfinished jobs and waits until they have cleaned up."""
        for job in self:
            job.cancel()
        await asyncio.gather(*(job.wait() for job in self))
