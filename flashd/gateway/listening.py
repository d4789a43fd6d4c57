# SPDX-License-Identifier: Apache-2.0
"""The sockets at which the gateway answers."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from flashd.config.environment import inherited_fds
from flashd.errors import InvalidArgument, Unavailable

DEFAULT_ADDRESS = "127.0.0.1:8434"


@dataclass(frozen=True, slots=True)
class Refused:
    """An address, HOST:PORT, at which the gateway was told to listen and does not."""

    address: str
    why: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Opened:
    """The sockets that listen, and the addresses without one."""

    sockets: Sequence[socket.socket]
    refused: Sequence[Refused] = ()

    @property
    def addresses(self) -> list[str]:
        """HOST:PORT of each socket of a network."""
        names = [opened.getsockname() for opened in self.sockets if opened.family != socket.AF_UNIX]
        return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port, *_ in names]


def opened(addresses: Sequence[str], path: Path | None, *, has_tokens: bool, until: contextlib.ExitStack) -> Opened:
    """Opens the addresses and the Unix socket, which `until` closes; or takes those that the service manager opened.

    If only some addresses can be used, these are. Raises InvalidArgument or Unavailable if none can, or if the Unix
    socket cannot.
    """
    if given := [socket.socket(fileno=fd) for fd, _ in inherited_fds()]:
        return Opened([until.enter_context(each) for each in given])
    sockets = []
    errors: dict[str, InvalidArgument | Unavailable] = {}
    for address in addresses:
        try:
            sockets.append(until.enter_context(bound(address, has_tokens=has_tokens)))
        except (InvalidArgument, Unavailable) as error:
            errors[address] = error
    if errors and not sockets:
        raise next(iter(errors.values()))
    if path is not None:
        sockets.append(until.enter_context(_bound_at(path)))
    return Opened(sockets, [Refused(address, error.message, error.hint) for address, error in errors.items()])


def bound(address: str, *, has_tokens: bool) -> socket.socket:
    """Listens at HOST:PORT. Raises InvalidArgument, or Unavailable if the address is taken."""
    host, _, port = address.rpartition(":")
    try:
        ip = ip_address(host.strip("[]").replace("localhost", "127.0.0.1"))
        number = int(port)
    except ValueError:
        raise InvalidArgument(f"{address!r} is no address", hint=f"write it as {DEFAULT_ADDRESS}") from None
    if not ip.is_loopback and not has_tokens:
        hint = "make a token for those who may use it: flash token new NAME"
        raise InvalidArgument(f"{address} can be reached from other machines", hint=hint)
    # By its protocol asyncio knows connections for which it turns off Nagle's delay, of 40 ms for most first tokens.
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((str(ip), number))
        listening.listen()  # before that, the address could be another's as well
    except (OSError, OverflowError) as error:
        listening.close()
        change = "flash config gateway.addresses '[\"127.0.0.1:8435\"]'"
        hint = f"another program may listen there; free it, or choose others: {change}"
        raise Unavailable(f"cannot listen at {address}: {error}", hint=hint) from None
    return listening


@contextlib.contextmanager
def _bound_at(path: Path) -> Iterator[socket.socket]:
    """A Unix socket that only this user can connect to, in place of one that an earlier gateway left. It is removed at
    the end, unless a later gateway has put its own there."""
    hint = "choose another path with --socket"
    if path.exists() and not path.is_socket():
        raise InvalidArgument(f"{path} is there, and is no socket", hint=hint)
    with socket.socket(socket.AF_UNIX) as other:
        if path.exists() and other.connect_ex(str(path)) == 0:
            raise Unavailable(f"another gateway listens at {path}", hint=hint)
    listening = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        listening.bind(str(path))
        listening.listen()
    except OSError as error:
        listening.close()
        raise Unavailable(f"cannot listen at {path}: {error.strerror or error}", hint=hint) from None
    finally:
        os.umask(before)
    made = path.stat().st_ino
    try:
        with listening:
            yield listening
    finally:
        with contextlib.suppress(OSError):
            if path.stat().st_ino == made:
                path.unlink()
