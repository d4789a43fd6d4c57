# SPDX-License-Identifier: Apache-2.0
"""Notifications for users who do not look at the menu. Pure: from two snapshots to notifications.

There is one notification for each event that a user waits for or has to act on. There is none for a quick swap, which
is visible anyway, or for a cancellation by the user. Ten models dropped together share one notification, which is
updated.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from flashd.errors import NotAuthorized, OutOfMemory, StoreFull
from flashd_tray.menu import Action, Verb, explain
from flashd_tray.preferences import Preferences, Topic
from flashd_tray.snapshot import MAKES_A_MODEL, JobView, Snapshot
from flashd_tray.words import Words

LONG_SWAP_S = 5.0
TOGETHER_S = 20.0  # models that become ready within this time of each other share a notification
NAMED = 3  # more are counted
LISTED_S = 2.0  # after its end, until the model of a job is listed


@dataclass(frozen=True, slots=True)
class Notice:
    topic: Topic
    title: str
    body: str
    action: Action | None = None
    action_label: str = ""


class Notices:
    """Follows the snapshots of one run. Jobs that ended before an absence of the daemon are not reported again."""

    def __init__(self, words: Words, clock: Callable[[], float] = time.time) -> None:
        self._words = words
        self._clock = clock
        self._seen_at = clock()
        self._before = Snapshot()
        self._ready: list[JobView] = []
        self._held: set[int] = set()  # numbers of jobs to report as soon as their models are listed

    def of(self, now: Snapshot, preferences: Preferences) -> list[Notice]:
        """Returns the notifications for the differences between `now` and the previous snapshot."""
        before, self._before = self._before, now
        if now.status is None:
            return []
        seen_at, self._seen_at = self._seen_at, self._clock()
        held, self._held = self._held, {job.number for job in now.jobs if self._awaits_its_model(job, now)}
        finished = [job for job in now.jobs if job.finished and job.number not in self._held]
        if before.status is None:  # perhaps another daemon, which counts jobs from one again
            fresh = [job for job in finished if job.finished_at > seen_at]
        else:
            ended = {job.number for job in before.jobs if job.finished} - held
            fresh = [job for job in finished if job.number not in ended]
        notices = filter(None, (self._about(job, now) for job in sorted(fresh, key=lambda job: job.finished_at)))
        # Only the last of each kind, because they replace each other on the screen.
        latest = {notice.topic: notice for notice in notices if notice.topic in preferences.topics}
        return list(latest.values())

    def _awaits_its_model(self, job: JobView, now: Snapshot) -> bool:
        """Tells whether a model has just been made that is not listed yet, because models are asked for separately."""
        is_new = job.state == "done" and job.kind in MAKES_A_MODEL and 0 <= self._clock() - job.finished_at < LISTED_S
        return is_new and all(model.name != job.subject for model in now.models)

    def _about(self, job: JobView, now: Snapshot) -> Notice | None:
        if job.failed:
            return self._failed(job)
        if job.state != "done":
            return None
        if job.kind in MAKES_A_MODEL:
            return self._became_ready(job, now)
        if job.kind == "swap" and job.finished_at - job.created_at >= LONG_SWAP_S:
            _ = self._words
            took = _.duration(job.finished_at - job.created_at)
            return Notice(Topic.SWAPPED, _("{model} answers", model=job.subject), _("The swap took {time}.", time=took))
        return None

    def _failed(self, job: JobView) -> Notice:
        _ = self._words
        why = explain(job.error_name, job.error_message, job.error_hint, _)
        refused = job.error_name in {OutOfMemory.bus_name(), StoreFull.bus_name()}
        match job.kind:
            case "import":
                title = _("{model} could not be converted", model=job.subject)
            case "pull":
                title = _("{model} could not be downloaded", model=job.subject)
            case "swap":
                title = _("No swap to {model}", model=job.subject)
            case "load":
                title = _("{model} could not be loaded", model=job.subject)
            case _other:
                title = _("Something failed in flashd")
        if job.error_name == NotAuthorized.bus_name():
            title = _("Not permitted")
        show = Action(Verb.SHOW_ERROR, str(job.number))
        topic = Topic.REFUSED if refused and job.kind not in MAKES_A_MODEL else Topic.FAILED
        return Notice(topic, title, why, show, _("Details"))

    def _became_ready(self, job: JobView, now: Snapshot) -> Notice:
        _ = self._words
        self._ready = [known for known in self._ready if job.finished_at - known.finished_at < TOGETHER_S]
        self._ready = [known for known in self._ready if known.subject != job.subject] + [job]
        names = [known.subject for known in self._ready]
        if len(names) > 1:
            title = _.many("{count} new model is ready", "{count} new models are ready", len(names))
            rest = len(names) - NAMED
            body = ", ".join(names[-NAMED:]) + (" …" if rest > 0 else "")
            return Notice(Topic.READY, title, body)
        size = next((model.size_bytes for model in now.models if model.name == job.subject), 0)
        took = _.duration(job.finished_at - job.created_at)
        body = (
            _("Converted in {time}.", time=took) if job.kind == "import" else ""
        )  # the time of a pull depends on the network
        if size:
            body = f"{_.size(size)}. {body}".strip()
        title = _("{model} is ready", model=job.subject)
        return Notice(Topic.READY, title, body, Action(Verb.SWAP, job.subject), _("Switch"))
