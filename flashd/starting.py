# SPDX-License-Identifier: Apache-2.0
"""How does a daemon come to run for this user, where none does? In the background, as `flash start` leaves it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from flashd import client as clients
from flashd import config
from flashd.client import Client
from flashd.errors import Unavailable

_START_S = 15.0


@dataclass(frozen=True, slots=True)
class Started:
    """A daemon that was just started, a connection to it, and where it logs."""

    client: Client
    process: subprocess.Popen[bytes]
    log: Path


def start(asked: str | None = None) -> Started:
    """Starts the daemon on the bus that was asked for, else on the session bus, else on one of its own.

    Raises Unavailable, with its last words, if it does not come.
    """
    address = asked or config.bus_address() or ("session" if config.has_session_bus() else "private")
    log = config.default_paths(config.Scope.USER).state / "flashd.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "flashd.daemon.main", "--bus", address]
    with log.open("ab") as words:
        before_bytes = words.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=words, stderr=words, start_new_session=True
        )
    return Started(_awaited(asked, process, log, before_bytes), process, log)


def _awaited(asked: str | None, process: subprocess.Popen[bytes], log: Path, before_bytes: int) -> Client:
    deadline = time.monotonic() + _START_S
    while True:
        with contextlib.suppress(Unavailable):
            return clients.connect(asked)
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_bytes()[before_bytes:].decode(errors="replace").strip().splitlines()[-3:]
            raise Unavailable("flashd did not start: " + "\n".join(said), hint=f"the whole log is {log}")
        time.sleep(0.02)
