# SPDX-License-Identifier: Apache-2.0
"""Requests and jobs that have ended, in a file, so that the page shows them after a restart of the gateway.

Nothing of what was asked or answered is in it. A file that cannot be read or written costs no request: the page then
knows only what it has seen itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from flashd.gateway.page.schema import JobState, RequestState, as_json
from flashd.json_values import JsonObject

T = TypeVar("T", RequestState, JobState)

log = logging.getLogger(__name__)

_SHOWN = 300  # of each kind, of earlier gateways
_TABLE = "CREATE TABLE IF NOT EXISTS ended (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, entry TEXT NOT NULL)"
_LAST = "SELECT entry FROM ended WHERE kind = ? ORDER BY id DESC LIMIT ?"
_ADD = "INSERT INTO ended (kind, entry) VALUES (?, ?)"
_TRIM = "DELETE FROM ended WHERE id <= (SELECT max(id) FROM ended) - ?"
_CLOSE_S = 5.0
_LOCKED_S = 1.0  # by an earlier gateway, which is about to end

_Row = tuple[str, str]


class History:
    """What was there before, and a thread that writes what comes; `add` may be called from any thread."""

    def __init__(self, path: Path | None, most: Callable[[], int]) -> None:
        """`most` returns how many entries are kept at the moment; with 0, or without a path, nothing is."""
        self._path = path
        self._most = most
        self._rows: queue.SimpleQueue[_Row | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._starting = threading.Lock()
        self._requests: list[JsonObject] = []
        self._jobs: list[JobState] = []
        if path is not None and path.exists():
            self._read(path)

    @property
    def is_kept(self) -> bool:
        """Tells whether anything is kept at the moment."""
        return self._path is not None and self._most() > 0

    def requests(self) -> list[JsonObject]:
        """The last requests to earlier gateways as JSON, oldest first. They must not be changed."""
        return self._requests if self.is_kept else []

    def jobs(self) -> list[JobState]:
        """The last jobs that earlier gateways knew of, oldest first."""
        return self._jobs if self.is_kept else []

    def add(self, ended: RequestState | JobState) -> None:
        """Keeps an entry, if any are kept; otherwise removes those that were."""
        if self.is_kept:
            with self._starting:
                if self._writer is None:
                    self._writer = threading.Thread(target=self._write, name="history", daemon=True)
                    self._writer.start()
            self._rows.put((type(ended).__name__, json.dumps(as_json(ended))))
        elif self._path is not None and self._writer is None:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def close(self) -> None:
        """Waits until all is written, for some seconds at most."""
        if self._writer is not None:
            self._rows.put(None)
            self._writer.join(_CLOSE_S)

    def _read(self, path: Path) -> None:
        try:
            with contextlib.closing(_opened(path)) as file:
                self._requests = [as_json(each) for each in _last(file, RequestState)]
                self._jobs = _last(file, JobState)
        except (sqlite3.OperationalError, OSError) as error:  # it is locked, or not ours to read: not damaged
            log.warning("%s cannot be read: %s", path, error)
        except sqlite3.DatabaseError as error:
            log.warning("%s is damaged, and begins anew: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()

    def _write(self) -> None:
        assert self._path is not None
        try:
            with contextlib.closing(_opened(self._path)) as file:
                while (rows := self._next()) is not None:
                    with file:
                        file.executemany(_ADD, rows)
                        file.execute(_TRIM, (self._most(),))
        except (sqlite3.Error, OSError) as error:
            log.warning("%s is not written any more: %s", self._path, error)
            while self._rows.get() is not None:
                pass

    def _next(self) -> list[_Row] | None:
        """Waits for rows, and returns all that there are; None at the end."""
        if (first := self._rows.get()) is None:
            return None
        rows = [first]
        while not self._rows.empty():
            if (row := self._rows.get()) is None:
                self._rows.put(None)  # for the next time
                break
            rows.append(row)
        return rows


NOTHING = History(None, lambda: 0)


def _opened(path: Path) -> sqlite3.Connection:
    """Opens the file, which only its user may read. Raises sqlite3.Error or OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    file = sqlite3.connect(path, timeout=_LOCKED_S)
    file.execute(_TABLE)
    return file


def _last(file: sqlite3.Connection, kind: type[T]) -> list[T]:
    found = []
    for (text,) in file.execute(_LAST, (kind.__name__, _SHOWN)):
        with contextlib.suppress(ValueError, TypeError):  # of another version
            found.append(kind(**json.loads(text)))
    return found[::-1]
