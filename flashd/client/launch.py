# SPDX-License-Identifier: Apache-2.0
"""Starts and stops this user's daemon and its gateway: `flash start` and `flash stop`.

Both run under a manager that restarts them, and keeps the daemon's descriptors, so that models in memory outlive a
daemon: the user's systemd, if there is one, else our own keeper (native/keeper.cpp).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flashd._version import __version__
from flashd.client import client as clients
from flashd.client import user_unit
from flashd.client.client import Client
from flashd.config import loading
from flashd.config.environment import given_bus_address, has_session_bus
from flashd.config.paths import Scope, default_paths
from flashd.dbus import address as bus_address
from flashd.errors import FlashdError, Unavailable

T = TypeVar("T")

_START_S = 60.0
_STOP_S = 60.0
_LOOK_S = 0.02
_SILENT_S = 1.0  # longer waits are explained
_ASK_S = 5.0
_LINGER_S = 60.0  # of a gateway whose daemon was killed together with its manager
_PEER_CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7)


@dataclass(frozen=True, slots=True)
class Started:
    """The result of `start`: a connection to the new daemon, and the file of its log."""

    client: Client
    log: Path


@dataclass(frozen=True, slots=True)
class RefusedAddress:
    """An address at which a gateway was to listen and does not."""

    address: str
    why: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Gateway:
    """A user's gateway: where it listens, nowhere if it does not run, and where it could not."""

    version: str = ""
    addresses: Sequence[str] = ()
    refused: Sequence[RefusedAddress] = ()

    def is_at(self, wanted: Sequence[str], *, with_refused: bool) -> bool:
        """Tells whether a new one would listen at no other addresses; port 0 means any. With those that were refused,
        they count as if they still were.
        """
        refused = [each.address for each in self.refused]
        if with_refused:
            wanted = [address for address in wanted if address not in refused]
        pairs = zip(self.addresses, wanted, strict=False)
        is_same = all(asked in {found, found.rpartition(":")[0] + ":0"} for found, asked in pairs)
        return is_same and len(self.addresses) == len(wanted)


def start(asked: str | None = None) -> Started:
    """Starts the daemon on the bus `asked`, by default the session bus, or a private bus if there is none.

    If another program starts it at the same time, that one is waited for. Raises Unavailable, with the end of the log,
    if the daemon does not start.
    """
    address = asked or given_bus_address() or ("session" if has_session_bus() else "private")
    log = default_paths(Scope.USER).state / "flashd.log"
    command = [sys.executable, "-m", "flashd.daemon.main", "--bus", address]
    bus = _private_bus() if address == "private" else address
    with _one_at_a_time():
        with contextlib.suppress(FlashdError):
            return Started(clients.connect(asked, activate=False), log)
        by_systemd = address in {"session", "private"}
        found = _managed(
            "flashd", user_unit.DAEMON, command, log, lambda: clients.connect(asked), bus=bus, by_systemd=by_systemd
        )
    return Started(found, log)


def start_gateway(
    client: Client, explain: Callable[[str], None] = lambda why: None, *, retries_refused: bool = False
) -> Gateway:
    """Starts the gateway of this user's daemon, to which `client` is connected, unless it runs as the settings say.

    It listens nowhere if the settings have no address, or if the daemon is on another bus than `start` chooses.
    `retries_refused` starts it again if it was refused an address. `explain` is called with what a long wait for an
    earlier gateway is for. If another program starts it at the same time, that one is waited for. Raises Unavailable,
    with the end of the log, if it does not start.
    """
    if not _is_own(client):
        return Gateway()
    with _one_at_a_time():
        return _gateway_as_set(client, explain, retries_refused)


def _gateway_as_set(client: Client, explain: Callable[[str], None], retries_refused: bool) -> Gateway:
    addresses: list[str] = loading.value_in(tomllib.loads(client.config()), "gateway.addresses")
    if (found := _running_gateway()) is not None:
        if found.version == __version__ and found.is_at(addresses, with_refused=not retries_refused):
            return found
        stop_gateway(explain)
    if not addresses:
        return Gateway()
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("aiohttp") is None:
        raise Unavailable("the gateway is not installed", hint="install it: pip install 'flashd[gateway]'")
    command = [sys.executable, "-m", "flashd.gateway.main", "--bus", client.bus, "--socket", str(_gateway_socket())]
    command += [word for address in addresses for word in ("--address", address)] + ["--linger", str(_LINGER_S)]
    command += ["--history", str(default_paths(Scope.USER).state / "gateway-history.sqlite")]

    def answering() -> Gateway:
        if (running := _running_gateway()) is None:
            raise Unavailable("the gateway does not answer")
        return running

    if user_unit.is_possible():
        user_unit.stop("flashd-gateway.service")  # one that lingers, whose socket went with the daemon's folder
    log = default_paths(Scope.USER).state / "flashd-gateway.log"
    return _managed("flashd-gateway", user_unit.GATEWAY, command, log, answering, bus=client.bus)


def gateway(client: Client) -> Gateway | None:
    """Returns the gateway of this user's daemon. None for other daemons."""
    return (_running_gateway() or Gateway()) if _is_own(client) else None


def _gateway_socket() -> Path:
    return default_paths(Scope.USER).runtime / "gateway.sock"


def _running_gateway() -> Gateway | None:
    """Asks the gateway of this user; None if there is none, or if it does not answer."""
    if listener(_gateway_socket()) is None:
        return None
    import http.client  # here, because it would take a third of the time of flash status

    connection = http.client.HTTPConnection("localhost", timeout=_ASK_S)
    with socket.socket(socket.AF_UNIX) as connection.sock:
        try:
            connection.sock.settimeout(_ASK_S)
            connection.sock.connect(str(_gateway_socket()))
            connection.request("GET", "/health")
            said = json.loads(connection.getresponse().read())
            refused = [
                RefusedAddress(str(each["address"]), str(each["why"]), str(each["remedy"]))
                for each in said.get("refused", [])
            ]
            return Gateway(str(said["version"]), list(said.get("addresses", [])), refused)
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
            return None


def stop_gateway(explain: Callable[[str], None] = lambda why: None) -> None:
    """Stops the gateway of this user, if one runs, and waits until it has ended: requests may finish first.

    A wait of more than a second is explained. Raises Unavailable if that takes too long.
    """
    if (pid := listener(_gateway_socket())) is None:
        return
    with contextlib.suppress(ProcessLookupError):  # it has ended just now
        process = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(process, signal.SIGTERM)
            has_ended, _, _ = select.select([process], [], [], _SILENT_S)
            if not has_ended:
                explain("waiting for the gateway: requests that it is answering may finish, for 10 s at most")
                has_ended, _, _ = select.select([process], [], [], _STOP_S)
        finally:
            os.close(process)
        if not has_ended:
            raise Unavailable(f"the gateway is still running after {_STOP_S:.0f} s", hint=f"its process is {pid}")


def stop(client: Client, explain: Callable[[str], None] = lambda why: None) -> None:
    """Stops the daemon, its engines and the gateway, and waits until all their processes have ended.

    `explain` is called with what a wait of more than a second is for. Raises Unavailable if it takes too long.
    """
    try:
        if _is_own(client):
            stop_gateway(explain)
    finally:
        _stop_daemon(client, explain)


def _stop_daemon(client: Client, explain: Callable[[str], None]) -> None:
    keepers = list(default_paths(Scope.USER).runtime.glob(f"keeper.{_label(client.bus)}.*"))
    began = time.monotonic()
    is_explained = False
    client.stop()
    while _answers(client) or any(_is_bound(keeper) for keeper in keepers):
        waited_s = time.monotonic() - began
        if waited_s > _SILENT_S and not is_explained:
            is_explained = True
            explain("waiting for flashd: its engines and transfers are ending")
        if waited_s > _STOP_S:
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


def _private_bus() -> str:
    return bus_address.of_socket(default_paths(Scope.USER).runtime / "bus")


def _is_own(client: Client) -> bool:
    """True for the daemon that `start` starts if it is told no bus: the gateway of this user is that one's."""
    return client.bus in {"session", _private_bus()}


def _label(bus: str) -> str:
    """Tells the keepers of one daemon from those of others."""
    return hashlib.sha256(bus.encode()).hexdigest()[:8]


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Has other starts by this user wait until this one has ended."""
    state = default_paths(Scope.USER).state
    state.mkdir(parents=True, exist_ok=True)
    with (state / "start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def listener(at: Path) -> int | None:
    """Returns the process that listens on a Unix socket; None if there is none (unix(7), SO_PEERCRED)."""
    with socket.socket(socket.AF_UNIX) as asking:
        try:
            asking.connect(str(at))
        except OSError:
            return None
        pid, _, _ = _PEER_CREDENTIALS.unpack(
            asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        )
    return int(pid)


def _managed(
    name: str,
    of_unit: Mapping[str, str],
    command: Sequence[str],
    log: Path,
    arrived: Callable[[], T],
    *,
    bus: str,
    by_systemd: bool = True,
) -> T:
    """Starts a program of the daemon on `bus` under a manager, the user's systemd where it may be. Returns what
    `arrived` does.

    `arrived` raises Unavailable as long as the program does not answer. Raises Unavailable with the end of the log if
    it never does.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    before_bytes = log.stat().st_size if log.exists() else 0
    try:
        if by_systemd and user_unit.is_possible():
            user_unit.start(f"{name}.service", of_unit, command, log)
            return arrived()
        return _below_keeper(command, log, arrived, bus)
    except Unavailable as error:
        said = log.read_bytes()[before_bytes:] if log.exists() else b""
        lines = said.decode(errors="replace").strip().splitlines()[-3:] or [error.message]
        raise Unavailable(f"{name} did not start: " + "\n".join(lines), hint=f"see the whole log, {log}") from None


def _below_keeper(command: Sequence[str], log: Path, arrived: Callable[[], T], bus: str) -> T:
    runtime = default_paths(Scope.USER).runtime
    runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    below = [str(keeper()), str(runtime / f"keeper.{_label(bus)}.{secrets.token_hex(4)}")]
    with log.open("ab") as words:
        process = subprocess.Popen(
            [*below, *command], stdin=subprocess.DEVNULL, stdout=words, stderr=words, start_new_session=True
        )
    deadline = time.monotonic() + _START_S
    try:
        while True:
            try:
                return arrived()
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
