# SPDX-License-Identifier: Apache-2.0
"""Starts and stops this user's daemon: `flash start` and `flash stop`.

The daemon runs under a manager that keeps its descriptors and restarts it, so that models in memory outlive a daemon:
the user's systemd, if there is one, else our own keeper (native/keeper.cpp).
"""

from __future__ import annotations

import importlib.util
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashd.client import client as clients
from flashd.client import user_unit
from flashd.client.client import Client
from flashd.config.environment import given_bus_address, has_session_bus
from flashd.config.paths import Scope, default_paths
from flashd.errors import FlashdError, Unavailable

_START_S = 60.0
_STOP_S = 60.0
_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Started:
    """The result of `start`: a connection to the new daemon, and the file of its log."""

    client: Client
    log: Path


def start(asked: str | None = None) -> Started:
    """Starts the daemon on the bus `asked`, by default the session bus, or a private bus if there is none.

    Raises Unavailable, with the end of the log, if the daemon does not start.
    """
    address = asked or given_bus_address() or ("session" if has_session_bus() else "private")
    log = default_paths(Scope.USER).state / "flashd.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    before_bytes = log.stat().st_size if log.exists() else 0
    command = [sys.executable, "-m", "flashd.daemon.main", "--bus", address]
    try:
        if address in {"session", "private"} and user_unit.is_possible():
            user_unit.start(command, log)
            return Started(clients.connect(asked), log)
        return Started(_below_keeper(command, asked, log), log)
    except Unavailable as error:
        said = log.read_bytes()[before_bytes:] if log.exists() else b""
        lines = said.decode(errors="replace").strip().splitlines()[-3:] or [error.message]
        raise Unavailable("flashd did not start: " + "\n".join(lines), hint=f"see the whole log, {log}") from None


def stop(client: Client) -> None:
    """Stops the daemon and its engines, and waits until all their processes have ended.

    Raises Unavailable if that takes too long.
    """
    keepers = list(default_paths(Scope.USER).runtime.glob("keeper.*"))
    deadline = time.monotonic() + _STOP_S
    client.stop()
    while _answers(client) or any(_is_bound(keeper) for keeper in keepers):
        if time.monotonic() > deadline:
            raise Unavailable(
                f"flashd is still running after {_STOP_S:.0f} s", hint="see in its log what it is waiting for"
            )
        time.sleep(_LOOK_S)


def restart(client: Client, asked: str | None = None) -> Client:
    """Restarts the daemon, keeping models in memory and engines. Returns a connection to the new daemon.

    Raises Unavailable if no manager would start it again, or if it does not start.
    """
    client.restart()
    deadline = time.monotonic() + _START_S
    while _answers(client):
        if time.monotonic() > deadline:
            raise Unavailable(
                f"flashd is still running after {_START_S:.0f} s", hint="see in its log what it is waiting for"
            )
        time.sleep(_LOOK_S)
    while True:
        try:
            return clients.connect(asked, activate=False)
        except Unavailable as error:
            if time.monotonic() > deadline:
                hint = "see its log for the reason; flash start starts it without the models that were in memory"
                raise Unavailable(f"flashd does not start again: {error.message}", hint=hint) from None
        time.sleep(_LOOK_S)


def _answers(client: Client) -> bool:
    try:
        client.status()
    except FlashdError:
        return False
    return True


def _is_bound(keeper: Path) -> bool:
    """Tells whether a keeper listens on its socket. Removes the socket of a keeper that was killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect(str(keeper))
        except ConnectionRefusedError:
            keeper.unlink(missing_ok=True)
            return False
        except OSError:  # it was removed meanwhile
            return False
    return True


def _below_keeper(command: Sequence[str], asked: str | None, log: Path) -> Client:
    runtime = default_paths(Scope.USER).runtime
    runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    below = [str(keeper()), str(runtime / f"keeper.{secrets.token_hex(4)}")]
    with log.open("ab") as words:
        process = subprocess.Popen(
            [*below, *command], stdin=subprocess.DEVNULL, stdout=words, stderr=words, start_new_session=True
        )
    deadline = time.monotonic() + _START_S
    try:
        while True:
            try:
                return clients.connect(asked)
            except Unavailable:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
            time.sleep(_LOOK_S)
    except BaseException:
        process.terminate()
        process.wait()
        raise


def keeper() -> Path:
    """Returns the path of the keeper program. It is in the folder of our extension module, not always in that of our
    Python files.
    """
    found = importlib.util.find_spec("flashd._native")
    program = Path(found.origin).with_name("flashd-keeper") if found and found.origin else None
    if program is None or not program.exists():
        raise Unavailable("flashd-keeper is not installed", hint="reinstall flashd with pip or from its package")
    return program
