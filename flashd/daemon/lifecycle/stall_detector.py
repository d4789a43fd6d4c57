# SPDX-License-Identifier: Apache-2.0
"""Detects a stuck streamer or store: a transfer without progress for longer than any disk needs.

A thread that hangs in the kernel or in a driver cannot be ended from here, and its resources cannot be freed. So the
watchdog stops, and the service manager restarts the daemon, which takes over models in memory.

Conversions read from users' file systems. If one of those hangs, a new daemon would only hang in it again. So
conversions are not watched; while one stalls, a small write tests whether the store hangs.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flashd.units import format_bytes


class Moving(Protocol):
    """A transfer of the streamer."""

    @property
    def done_bytes(self) -> int: ...

    @property
    def total_bytes(self) -> int: ...

    @property
    def finished(self) -> bool: ...


@dataclass(slots=True)
class _Write:
    """A running test write to the store, as a transfer of one byte."""

    done_bytes: int = 0
    total_bytes: int = 1
    finished: bool = False


@dataclass(slots=True)
class _Watched:
    transfer: Moving
    done_bytes: int
    since: float


class StallDetector:
    """Watches the daemon's transfers. All threads may call it."""

    def __init__(self, patience_s: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        """Detects nothing if `patience_s` returns 0."""
        self._patience_s = patience_s
        self._clock = clock
        self._lock = threading.Lock()
        self._watched: list[_Watched] = []
        self._write: _Write | None = None

    def started(self, transfer: Moving) -> None:
        with self._lock:  # finished transfers are removed here too, because `found` may never be called
            self._watched = [watched for watched in self._watched if not watched.transfer.finished]
            self._watched.append(_Watched(transfer, 0, self._clock()))

    def look_at(self, folder: Path) -> None:
        """Begins a test write in a folder of the store, in a thread, unless one is running."""
        with self._lock:
            if self._write is not None and not self._write.finished:
                return
            write = self._write = _Write()
        self.started(write)
        threading.Thread(target=_write_a_little, args=(folder, write), name="look at the store", daemon=True).start()

    def found(self) -> str:
        """Describes a stuck transfer; empty if there is none.

        Call it often, because progress is measured between calls.
        """
        now, worst = self._clock(), ""
        with self._lock:
            self._watched = [watched for watched in self._watched if not watched.transfer.finished]
            watching = list(self._watched)
        for watched in watching:
            done_bytes, total_bytes = watched.transfer.done_bytes, watched.transfer.total_bytes
            # All bytes are done, but the transfer is not: it is being flushed, which reports no progress.
            if done_bytes != watched.done_bytes or done_bytes == total_bytes:
                watched.done_bytes, watched.since = done_bytes, now
            elif (patience_s := self._patience_s()) and now - watched.since > patience_s:
                worst = _words(watched.transfer)
        return worst


def _words(transfer: Moving) -> str:
    if isinstance(transfer, _Write):
        return "the store does not answer"
    return f"a transfer is stuck at {format_bytes(transfer.done_bytes)} of {format_bytes(transfer.total_bytes)}"


def _write_a_little(folder: Path, write: _Write) -> None:
    with (
        contextlib.suppress(OSError),
        tempfile.TemporaryFile(dir=folder) as file,
    ):  # even the error of a full disk is an answer
        file.write(b"flashd")
        file.flush()
        os.fsync(file.fileno())
    write.finished = True
