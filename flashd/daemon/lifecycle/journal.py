# SPDX-License-Identifier: Apache-2.0
"""Writes log records with fields to the journal, by its own protocol, if our standard error is the journal.

A record made with `extra=fields(...)` has fields by which journalctl can find it: `journalctl FLASHD_MODEL=ada`. On
other standard errors the same record is a line of text.

Protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashd.legible_log import LegibleFormatter

_SOCKET = Path("/run/systemd/journal/socket")
_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}  # syslog(3)
_ATTRIBUTE = "flashd_fields"
# Well below the largest datagram that the kernel accepts by default (net.core.wmem_default).
_LARGEST_VALUE = 64 * 1024


def fields(
    *,
    model: str | None = None,
    job: int | None = None,
    tier: str | None = None,
    size_bytes: int | None = None,
    seconds: float | None = None,
    error: str | None = None,
) -> Mapping[str, Any]:
    """Returns the `extra` of a log record with its subject, as fields of the journal."""
    given = {
        "FLASHD_MODEL": model,
        "FLASHD_JOB": job,
        "FLASHD_TIER": tier,
        "FLASHD_BYTES": size_bytes,
        "FLASHD_ERROR": error,
        "FLASHD_SECONDS": None if seconds is None else f"{seconds:.6f}",
    }
    return {_ATTRIBUTE: {name: str(value) for name, value in given.items() if value is not None}}


class JournalHandler(logging.Handler):
    """Sends records to the journal. A record that the journal does not accept is printed."""

    def __init__(self, path: Path = _SOCKET) -> None:
        super().__init__()
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._printer = logging.StreamHandler()
        self.setFormatter(LegibleFormatter("%(name)s: %(message)s"))
        self._printer.setFormatter(self.formatter)

    def emit(self, record: logging.LogRecord) -> None:
        entry = {
            "MESSAGE": self.format(record),
            "PRIORITY": str(_PRIORITIES.get(record.levelno, 6)),
            "SYSLOG_IDENTIFIER": "flashd",
            "LOGGER": record.name,
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName or "",
            **getattr(record, _ATTRIBUTE, {}),
        }
        try:
            self._socket.sendto(b"".join(_field(name, value) for name, value in entry.items()), self._path)
        except OSError:
            self._printer.emit(record)

    def close(self) -> None:
        self._socket.close()
        super().close()


def _field(name: str, value: str) -> bytes:
    """Encodes a field with its length, so that no value can contain another field."""
    data = value.encode("utf-8", "backslashreplace")[:_LARGEST_VALUE]
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
