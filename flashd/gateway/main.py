# SPDX-License-Identifier: Apache-2.0
"""`flashd-gateway`: one HTTP address for all models of a daemon."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path

from flashd._version import __version__
from flashd.config.environment import inherited_fds
from flashd.config.paths import Scope
from flashd.errors import FlashdError, InvalidArgument, Unavailable
from flashd.gateway.tokens import TokenFile, default_file
from flashd.legible_log import LegibleFormatter

DEFAULT_ADDRESS = "127.0.0.1:8434"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(LegibleFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])  # libraries tell of each request to the hub
    logging.getLogger("flashd").setLevel(logging.INFO)
    try:
        with contextlib.ExitStack() as stack:
            tokens = TokenFile(options.tokens or default_file(Scope.SYSTEM if options.bus == "system" else Scope.USER))
            has_tokens = bool(tokens.all())
            sockets = [stack.enter_context(listening) for listening in _sockets(options, has_tokens=has_tokens)]
            try:  # late, because the manual page is made where these libraries are not
                from flashd.gateway import server
            except ImportError as error:
                hint = "install it: pip install 'flashd[gateway]'"
                raise Unavailable(
                    f"the gateway needs {error.name or 'libraries'}, which is missing", hint=hint
                ) from None

            asyncio.run(server.serve(options, sockets, tokens))
    except FlashdError as error:
        print(f"flashd-gateway: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("flashd-gateway", description="One HTTP address for all models of a flashd.")
    made.add_argument("--version", action="version", version=__version__)
    made.add_argument("--bus", help="session, system or a D-Bus address; default: as flash finds it")
    made.add_argument(
        "--address", action="append", help=f"HOST:PORT to listen at, as often as you like; default: {DEFAULT_ADDRESS}"
    )
    made.add_argument("--socket", type=Path, help="a Unix socket to listen at, besides")
    made.add_argument("--tokens", type=Path, help="file of the tokens; default: the one that flash token changes")
    made.add_argument(
        "--linger", type=float, metavar="SECONDS", help="end when no daemon has run for this long; default: never"
    )
    return made


def _sockets(
    options: argparse.Namespace, *, has_tokens: bool
) -> Iterator[contextlib.AbstractContextManager[socket.socket]]:
    """The sockets that the service manager opened for us, or those of the options. Raises InvalidArgument, or
    Unavailable if an address is taken."""
    given = [socket.socket(fileno=fd) for fd, _ in inherited_fds()]
    if given:
        yield from given
        return
    for address in options.address or [DEFAULT_ADDRESS]:
        yield _bound(address, has_tokens=has_tokens)
    if options.socket is not None:
        yield _bound_at(options.socket)


def _bound(address: str, *, has_tokens: bool) -> socket.socket:
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


if __name__ == "__main__":
    sys.exit(main())
