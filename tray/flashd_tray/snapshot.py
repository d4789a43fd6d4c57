# SPDX-License-Identifier: Apache-2.0
"""Snapshots of the daemon's state, and the state of the icon that follows from them.

    state        shown when
    AWAY         no daemon answers
    SWAPPING     a swap, a load or a park is running
    CONVERTING   a source is being converted
    FAILED       a job failed, and the error was neither seen nor solved since
    SERVING      a model is active
    IDLE         no model is active

The first that applies is shown. Running jobs take precedence over errors, because they may be the remedy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from flashd.client.client import Job
from flashd.client.results import Device, Model, Status
from flashd.errors import Cancelled


class State(StrEnum):
    AWAY = "away"
    SWAPPING = "swapping"
    CONVERTING = "converting"
    FAILED = "failed"
    SERVING = "serving"
    IDLE = "idle"


_SWAPPING = frozenset({"swap", "serve", "load", "park"})
MAKES_A_MODEL = frozenset({"import", "pull"})


@dataclass(frozen=True, slots=True)
class JobView:
    """A job at the time of the snapshot. Times are in seconds since the epoch; `finished_at` is 0 before the end."""

    number: int
    kind: str
    subject: str
    state: str
    phase: str
    done_bytes: int
    total_bytes: int
    created_at: float
    finished_at: float
    result: Mapping[str, Any]
    error_name: str
    error_message: str
    error_hint: str

    @classmethod
    def of(cls, job: Job) -> JobView:
        return cls(
            number=job.number,
            kind=job.kind,
            subject=job.subject,
            state=job.state,
            phase=job.phase,
            done_bytes=job.done_bytes,
            total_bytes=job.total_bytes,
            created_at=job.created_at,
            finished_at=job.finished_at,
            result=job.result,
            error_name=job.error_name,
            error_message=job.error_message,
            error_hint=job.error_hint,
        )

    @property
    def finished(self) -> bool:
        return self.state in {"done", "failed", "cancelled"}

    @property
    def failed(self) -> bool:
        """True if it failed by itself and was not cancelled."""
        return self.state == "failed" and self.error_name != Cancelled.bus_name()

    @property
    def progress(self) -> float | None:
        """Progress from 0 to 1; None where it is not known."""
        if self.finished or not self.total_bytes:
            return None
        return min(1.0, self.done_bytes / self.total_bytes)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The data that icon, tooltip, menu and notifications are made of. `status` is None while no daemon answers."""

    status: Status | None = None
    models: tuple[Model, ...] = ()
    devices: tuple[Device, ...] = ()
    jobs: tuple[JobView, ...] = ()
    dismissed: frozenset[int] = frozenset()  # numbers of failed jobs whose errors were seen

    @property
    def active(self) -> Model | None:
        """The model that answers now."""
        name = self.status.active_model if self.status else ""
        return next((model for model in self.models if model.name == name), None)

    @property
    def under_way(self) -> tuple[JobView, ...]:
        return tuple(job for job in self.jobs if not job.finished)

    @property
    def failures(self) -> tuple[JobView, ...]:
        """Failed jobs that still matter, latest first: neither seen nor followed by a success of the same kind."""
        mended: set[tuple[str, str]] = set()
        found = []
        for job in sorted(self.jobs, key=lambda job: job.number, reverse=True):
            if job.state == "done":
                mended.add((job.kind, job.subject))
            elif job.failed and job.number not in self.dismissed and (job.kind, job.subject) not in mended:
                found.append(job)
        return tuple(found)

    @property
    def state(self) -> State:
        if self.status is None:
            return State.AWAY
        kinds = {job.kind for job in self.under_way}
        if kinds & _SWAPPING:
            return State.SWAPPING
        if kinds & MAKES_A_MODEL:
            return State.CONVERTING
        if self.failures:
            return State.FAILED
        return State.SERVING if self.status.active_model else State.IDLE

    @property
    def shown_job(self) -> JobView | None:
        """The job shown by icon and header: the first one that determines the state."""
        return _first(self.under_way, {State.SWAPPING: _SWAPPING, State.CONVERTING: MAKES_A_MODEL}.get(self.state, ()))

    @property
    def progress(self) -> float | None:
        """Progress from 0 to 1 of what icon and header show."""
        return self.shown_job.progress if self.shown_job else None


def _first(jobs: tuple[JobView, ...], kinds: Collection[str]) -> JobView | None:
    wanted = [job for job in jobs if job.kind in kinds]
    running = [job for job in wanted if job.state == "running"]
    return next(iter(running or wanted), None)
