# SPDX-License-Identifier: Apache-2.0
"""How does the journal get more than text of us? By its own protocol, where what we print goes to it anyway.

A record made with `extra=fields(...)` carries fields by which journalctl finds it: `journalctl FLASHD_MODEL=ada`. On
any other standard error the same record is a line.

Protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SOCKET = Path("/run/systemd/journal/socket")
_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}  # syslog(3)
_ATTRIBUTE = "flashd_fields"
# The largest datagram that the kernel takes by default (net.core.wmem_default) is larger; a message need not be.
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
    """The `extra` of a log record: what it is about, as fields of the journal."""
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
    """Sends records to the journal. One that it does not take is printed, as if there were no journal."""

    def __init__(self, path: Path = _SOCKET) -> None:
        super().__init__()
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._printer = logging.StreamHandler()
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

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
    """By length and not by line, so that no value can end early and begin a field of its own."""
    data = value.encode("utf-8", "backslashreplace")[:_LARGEST_VALUE]
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
