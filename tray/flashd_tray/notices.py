# SPDX-License-Identifier: Apache-2.0
"""Of what should a person be told who does not look? Pure: from two snapshots to notices.

Told is what somebody waits for or must act on, and once: a swap that was quick shows itself, what was cancelled is
known to whoever did it, and ten models dropped together make one notice that grows.
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
TOGETHER_S = 20.0  # models that become ready within so long of each other make one notice
NAMED = 3  # more are counted


@dataclass(frozen=True, slots=True)
class Notice:
    topic: Topic
    title: str
    body: str
    action: Action | None = None
    action_label: str = ""


class Notices:
    """Follows the snapshots of one run. After the daemon was away, what ended before we last saw it is old news."""

    def __init__(self, words: Words, clock: Callable[[], float] = time.time) -> None:
        self._words = words
        self._clock = clock
        self._seen_at = clock()
        self._before = Snapshot()
        self._ready: list[JobView] = []

    def of(self, now: Snapshot, preferences: Preferences) -> list[Notice]:
        """What is to be said about how `now` differs from the snapshot before."""
        before, self._before = self._before, now
        if now.status is None:
            return []
        seen_at, self._seen_at = self._seen_at, self._clock()
        finished = [job for job in now.jobs if job.finished]
        if before.status is None:  # another daemon, maybe, that counts from one again
            fresh = [job for job in finished if job.finished_at > seen_at]
        else:
            ended = {job.number for job in before.jobs if job.finished}
            fresh = [job for job in finished if job.number not in ended]
        notices = filter(None, (self._about(job, now) for job in sorted(fresh, key=lambda job: job.finished_at)))
        # The last word of each kind: they replace each other on the screen anyway.
        latest = {notice.topic: notice for notice in notices if notice.topic in preferences.topics}
        return list(latest.values())

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
        )  # a pull takes what the network takes
        if size:
            body = f"{_.size(size)}. {body}".strip()
        title = _("{model} is ready", model=job.subject)
        return Notice(Topic.READY, title, body, Action(Verb.SWAP, job.subject), _("Switch"))
