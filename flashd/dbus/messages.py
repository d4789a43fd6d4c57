# SPDX-License-Identifier: Apache-2.0
"""Builds D-Bus messages, and reads incoming ones without storing more than necessary.

Every program on the bus may send messages of many megabytes. So the head of each message is read first, and the
receiver decides how much of the body to keep; the rest is read and dropped.

The layout is that of the D-Bus specification, "Message Format".
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashd.dbus.values import Variant, encoded
from flashd.errors import LimitExceeded
from flashd.units import MiB, format_bytes

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
NO_REPLY, NO_AUTO_START, INTERACTIVE = 0x1, 0x2, 0x4  # flags

MAX_MESSAGE_BYTES = 32 * MiB  # dbus-daemon(1), max_message_size: the bus disconnects the sender of a larger one
MAX_BODY_BYTES = 256 << 10  # of an array or dictionary, whatever its limit of entries

_READ_BYTES = 256 << 10  # at a time
_MOST_FDS = 253  # of one message: SCM_MAX_FD of Linux
FIXED_BYTES = 16  # of a head, before its fields
_MOST_TEXT_BYTES = 4096  # of a path or a name in the head; a longer one is not ours
_FIELDS = {1: "path", 2: "interface", 3: "member", 4: "error_name", 5: "reply_serial", 6: "destination", 7: "sender",
           8: "signature", 9: "fds"}  # fmt: skip
_NUMBERS = {name: number for number, name in _FIELDS.items()}
_TYPES = {"path": "o", "reply_serial": "u", "signature": "g", "fds": "u"}  # of fields; the others are texts
_ORDERS = {ord("l"): "<", ord("B"): ">"}


def close_aside(fds: Sequence[int]) -> None:
    """Closes received descriptors in a thread, because close flushes, and the file system may never answer."""
    if not fds:
        return
    from flashd.tasks import close_all  # here, because it imports asyncio, which clients need for nothing else

    try:
        threading.Thread(target=close_all, args=(fds,), name="close what was received", daemon=True).start()
    except RuntimeError:  # no thread is left; closing here could hang like the others
        import logging

        logging.getLogger(__name__).error(
            "%d received descriptors stay open: the machine has no threads left", len(fds)
        )


@dataclass(slots=True)
class Head:
    """The head of a message. Texts too long to be valid are cut off."""

    kind: int
    flags: int
    serial: int
    order: str
    body_bytes: int
    path: str = ""
    interface: str = ""
    member: str = ""
    sender: str = ""
    signature: str = ""
    reply_serial: int = 0
    fds: int = 0
    error_name: str = ""
    destination: str = ""


class _Malformed(Exception):
    """Raised for bytes that are not a message, which a bus never forwards."""


def parse_head(data: bytes | bytearray | memoryview, head_bytes: int) -> Head:
    """Parses the head in the first `head_bytes` of a message. Raises _Malformed."""
    order = _ORDERS.get(data[0])
    if order is None:
        raise _Malformed("its byte order is unknown")
    kind, flags, version, body_bytes, serial, fields_bytes = struct.unpack_from(order + "xBBBIII", data, 0)
    if version != 1:
        raise _Malformed(f"its protocol version is {version}")
    head = Head(kind, flags, serial, order, body_bytes)
    offset, end = FIXED_BYTES, FIXED_BYTES + fields_bytes
    word = struct.Struct(order + "I")
    while offset < end:
        offset += -offset & 7
        name = _FIELDS.get(data[offset])
        if data[offset + 1] != 1:  # all defined fields have types of one letter
            raise _Malformed("a field of its head has an unknown type")
        token = data[offset + 2]
        offset += 4
        value: Any
        if token == 0x67:  # g
            length = data[offset]
            value = bytes(data[offset + 1 : offset + 1 + length])
            offset += 2 + length
        else:
            offset += -offset & 3
            (number,) = word.unpack_from(data, offset)
            offset += 4
            if token in {0x73, 0x6F}:  # s, o
                value = bytes(data[offset : offset + min(number, _MOST_TEXT_BYTES)])
                offset += number + 1
            elif token == 0x75:  # u
                value = number
            else:
                raise _Malformed("a field of its head has an unknown type")
        if name is not None:
            setattr(head, name, value.decode("utf-8", "replace") if isinstance(value, bytes) else value)
    if offset > head_bytes or not isinstance(head.fds, int) or not isinstance(head.reply_serial, int):
        raise _Malformed("its head is longer than it says")
    return head


def message(
    kind: int, flags: int, serial: int, fields: Mapping[str, str | int], signature: str, body: bytes, *, fds: int = 0
) -> bytes:
    """Builds a whole message with a marshalled body.

    Raises LimitExceeded if it is too large for the bus, and ValueError, TypeError or struct.error for invalid fields.
    """
    given = {**fields, "signature": signature, "fds": fds}
    listed = [[_NUMBERS[name], Variant(_TYPES.get(name, "s"), value)] for name, value in given.items() if value]
    head = encoded("yyyyuua(yv)", [ord("l"), kind, flags, 1, len(body), serial, listed])
    whole = head + bytes(-len(head) % 8) + body
    check_size(len(whole))
    return whole


def check_size(size_bytes: int) -> None:
    """Checks the size of a message. Raises LimitExceeded if it is too large for the bus."""
    if size_bytes > MAX_MESSAGE_BYTES:
        said = f"a message of {format_bytes(size_bytes)} is too large for the bus"
        raise LimitExceeded(said, hint=f"send at most {format_bytes(MAX_MESSAGE_BYTES)}")


class Reader:
    """Reads messages from a socket, piece by piece.

    `expects` takes the head of each message and returns how many bytes of its body to keep, or None to drop the
    message. `take` receives the rest: head, raw head, body, and descriptors, which it has to close.
    """

    def __init__(
        self,
        receive: Callable[[memoryview], tuple[int, Sequence[int]]],
        expects: Callable[[Head], int | None],
        take: Callable[[Head, bytes, bytes, tuple[int, ...]], None],
    ) -> None:
        self._receive = receive
        self._expects = expects
        self._take = take
        self._received = memoryview(bytearray(_READ_BYTES))
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._head: Head | None = None
        self._head_bytes = 0
        self._kept: int | None = None
        self._passing = 0  # bytes of a dropped body that are still to come

    def read(self) -> None:
        """Reads available bytes, up to a limit. Raises BlockingIOError if there are none, EOFError at the end."""
        count, fds = self._receive(self._received)
        self._fds += fds
        if not count:
            raise EOFError("the bus has closed the connection")
        passed = min(self._passing, count)
        self._passing -= passed
        self._buffer += self._received[passed:count]
        while not self._passing and self._next():
            pass

    def close(self) -> None:
        fds, self._fds = self._fds, []
        close_aside(fds)

    def _next(self) -> bool:
        """Takes one message from the buffer, if all of it that is to be kept has arrived."""
        buffer = self._buffer
        if self._head is None:
            if len(buffer) < FIXED_BYTES:
                return False
            order = _ORDERS.get(buffer[0], "<")
            (fields_bytes,) = struct.unpack_from(order + "I", buffer, 12)
            self._head_bytes = FIXED_BYTES + fields_bytes + (-fields_bytes & 7)
            if len(buffer) < self._head_bytes:
                return False
            try:
                self._head = parse_head(buffer, self._head_bytes)
            except (IndexError, struct.error, _Malformed):
                (body_bytes,) = struct.unpack_from(order + "I", buffer, 4)
                self._head = Head(0, 0, 0, order, body_bytes)  # it is dropped; the next message may be valid
            self._kept = self._expects(self._head)
        head, head_bytes = self._head, self._head_bytes
        kept = min(self._kept or 0, head.body_bytes)
        if len(buffer) < head_bytes + kept:
            return False
        fds = tuple(self._fds[: head.fds])
        del self._fds[: head.fds]
        raw, body = bytes(buffer[:head_bytes]), bytes(buffer[head_bytes : head_bytes + kept])
        rest = head_bytes + head.body_bytes
        self._passing = max(0, rest - len(buffer))
        del buffer[:rest]
        is_dropped, self._head = self._kept is None, None
        if is_dropped:
            close_aside(fds)
        else:
            self._take(head, raw, body, fds)
        return True


def receiving(sock: socket.socket) -> Callable[[memoryview], tuple[int, Sequence[int]]]:
    """Returns a function that receives bytes and descriptors. Child processes do not inherit the descriptors."""
    room = socket.CMSG_SPACE(_MOST_FDS * 4)

    def receive(into: memoryview) -> tuple[int, Sequence[int]]:
        count, ancillary, _, _ = sock.recvmsg_into([into], room, socket.MSG_CMSG_CLOEXEC)
        fds: list[int] = []
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds += struct.unpack(f"{len(content) // 4}i", content[: len(content) // 4 * 4])
        return count, fds

    return receive
