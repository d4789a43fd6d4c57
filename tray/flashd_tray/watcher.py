# SPDX-License-Identifier: Apache-2.0
"""A thread that follows the daemon's signals, and reconnects after every interruption.

All ends of the connection (a restart of the daemon, the end of the bus, a suspended machine) are handled in the same
way: the snapshot says that no daemon answers, and the thread tries again until one does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable

from flashd.client.client import Client, connect
from flashd.client.results import Event
from flashd.dbus import wire
from flashd.errors import FlashdError, NotFound
from flashd_tray.snapshot import JobView, Snapshot

log = logging.getLogger(__name__)

_GATHER_S = 0.1  # changes come in bursts, which need only one update
_KNOCK_S = 1.0
_PUZZLED_S = 30.0
_PATIENCE_S = 30.0  # after this time without events, a call checks the connection


class Watcher:
    """Calls `on_change` with a new snapshot after each change, from its own thread."""

    def __init__(self, on_change: Callable[[Snapshot], None], *, connect: Callable[[], Client] = connect) -> None:
        self._on_change = on_change
        self._connect = connect
        self._stopping = threading.Event()
        self._knock = threading.Event()
        self._events: queue.SimpleQueue[Event | None] | None = None
        self._thread = threading.Thread(target=self._run, name="flashd watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, waiting a few seconds at most, because the bus may block it."""
        self._stopping.set()
        self._knock.set()
        events = self._events
        if events is not None:
            events.put(None)
        self._thread.join(timeout=3)

    def knock(self) -> None:
        """Looks for the daemon at once, because it has just been started."""
        self._knock.set()

    def _run(self) -> None:
        self._on_change(Snapshot())
        while not self._stopping.is_set():
            try:
                with self._connect() as client:
                    self._follow(client)
                pause_s = _KNOCK_S
            except FlashdError as error:
                log.debug("no daemon: %s", error)
                pause_s = _KNOCK_S
            except Exception:  # for example a daemon of another version, which must not fill the log
                log.exception("the connection ended with an unexpected error")
                pause_s = _PUZZLED_S
            if not self._stopping.is_set():
                self._on_change(Snapshot())
                self._knock.wait(pause_s)
                self._knock.clear()

    def _follow(self, client: Client) -> None:
        """Follows the signals until the connection ends, or `stop` is called."""
        with client.subscribed() as events:
            self._events = events
            try:
                known = _everything(client)
                self._on_change(known)
                while (batch := self._gathered(events)) is not None:
                    known = _updated(client, known, batch)
                    self._on_change(known)
            finally:
                self._events = None

    def _gathered(self, events: queue.SimpleQueue[Event | None]) -> list[Event] | None:
        """Returns the next burst of events; an empty list when a check is due; None at the end."""
        batch: list[Event] = []
        deadline = time.monotonic() + _PATIENCE_S
        while not self._stopping.is_set():
            try:
                event = events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return batch
            if event is None:
                return None
            if not batch:
                deadline = time.monotonic() + _GATHER_S
            batch.append(event)
        return None


def _everything(client: Client) -> Snapshot:
    return Snapshot(
        status=client.status(),
        models=tuple(client.models()),
        devices=tuple(client.devices()),
        jobs=tuple(JobView.of(job) for job in client.jobs()),
    )


def _updated(client: Client, known: Snapshot, batch: list[Event]) -> Snapshot:
    """Reads the objects that have changed according to the events, and always the status."""
    touched = {event.interface for event in batch}
    changes = dataclasses.replace(known, status=client.status())
    if wire.MODEL in touched:
        changes = dataclasses.replace(changes, models=tuple(client.models()))
    if wire.DEVICE in touched:
        changes = dataclasses.replace(changes, devices=tuple(client.devices()))
    if wire.JOB in touched:
        changes = dataclasses.replace(changes, jobs=_updated_jobs(client, known.jobs, batch))
    return changes


def _updated_jobs(client: Client, known: tuple[JobView, ...], batch: list[Event]) -> tuple[JobView, ...]:
    jobs = {job.number: job for job in known}
    for path in dict.fromkeys(event.path for event in batch if event.interface == wire.JOB):
        number = int(path.rsplit("/", 1)[-1])
        jobs.pop(number, None)
        with contextlib.suppress(NotFound):  # it was removed meanwhile
            jobs[number] = JobView.of(client.job(number))
    return tuple(jobs[number] for number in sorted(jobs))
