# SPDX-License-Identifier: Apache-2.0
"""Sources that an inbox ignores until they change, across restarts.

For the daemon, these are sources whose model was removed; for `flashd-inbox`, sources that it has imported.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import tomli_w

from flashd.durable import abandon, read_fingerprints, replace_file, set_aside

log = logging.getLogger(__name__)

_AGAIN_S = 10.0


class KnownSources:
    """Fingerprints of sources by path, in a small TOML file. A source that changes is no longer known."""

    def __init__(
        self, path: Path, if_lost: str, begin: Callable[[Callable[[], None]], None] = lambda write: write()
    ) -> None:
        """`if_lost` describes the effect of a lost file, for the log. `begin` runs the write of the file in the
        background, because it waits for the disk; failed writes are repeated.
        """
        self._path = path
        self._if_lost = if_lost
        self._begin = begin
        self._mutex = threading.Lock()
        self._fingerprints: dict[str, str] = {}
        self._failed_at: float | None = None
        abandon(path)
        try:
            self._fingerprints = read_fingerprints(path)
        except (OSError, ValueError) as error:
            log.warning("%s is damaged, %s: %s; it is now %s", path, if_lost, error, set_aside(path))

    def holds(self, source: str, fingerprint: str) -> bool:
        if self._failed_at is not None and time.monotonic() - self._failed_at > _AGAIN_S:
            self._failed_at = None
            self._begin(self._write)
        return self._fingerprints.get(source) == fingerprint

    def add(self, source: str, fingerprint: str) -> None:
        self._fingerprints[source] = fingerprint
        self._begin(self._write)

    def drop(self, source: str) -> None:
        """Forgets a deleted source, so that a later one at the same path is new."""
        if self._fingerprints.pop(source, None) is not None:
            self._begin(self._write)

    def _write(self) -> None:
        """Writes the current state, so that the last write is always up to date."""
        try:
            with self._mutex:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(self._path, tomli_w.dumps(dict(self._fingerprints)).encode())
                self._failed_at = None
        except OSError as error:
            self._failed_at = time.monotonic()
            log.warning("%s cannot be written, %s: %s", self._path, self._if_lost, error)
