# SPDX-License-Identifier: Apache-2.0
"""The daemon's jobs, from its signals, kept for longer than the daemon keeps those that have ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flashd.client.client import Client, Job
from flashd.client.results import Event, Model, Properties, Status
from flashd.dbus import wire
from flashd.gateway.page.history import History
from flashd.gateway.page.schema import JobState

_MOST_KEPT = 300
_ENDS = frozenset({"done", "failed", "cancelled"})
_LOST = "the daemon ended during the job"
_FIELDS = {
    **{"Kind": "kind", "Subject": "subject", "State": "state", "Phase": "phase", "DoneBytes": "done_bytes"},
    **{"TotalBytes": "total_bytes", "CreatedAt": "created_at", "FinishedAt": "finished_at"},
}
_NEW = JobState("", "", "queued", "", 0, 0, 0.0, 0.0, "", "", {}, "", "", "")


class Jobs:
    """A watch of the follower, whose thread calls its methods; `all` may be called by any."""

    def __init__(self, on_change: Callable[[], None], history: History) -> None:
        """`on_change` is called from the thread."""
        self._on_change = on_change
        self._history = history
        self._jobs: dict[str, JobState] = {}  # by number, oldest first

    def all(self) -> dict[str, JobState]:
        """The jobs by number, oldest first."""
        known = dict(self._jobs)
        room = _MOST_KEPT - len(known)
        before = self._history.jobs()[-room:] if room > 0 else []
        return {**{f"before-{number}": each for number, each in enumerate(before)}, **known}

    def began(self, client: Client) -> None:
        running = {str(job.number): _of(job) for job in client.jobs()}
        # Another daemon counts its jobs anew: what the last one did not end, it took with it.
        kept = {} if self._is_another(running) else self._jobs
        self._jobs = {**{number: _ended(job, running.get(number)) for number, job in kept.items()}, **running}
        self._on_change()

    def listed(self, models: Mapping[str, Model], status: Status) -> None:
        """Nothing: jobs tell of themselves."""

    def happened(self, event: Event) -> None:
        if event.interface == wire.DEVICE:
            self._on_change()
        if event.interface != wire.JOB or event.kind not in {"added", "changed"}:
            return
        number = event.path.rsplit("/", 1)[-1]
        before = self._jobs.get(number)
        if before is None and event.kind == "changed":
            return
        now = self._jobs[number] = _with(before or _NEW, event.properties)
        if now.state in _ENDS and (before is None or before.state not in _ENDS):
            self._history.add(now)
        self._forget()
        self._on_change()

    def _is_another(self, running: Mapping[str, JobState]) -> bool:
        return any(
            (known := self._jobs.get(number)) is not None and known.created_at != job.created_at
            for number, job in running.items()
        ) or (not running and bool(self._jobs))

    def _forget(self) -> None:
        ended = [number for number, job in self._jobs.items() if job.state in _ENDS]
        for number in ended[: max(0, len(self._jobs) - _MOST_KEPT)]:
            del self._jobs[number]


def _of(job: Job) -> JobState:
    result, error = job.result, (job.error_name, job.error_message, job.error_hint)
    found: dict[str, Any] = {"Kind": job.kind, "Subject": job.subject, "State": job.state, "Phase": job.phase}
    found |= {"DoneBytes": job.done_bytes, "TotalBytes": job.total_bytes, "CreatedAt": job.created_at}
    return _with(_NEW, {**found, "FinishedAt": job.finished_at, "Result": result, "Error": error})


def _with(job: JobState, said: Properties) -> JobState:
    values: dict[str, Any] = {field: said[name] for name, field in _FIELDS.items() if name in said}
    if result := said.get("Result"):
        values |= {"how": str(result.get("how", "")), "from_tier": str(result.get("from_tier", ""))}
        values["phases"] = {str(phase): float(seconds) for phase, seconds in dict(result.get("phases", {})).items()}
    if (error := said.get("Error")) and error[0]:
        name, message, hint = error
        short = name.rsplit(".", 1)[-1]
        values |= {"error": short, "message": message.removesuffix("\n" + hint) if hint else message, "hint": hint}
    return replace(job, **values)


def _ended(job: JobState, now: JobState | None) -> JobState:
    """A job that was known before the connection was lost."""
    if now is not None or job.state in _ENDS:
        return job
    return replace(job, state="failed", error="Unavailable", message=_LOST)
