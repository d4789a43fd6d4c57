# SPDX-License-Identifier: Apache-2.0
"""A blocking connection to a bus, with one reader thread, for programs that only call methods and receive signals.

It needs neither an event loop nor dbus-next, whose import takes longer than most commands do.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flashd import errors
from flashd.dbus import address as bus_address
from flashd.dbus import messages, values, wire
from flashd.dbus.messages import Head, Reader, receiving

_CONNECT_TIMEOUT_S = 10
_CALL_S = 25.0
_SEND_S = 25  # until a bus that does not read from us counts as lost
_LONGEST_LINE = 16384  # of the authentication
_UNREADABLE = (ValueError, IndexError, struct.error)
_UNSENDABLE = (ValueError, TypeError, AttributeError, OverflowError, struct.error)
_NO_SUCH_METHOD = f"{wire.DBUS}.Error.UnknownMethod"


class Signal(NamedTuple):
    """A signal that passed a match rule, with variants unwrapped."""

    path: str
    interface: str
    member: str
    body: tuple[Any, ...]


class _Answer:
    """The answer to a call: head and body, or nothing if the connection ended before it came."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.head: Head | None = None
        self.body = b""
        self.fds: tuple[int, ...] = ()


class BlockingConnection:
    """A connection for outgoing calls and incoming signals. All threads may call; signals come in the reader thread."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._sending = threading.Lock()
        self._serials = itertools.count(1)
        self._answers: dict[int, _Answer] = {}
        self._on_signal: Callable[[Signal], None] = lambda signal: None
        self._on_end: Callable[[], None] = lambda: None
        self._ended = threading.Event()
        self._reader = Reader(receiving(connected), self._expects, self._take)
        self._thread = threading.Thread(target=self._read, name="flashd client", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def listen(self, on_signal: Callable[[Signal], None], on_end: Callable[[], None]) -> None:
        """Calls `on_signal` for signals that pass a match rule, and `on_end` when we or the bus end the connection."""
        self._on_signal, self._on_end = on_signal, on_end

    def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[object] = (),
        *,
        fds: Sequence[int] = (),
        timeout_s: float = _CALL_S,
        interactive: bool = False,
    ) -> tuple[Any, ...]:
        """Calls a method and returns the values of its reply, with variants unwrapped. The caller closes descriptors.

        Raises the error in the reply, or Unavailable if there is no reply within `timeout_s`.
        """
        flags = messages.NO_AUTO_START | (messages.INTERACTIVE if interactive else 0)
        fields = {"path": path, "destination": destination, "interface": interface, "member": member}
        try:
            marshalled = values.encoded(signature, body)
        except _UNSENDABLE as error:
            raise errors.InvalidArgument(f"{member} cannot be called with this: {error}") from None
        answer, serial = _Answer(), next(self._serials)
        self._answers[serial] = answer
        try:
            message = messages.message(messages.CALL, flags, serial, fields, signature, marshalled, fds=len(fds))
            self._send(message, fds)
            if self._ended.is_set():
                answer.arrived.set()
            if not answer.arrived.wait(timeout_s):
                hint = "try again; it may be busy, or stopped in a debugger"
                raise errors.Unavailable(f"{destination} did not answer in {timeout_s} s", hint=hint)
        finally:
            del self._answers[serial]
        if answer.head is None:
            raise errors.Unavailable("the connection to the bus was lost: the bus has closed it")
        return _values(answer.head, answer.body, answer.fds)

    def add_match(self, rule: str) -> None:
        self.call(wire.DBUS, wire.DBUS_PATH, wire.DBUS, "AddMatch", "s", [rule])

    def close(self) -> None:
        """Ends the connection. Calls in progress in other threads raise Unavailable."""
        with contextlib.suppress(OSError):  # the bus has ended it already
            self._socket.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._socket.close()

    def _send(self, message: bytes, fds: Sequence[int]) -> None:
        rest = memoryview(message)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            with self._sending:
                sent = self._socket.sendmsg([rest], rights)  # descriptors travel with the first byte
                while sent < len(rest):
                    rest = rest[sent:]
                    sent = self._socket.send(rest)
        except BlockingIOError:
            raise errors.Unavailable(f"the bus has not read our messages for {_SEND_S} s", hint="try again") from None
        except OSError as error:
            raise errors.Unavailable(f"the connection to the bus was lost: {error}") from error

    def _read(self) -> None:
        try:
            # However the connection ends, all waiting callers are told below.
            with contextlib.suppress(OSError, EOFError, errors.FlashdError, *_UNREADABLE):
                while True:
                    self._reader.read()
        finally:
            self._ended.set()
            for answer in list(self._answers.values()):
                answer.arrived.set()
            self._reader.close()
            self._on_end()

    def _expects(self, head: Head) -> int | None:
        if head.kind in {messages.RETURN, messages.ERROR}:
            return head.body_bytes if head.reply_serial in self._answers else None
        return head.body_bytes if head.kind == messages.SIGNAL else 0

    def _take(self, head: Head, _raw: bytes, body: bytes, fds: tuple[int, ...]) -> None:
        if head.kind == messages.SIGNAL:
            messages.close_aside(fds)
            self._on_signal(Signal(head.path, head.interface, head.member, _decoded(head, body)))
        elif head.kind == messages.CALL:
            messages.close_aside(fds)
            if not head.flags & messages.NO_REPLY:
                self._refuse(head)
        elif (answer := self._answers.get(head.reply_serial)) is not None:
            answer.head, answer.body, answer.fds = head, body, fds
            answer.arrived.set()
        else:  # its caller has just given up
            messages.close_aside(fds)

    def _refuse(self, call: Head) -> None:
        """Refuses a call: we have no objects."""
        said = values.encoded("s", ["this program serves nothing"])
        fields: dict[str, str | int] = {
            "destination": call.sender,
            "error_name": _NO_SUCH_METHOD,
            "reply_serial": call.serial,
        }
        self._send(messages.message(messages.ERROR, messages.NO_REPLY, next(self._serials), fields, "s", said), ())


def _values(head: Head, body: bytes, fds: tuple[int, ...]) -> tuple[Any, ...]:
    """Returns the values of a reply. Raises the error of an error reply."""
    try:
        found = _decoded(head, body, fds)
    except (*_UNREADABLE, errors.InvalidArgument) as error:
        messages.close_aside(fds)
        raise errors.Unavailable(f"the reply is malformed: {error}") from None
    if head.kind == messages.ERROR:
        messages.close_aside(fds)
        raise wire.raised(head.error_name, str(found[0]) if found else "")
    return found


def _decoded(head: Head, body: bytes, fds: Sequence[int] = ()) -> tuple[Any, ...]:
    return values.decoded(head.signature, head.order, body, fds)


def connect(address: str) -> BlockingConnection:
    """Connects to `session`, `system` or a D-Bus address as this user; to the first of its servers that answers.

    Raises Unavailable if there is no bus.
    """
    refused = []
    for entry in bus_address.entries(address):
        try:
            return _connected(bus_address.server(entry))
        except (TimeoutError, BlockingIOError):
            refused.append(bus_address.Refusal(entry, f"no answer in {_CONNECT_TIMEOUT_S} s"))
        except errors.InvalidArgument as error:
            refused.append(bus_address.Refusal(entry, error.message, error.hint))
        except errors.FlashdError as error:
            refused.append(bus_address.Refusal(entry, error.message))
        except OSError as error:
            refused.append(bus_address.Refusal(entry, str(error)))
    raise bus_address.unreachable(address, refused)


def _connected(server: bus_address.Server) -> BlockingConnection:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _limit_sending(made, _CONNECT_TIMEOUT_S)  # also limits connecting while the server's queue is full (socket(7))
        made.connect(server.socket)
        made.settimeout(_CONNECT_TIMEOUT_S)
        _authenticate(made, server.guid)
        made.settimeout(None)
        _limit_sending(made, _SEND_S)
    except BaseException:
        made.close()
        raise
    connection = BlockingConnection(made)
    try:
        connection.call(wire.DBUS, wire.DBUS_PATH, wire.DBUS, "Hello", timeout_s=_CONNECT_TIMEOUT_S)
    except BaseException:
        connection.close()
        raise
    return connection


def _limit_sending(connected: socket.socket, timeout_s: int) -> None:
    """Limits the time of sending, which then raises BlockingIOError. Receiving, in another thread, stays unlimited."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", timeout_s, 0))


def _authenticate(connected: socket.socket, guid: str) -> None:
    """Authenticates as the user of the socket, whose number may differ from ours in a user namespace (D-Bus
    specification, "Authentication Protocol": EXTERNAL). Raises ConnectionError.
    """
    connected.sendall(b"\0AUTH EXTERNAL\r\n")
    said = _line(connected).split()
    if said == ["DATA"]:  # the server asks for the user, and takes an empty answer as the socket's own user
        connected.sendall(b"DATA\r\n")
        said = _line(connected).split()
    if said[:1] != ["OK"]:
        raise ConnectionRefusedError(f"it refuses to authenticate us: {' '.join(said)}")
    if guid and said[1:] != [guid]:
        raise ConnectionRefusedError(f"its GUID is not {guid}")
    connected.sendall(b"NEGOTIATE_UNIX_FD\r\n")
    if (answer := _line(connected)) != "AGREE_UNIX_FD":
        raise ConnectionRefusedError(f"it does not pass file descriptors: {answer}")
    connected.sendall(b"BEGIN\r\n")


def _line(connected: socket.socket) -> str:
    line = b""
    while not line.endswith(b"\r\n"):
        piece = connected.recv(4096)  # each line is answered with one line, and nothing else comes before BEGIN
        if not piece:
            raise ConnectionResetError("it hung up")
        line += piece
        if len(line) > _LONGEST_LINE:
            raise ConnectionResetError("it does not speak D-Bus")
    return line[:-2].decode(errors="replace")
