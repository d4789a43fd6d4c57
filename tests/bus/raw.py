# SPDX-License-Identifier: Apache-2.0
"""D-Bus calls as bytes: messages that no library would send, as fast as a socket takes them."""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections.abc import Iterable

from dbus_next._private.marshaller import Marshaller

NO_REPLY = 1
_ANSWERS = {2, 3}


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<I", len(raw)) + raw + b"\0"


def marshalled(signature: str, *values: object) -> bytes:
    return bytes(Marshaller(signature, list(values)).marshall())


class Raw:
    """A connection to a bus of this machine, as the user that this process is."""

    def __init__(self, address: str, timeout_s: float = 60.0) -> None:
        path = dict(pair.split("=", 1) for pair in address.split(":", 1)[1].split(","))["path"]
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        self._socket.connect(path)
        self._serials = itertools.count(1)
        self._buffer = b""
        self._socket.sendall(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\n")
        assert self._socket.recv(200).startswith(b"OK")
        self._socket.sendall(b"BEGIN\r\n")
        self.call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello")

    def close(self) -> None:
        self._socket.close()

    def message(
        self, destination: str, path: str, interface: str, member: str, signature: str = "", body: bytes = b"",
        *, flags: int = 0, kind: int = 1,
    ) -> bytes:  # fmt: skip
        fields = b""
        for code, letter, value in (
            (1, "o", path), (2, "s", interface), (3, "s", member), (6, "s", destination), (8, "g", signature),
        ):  # fmt: skip
            if value:
                fields += bytes(-len(fields) % 8) + bytes([code, 1]) + letter.encode() + b"\0"
                raw = value.encode()
                fields += bytes([len(raw)]) + raw + b"\0" if letter == "g" else text(value)
        head = struct.pack("<BBBBIII", ord("l"), kind, flags, 1, len(body), next(self._serials), len(fields)) + fields
        return head + bytes(-len(head) % 8) + body

    def send(self, message: bytes) -> None:
        self._socket.sendall(message)

    def answers(self, count: int = 1) -> Iterable[tuple[int, bytes]]:
        """The next answers: 2 for a reply or 3 for an error, and the body. Raises TimeoutError."""
        while count:
            kind, body = self._received()
            if kind in _ANSWERS:
                count -= 1
                yield kind, body

    def call(self, *message: str, body: bytes = b"") -> tuple[int, bytes]:
        self.send(self.message(*message, body=body))
        return next(iter(self.answers()))

    def _received(self) -> tuple[int, bytes]:
        head = self._read(16)
        body_bytes, _, fields_bytes = struct.unpack_from("<III", head, 4)
        self._read(fields_bytes + -fields_bytes % 8)
        return head[1], self._read(body_bytes)

    def _read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._buffer += data
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken


def error_text(body: bytes) -> str:
    (length,) = struct.unpack_from("<I", body)
    return body[4 : 4 + length].decode()
