# SPDX-License-Identifier: Apache-2.0
"""Parses D-Bus addresses into the sockets of their servers (D-Bus specification, Server Addresses)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashd.config.environment import given_bus_address, session_bus_address, system_bus_address, user_bus_socket
from flashd.errors import InvalidArgument, Unavailable

_PLAIN = re.compile(rb"[-0-9A-Za-z_/.\\*]")  # bytes that need no escape
_NULL_GUID = "0" * 32  # characters that sd-bus rejects
_ONLY_SOCKETS = "use unix:path=... or unix:abstract=..., because flashd sends descriptors over a Unix socket"


@dataclass(frozen=True, slots=True)
class Server:
    """The address of one server, as for connect(2). `guid` is the GUID that the server must have, if one was given."""

    socket: bytes
    guid: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A failed connection to one server of an address: the reason and a remedy."""

    entry: str
    why: str
    hint: str = ""


def escaped(path: Path) -> str:
    """Escapes a path for an address."""
    raw = os.fsencode(path)
    return "".join(chr(byte) if _PLAIN.match(bytes([byte])) else f"%{byte:02x}" for byte in raw)


def of_socket(path: Path) -> str:
    """Returns the address of a server that listens at this path."""
    return f"unix:path={escaped(path)}"


def entries(address: str) -> list[str]:
    """Splits an address into those of its servers, in the order in which they are tried.

    `session` and `system` stand for the addresses in the environment, or else the usual ones.
    """
    meant = {"session": session_bus_address, "system": system_bus_address}.get(address, lambda: address)()
    return [entry for entry in meant.split(";") if entry]


def unreachable(address: str, refusals: Sequence[Refusal]) -> Unavailable:
    """Returns the error for an address if connecting failed for all its servers."""
    hint = "check the address, and that a bus runs there; without a session bus, `flash start` runs a private one"
    if address == given_bus_address():
        hint = "the address is from FLASHD_BUS_ADDRESS: if that bus has ended, unset the variable, then flash start"
    for refusal in refusals:
        hint = refusal.hint or hint
    reasons = "; ".join(each.why if each.entry == address else f"{each.entry}: {each.why}" for each in refusals)
    return Unavailable(f"no D-Bus at {address!r}: {reasons or 'it is empty'}", hint=hint)


def server(entry: str) -> Server:
    """Parses an address. Raises InvalidArgument unless it is the address of a Unix socket."""
    transport, colon, rest = entry.partition(":")
    if not colon:
        raise InvalidArgument("that is not a D-Bus address", hint="write it like unix:path=/run/user/1000/bus")
    keys = dict(_keys(rest))
    places = sorted({"path", "abstract", "runtime"} & keys.keys())
    if transport != "unix" or len(places) != 1:
        raise InvalidArgument(f"{transport}: is not a Unix socket" if transport != "unix" else "it must name a socket",
                              hint=_ONLY_SOCKETS)  # fmt: skip
    guid = keys.get("guid", b"").decode(errors="replace").lower()
    match places:
        case ["abstract"]:
            socket = b"\0" + keys["abstract"]
        case ["runtime"]:
            socket = os.fsencode(user_bus_socket())
        case _:
            socket = keys["path"]
            if not socket or b"\0" in socket:
                raise InvalidArgument("its path is invalid")
    return Server(socket, "" if guid == _NULL_GUID else guid)


def _keys(text: str) -> Iterator[tuple[str, bytes]]:
    seen = set()
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key in seen:
            raise InvalidArgument(f"{part!r} is not KEY=VALUE" if not equals else f"it says {key} twice")
        seen.add(key)
        yield key, _unescaped(value)


def _unescaped(value: str) -> bytes:
    """Decodes %XX to a byte. Bytes that should have been escaped, but were not, are accepted."""
    raw = os.fsencode(value)
    if re.search(rb"%(?![0-9A-Fa-f]{2})", raw):
        raise InvalidArgument("a % is not followed by two hexadecimal digits")
    return re.sub(rb"%(..)", lambda found: bytes([int(found[1], 16)]), raw, flags=re.DOTALL)
