# SPDX-License-Identifier: Apache-2.0
"""Which sources in the inbox shall stay mere files? Those whose model somebody removed, across restarts."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path

import tomli_w

log = logging.getLogger(__name__)


class Dismissals:
    """Fingerprints of sources by their path, in a small TOML file. A source that changes is no longer dismissed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fingerprints: dict[str, str] = {}
        try:
            self._fingerprints = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            log.warning("%s is not readable, removed models may come back: %s", path, error)

    def holds(self, source: str, fingerprint: str) -> bool:
        return self._fingerprints.get(source) == fingerprint

    def add(self, source: str, fingerprint: str) -> None:
        self._fingerprints[source] = fingerprint
        self._write()

    def drop(self, source: str) -> None:
        """The source itself is gone: one that is dropped there later is a new one."""
        if self._fingerprints.pop(source, None) is not None:
            self._write()

    def _write(self) -> None:
        partial = self._path.with_suffix(".partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(tomli_w.dumps(self._fingerprints), encoding="utf-8")
            partial.rename(self._path)
        except OSError as error:
            log.warning("%s cannot be written, removed models may come back: %s", self._path, error)
