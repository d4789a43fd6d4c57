# SPDX-License-Identifier: Apache-2.0
"""The asynchronous D-Bus connection of the daemon and its clients, which works around bugs of dbus-next 0.2.3.

The bugs, each with a test in tests/bus/test_bus.py, and their workarounds:
- a full socket buffer ended the connection (the writer does not survive EAGAIN), and messages that could be sent at
  once waited for the event loop: `_PatientWriter`;
- only the first server of an address was tried, escapes were not decoded as the specification says, and a server that
  hung up during the authentication kept the event loop busy for ever: `connect`, `_Bus._auth_readline`;
- unexpected exceptions went to the caller with a traceback: `error_reply`;
- a text that D-Bus cannot carry, or a message larger than the bus accepts, left its caller without a reply or ended the
  connection: `_checked_string`, `_PatientWriter.buffer_message`, `Connection.emit`;
- received and sent file descriptors were never closed, and child processes inherited received ones:
  `Received.close_fds`, `_Call.close_fds`;
- each message was stored whole before any check, and a flood of messages left no time for other work:
  flashd/dbus/messages.py, `_Queue`;
- handlers were not told the sender, and ObjectManager signals were sent from the child's path: we dispatch raw messages
  ourselves (`Connection.serve`, flashd/dbus/object_tree.py), and do not use dbus-next's service layer at all.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import io
import logging
import os
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from dbus_next import Message, MessageType, Variant
from dbus_next._private.marshaller import Marshaller
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.aio import MessageBus
from dbus_next.aio.message_bus import _future_set_exception, _future_set_result, _MessageWriter
from dbus_next.auth import AuthExternal
from dbus_next.constants import MessageFlag, NameFlag, RequestNameReply
from dbus_next.errors import (
    AuthError,
    DBusError,
    InvalidObjectPathError,
    InvalidSignatureError,
    SignatureBodyMismatchError,
)
from dbus_next.signature import SignatureTree

from flashd import errors
from flashd.dbus import address as bus_address
from flashd.dbus import messages, wire
from flashd.dbus.address import Refusal
from flashd.dbus.arguments import Argument, Arguments
from flashd.dbus.messages import Head, Reader, receiving
from flashd.dbus.wire import DBUS, DBUS_PATH
from flashd.tasks import close_all
from flashd.units import MiB, format_bytes

log = logging.getLogger(__name__)

K = TypeVar("K")
V = TypeVar("V")

_CONNECT_TIMEOUT_S = 10.0
# The library's errors for a value that does not have the type of its signature, or that D-Bus cannot carry.
UNSENDABLE = (ValueError, TypeError, AttributeError, struct.error, SignatureBodyMismatchError, InvalidSignatureError)
_PEER = DBUS + ".Peer"
_MACHINE_ID = Path("/etc/machine-id")
_READING_S = 0.005  # at a time
_SMALL_BYTES = 4 << 10  # of a call: a smaller body is always stored
_MOST_WAITING_BYTES = 16 * MiB  # of the unanswered calls of one user or connection
_MOST_WAITING_OF_ALL_BYTES = 128 * MiB
_UNREAD_BYTES = 32 << 10  # of answers that the bus has not read; above this, no further call is served
_EMPTY_DICTIONARY_BYTES = 8  # its length, and padding up to its first entry
_LONGEST_LINE = 16384  # of the authentication
_QUEUE_S = 0.01
_POLICY_RETRY_S = 0.25
_CLOSE_TIMEOUT_S = 2.0  # for a caller that does not read its answer


_write_string = Marshaller.write_string


def _checked_string(self: Marshaller, value: str, node: object = None) -> int:
    """Marshals a string like the library, but refuses NUL, for which the bus would disconnect us."""
    if "\0" in value:
        raise ValueError("D-Bus strings cannot contain NUL")
    return int(_write_string(self, value, node))


Marshaller.write_string = _checked_string


class _PatientWriter(_MessageWriter):  # type: ignore[misc]
    """The library's writer, except that it survives EAGAIN, keeping message, offset and descriptors, and that it sends
    at once what the socket accepts, without waiting for the event loop.
    """

    on_room: Callable[[], None] = staticmethod(lambda: None)
    unsent_bytes = 0
    buf: Any
    offset: int
    unix_fds: list[int] | None
    fut: Any

    def buffer_message(self, msg: Message, future: asyncio.Future[None] | None = None) -> None:
        """Queues a message. Raises LimitExceeded for one that is too large for the bus, or errors of the library."""
        data = msg._marshall(negotiate_unix_fd=self.negotiate_unix_fd)
        messages.check_size(len(data))
        self.messages.put_nowait((data, list(msg.unix_fds or ()), future))
        self.unsent_bytes += len(data)

    def schedule_write(self, msg: Message | None = None, future: asyncio.Future[None] | None = None) -> None:
        if msg is not None:
            self.buffer_message(msg, future)
        if (
            self.bus.unique_name and self.buf is None
        ):  # else the socket was full, and the event loop calls us when it has room
            self.write_callback()

    def write_callback(self) -> None:
        try:
            while self.buf is not None or self._next_message():
                self._send()
                if self.offset < len(self.buf):
                    self._wait()
                    return
                self.unsent_bytes -= len(self.buf)
                self.buf = None
                _future_set_result(self.fut, None)
            self.loop.remove_writer(self.fd)
            self.on_room()
        except BlockingIOError:
            self._wait()
        except Exception as error:  # noqa: BLE001 -- the connection is lost, whatever the reason; all waiters are told
            _future_set_exception(self.fut, error)
            if self.fut is not None:
                self.fut.exception()  # not every sender waits
            self.loop.remove_writer(self.fd)
            # Not here, because the library registers for the reply only after it has sent the call.
            self.loop.call_soon(self.bus._finalize, error)

    def _wait(self) -> None:
        self.loop.add_writer(self.fd, self.write_callback)

    def _next_message(self) -> bool:
        if self.messages.empty():
            return False
        data, self.unix_fds, self.fut = self.messages.get_nowait()
        self.buf, self.offset = memoryview(data), 0
        return True

    def _send(self) -> None:
        rest = self.buf[self.offset :]
        if self.unix_fds and self.negotiate_unix_fd:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self.unix_fds))
            self.offset += self.sock.sendmsg([rest], [rights])
            self.unix_fds = None  # descriptors travel with the first byte
        else:
            self.offset += self.sock.send(rest)


class _External(AuthExternal):  # type: ignore[misc]
    """Authenticates as our own user, and checks the GUID of the server if its address has one."""

    def __init__(self, guid: str) -> None:
        super().__init__()
        self._guid = guid

    def _receive_line(self, line: str) -> str:
        said = line.split()
        if self._guid and said[:1] == ["OK"] and said[1:] != [self._guid]:
            raise AuthError(f"its GUID is not {self._guid}")
        return str(super()._receive_line(line))


class _Bus(MessageBus):  # type: ignore[misc]
    """The library's connection, with a `release` for its socket, which it would leave to the garbage collector."""

    def __init__(self, connected: socket.socket, guid: str) -> None:
        self._given = connected
        super().__init__(bus_address="unix:path=given", auth=_External(guid), negotiate_unix_fd=True)
        self._writer = _PatientWriter(self)
        self.expects: Callable[[Head], int | None] = lambda head: head.body_bytes
        self.take_call: Callable[[Head, bytes, tuple[int, ...]], None] | None = (
            None  # otherwise the library's reader takes them
        )
        self._reader = Reader(receiving(self._sock), self._keeps, self._take)

    def _setup_socket(self) -> None:
        self._sock, self._stream, self._fd = self._given, self._given.makefile("rwb"), self._given.fileno()

    async def _auth_readline(self) -> str:
        line = b""
        while not line.endswith(b"\r\n"):
            if not (piece := await self._loop.sock_recv(self._sock, 1)):
                raise ConnectionResetError("it hung up")
            if len(line) > _LONGEST_LINE:
                raise ConnectionResetError("it does not speak D-Bus")
            line += piece
        return line[:-2].decode(errors="replace")

    async def connect(self) -> _Bus:
        try:
            await super().connect()
        except BaseException:
            self.release()
            raise
        return self

    def _message_reader(self) -> None:
        """Reads from the socket for a bounded time. The event loop calls it again while there is more.

        A message behind a flood is reached only once the flood is read, so reading takes precedence over answering.
        """
        ends = time.monotonic() + _READING_S
        try:
            while True:
                self._reader.read()
                if time.monotonic() >= ends:
                    return
        except BlockingIOError:
            return
        except Exception as error:  # noqa: BLE001 -- the connection is lost, whatever the reason; all waiters are told
            self._finalize(error)

    def _keeps(self, head: Head) -> int | None:
        if head.kind in {messages.RETURN, messages.ERROR}:
            return head.body_bytes if head.reply_serial in self._method_return_handlers else None
        return self.expects(head) if head.kind in {messages.CALL, messages.SIGNAL} else None

    def _take(self, head: Head, raw: bytes, body: bytes, fds: tuple[int, ...]) -> None:
        if head.kind == messages.CALL and self.take_call is not None:
            self.take_call(head, body, fds)
            return
        unmarshaller = Unmarshaller(io.BytesIO(raw + body))
        unmarshaller.unix_fds = list(fds)
        self._on_message(unmarshaller.unmarshall())

    def release(self) -> None:
        """Closes the socket."""
        self._reader.close()
        for resource in (getattr(self, "_stream", None), getattr(self, "_sock", None)):
            if resource is not None:
                with contextlib.suppress(OSError):  # unsent bytes of a dead connection
                    resource.close()


@dataclass(frozen=True, slots=True)
class Received:
    """A message from the bus, with file descriptors in place of their indexes."""

    sender: str
    path: str
    interface: str
    member: str
    signature: str
    body: tuple[Any, ...]
    fds: tuple[int, ...]
    interactive: bool = False  # polkit may ask a person for a password for this call

    def close_fds(self) -> None:
        close_all(self.fds)


def _received(message: Message) -> Received:
    fds = tuple(message.unix_fds)
    body = tuple(message.body)
    if fds or "h" in message.signature:  # without descriptors, large listings need not be walked
        nodes = message.signature_tree.types
        body = tuple(_in_place(value, node, fds) for value, node in zip(body, nodes, strict=True))
    return Received(
        message.sender or "", message.path or "", message.interface or "", message.member or "",
        message.signature, body, fds, bool(message.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION),
    )  # fmt: skip


def _in_place(value: Any, node: Any, fds: Sequence[int]) -> Any:
    """Replaces each `h`, an index into the message's descriptors (D-Bus specification, UNIX_FD). Raises if invalid."""
    if "h" not in node.signature and "v" not in node.signature:
        return value
    if node.token == "h":
        if not 0 <= value < len(fds):
            raise errors.InvalidArgument("a file descriptor was announced but not sent")
        return fds[value]
    if node.token == "v":
        return Variant(value.signature, _in_place(value.value, value.type, fds))
    if node.token == "a" and node.children[0].token == "{":
        key, item = node.children[0].children
        return {_in_place(k, key, fds): _in_place(v, item, fds) for k, v in value.items()}
    children = node.children if node.token == "(" else [node.children[0]] * len(value)
    return [_in_place(v, child, fds) for v, child in zip(value, children, strict=True)]


def plain(value: Any) -> Any:
    """Unwraps variants, at all depths."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


class Contract(Protocol):
    """Rules for incoming calls, by which a connection protects callers from each other."""

    def arguments(self, head: Head) -> Arguments | None:
        """Returns the arguments of the called method; None if there is no such method: then the body is not read."""

    def group(self, peer: str) -> Hashable:
        """Returns the group of callers with which this peer shares its turns."""

    def check_room(self, head: Head, of_peer: int, of_group: int) -> None:
        """Checks that the caller may have one more unanswered call. Raises LimitExceeded."""


class _Everything:
    """The contract of a connection that trusts its callers: no limits."""

    def arguments(self, head: Head) -> Arguments | None:
        types = SignatureTree._get(head.signature).types
        arguments = [Argument(str(number), node.signature) for number, node in enumerate(types)]
        return Arguments(head.member, arguments, max_body_bytes=messages.MAX_MESSAGE_BYTES)

    def group(self, peer: str) -> Hashable:
        return peer

    def check_room(self, head: Head, of_peer: int, of_group: int) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Call:
    """A received call that is not answered yet."""

    head: Head
    arguments: Arguments | None
    body: bytes
    fds: tuple[int, ...]
    group: Hashable

    def received(self) -> Received:
        """Decodes a message. Raises InvalidArgument for arguments beyond their limits."""
        head = self.head
        values = self.arguments.decode(head, self.body, self.fds) if self.arguments else ()
        is_interactive = bool(head.flags & messages.INTERACTIVE)
        return Received(
            head.sender, head.path, head.interface, head.member, head.signature, values, self.fds, is_interactive
        )

    def close_fds(self) -> None:
        messages.close_aside(self.fds)


class _Queue:
    """Calls that wait for their turn.

    Groups take turns, one call each, and so do the connections of a group, so that a flood from one caller delays
    another by one call at most.
    """

    def __init__(self) -> None:
        self._groups: dict[
            Hashable, dict[str, deque[_Call]]
        ] = {}  # in the order of their turns, as are the connections in each group

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, call: _Call) -> None:
        self._groups.setdefault(call.group, {}).setdefault(call.head.sender, deque()).append(call)

    def next(self) -> _Call:
        group, peers = _taken_out(self._groups)
        peer, calls = _taken_out(peers)
        call = calls.popleft()
        if calls:
            peers[peer] = calls  # to the end of the order
        if peers:
            self._groups[group] = peers
        return call


def _taken_out(of: dict[K, V]) -> tuple[K, V]:
    """Removes and returns the first entry of a dictionary."""
    key = next(iter(of))
    return key, of.pop(key)


@dataclass(frozen=True, slots=True)
class Credentials:
    """The user of a connection, and the user's groups; empty if the bus does not tell them."""

    uid: int
    gids: frozenset[int]


@dataclass(frozen=True, slots=True)
class Reply:
    """A method's reply: values that match its signature, and descriptors, which are closed after sending.

    For a reply of one large dictionary, `marshalled` is the body, ready to send, and the value is an empty dictionary:
    objects that have not changed since the last call need not be marshalled again. With 500 models GetManagedObjects
    then takes 4 ms of the daemon's event loop instead of 45, and its caller has the answer in a third of the time.
    """

    signature: str = ""
    values: tuple[object, ...] = ()
    fds: tuple[int, ...] = ()
    marshalled: bytes = b""


def dictionary_entry(signature: str, key: object, value: object) -> bytes:
    """Marshals one entry of a dictionary of this signature, aligned to 8 bytes as in a message."""
    return bytes(Marshaller(signature, [{key: value}]).marshall()[_EMPTY_DICTIONARY_BYTES:])


def dictionary(entries: Iterable[bytes]) -> bytes:
    """Returns the body of a message that is one dictionary (D-Bus specification, Marshaling: arrays)."""
    body = bytearray(_EMPTY_DICTIONARY_BYTES)
    for entry in entries:
        body += bytes(-len(body) % 8) + entry
    struct.pack_into("<I", body, 0, len(body) - _EMPTY_DICTIONARY_BYTES)
    return bytes(body)


class _Prepared(Message):  # type: ignore[misc]
    """A message whose body, one dictionary, is already marshalled."""

    marshalled: bytes

    def _marshall(self, negotiate_unix_fd: bool = False) -> bytes:
        head = bytearray(super()._marshall(negotiate_unix_fd)[:-_EMPTY_DICTIONARY_BYTES])
        struct.pack_into("<I", head, 4, len(self.marshalled))  # the length of the body, in the fixed part of the header
        return bytes(head) + self.marshalled


def error_reply(call: Message | Head, error: BaseException) -> Message:
    """Returns the error reply to a call. The traceback of any exception but ours is a bug's, and only logged."""
    if isinstance(error, asyncio.CancelledError):
        error = errors.Cancelled("the daemon is stopping")
    if isinstance(error, DBusError):
        return Message.new_error(call, error.type, error.text)
    if not isinstance(error, errors.FlashdError):
        log.error("defect in %s.%s", call.interface, call.member, exc_info=error)
        error = errors.Internal("flashd has a bug", hint="please report it, with the traceback in the journal")
    return Message.new_error(call, error.bus_name(), error.to_bus())


class Connection:
    """A connection to a bus for outgoing calls, signals in both directions, and, after `serve`, incoming calls."""

    def __init__(self, bus: _Bus) -> None:
        self._bus = bus
        self._serve: Callable[[Received], Coroutine[object, None, Reply]] | None = None
        self._listeners: list[Callable[[Received], None]] = []
        self._peers: set[str] = set()
        self._on_peer_left: Callable[[str], None] = lambda peer: None
        self._tasks: set[asyncio.Task[None]] = set()
        self._replying: set[asyncio.Task[object] | None] = set()
        self._dropped: set[tuple[str, str]] = set()  # signals, by path and member
        self._contract: Contract = _Everything()
        self._queue = _Queue()
        self._is_serving = False
        self._waiting: Counter[tuple[Hashable, ...]] = Counter()  # unanswered calls, by peer and by group
        self._waiting_bytes: Counter[Hashable] = Counter()  # of their bodies, by group; under None, of all
        self._expected: tuple[Arguments | None, Hashable] = (None, None)  # of the message that is being read
        bus.add_message_handler(self._on_message)

    @property
    def unique_name(self) -> str:
        return str(self._bus.unique_name)

    def serve(
        self, handler: Callable[[Received], Coroutine[object, None, Reply]], contract: Contract | None = None
    ) -> None:
        """Has `handler` answer each method call in a separate task, begun in the order of the callers' turns.

        With a contract, only calls are read from other peers, as far as the contract permits.
        """
        self._serve = handler
        self._bus.take_call = self._enqueue
        self._bus.expects = self._expects
        self._bus._writer.on_room = self._serve_next
        # The bus reads few bytes from us at a time, and each answer waits for all before it.
        self._bus._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD_BYTES)
        if contract is not None:
            self._contract = contract

    def listen(self, listener: Callable[[Received], None]) -> None:
        """Has signals that pass a match rule go to `listener`."""
        self._listeners.append(listener)

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[object] = (),
        *,
        fds: Sequence[int] = (),
        timeout_s: float | None = 25.0,
        interactive: bool = False,
        auto_start: bool = False,
    ) -> Received:
        """Calls a method. Raises the error in the reply, or Unavailable if there is no reply within `timeout_s`.

        Without `auto_start`, a call to a stopped daemon does not start it.
        """
        flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else MessageFlag.NONE
        if not auto_start:
            flags |= MessageFlag.NO_AUTOSTART
        message = Message(destination, path, interface, member, signature=signature, body=list(body), flags=flags)
        message.unix_fds = list(fds)
        try:
            reply = await self._reply_to(message, timeout_s)
        except TimeoutError:
            hint = "it may be busy, or stopped in a debugger; try again"
            raise errors.Unavailable(f"{destination} did not answer in {timeout_s} s", hint=hint) from None
        except (OSError, EOFError) as error:
            raise errors.Unavailable(f"the connection to the bus was lost: {error}") from error
        except UNSENDABLE as error:
            raise errors.InvalidArgument(f"{member} cannot be called with this: {error}") from None
        if reply.message_type is MessageType.ERROR:
            raise wire.raised(reply.error_name, str(reply.body[0]) if reply.body else "")
        return _received(reply)

    async def _reply_to(self, message: Message, timeout_s: float | None) -> Message:
        """Waits for the reply. In the library alone, a caller would wait for ever if the connection ended before."""
        answered = asyncio.ensure_future(self._bus.call(message))
        lost = self._bus._disconnect_future
        try:
            await asyncio.wait({answered, lost}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if answered.done():
                return answered.result()
        finally:
            answered.cancel()
        if lost.done():
            raise ConnectionResetError("the bus has closed it")
        raise TimeoutError

    def emit(
        self, path: str, interface: str, member: str, signature: str, body: Sequence[object], *, to: str | None = None
    ) -> None:
        """Sends a signal to all connections, or `to` one. Returns at once, whatever the state of the socket.

        A signal that D-Bus cannot carry is dropped and logged once, lest it stop the work that sent it.
        """
        try:
            message = Message.new_signal(path, interface, member, signature, list(body))
            message.destination = to
            sent = self._bus.send(message)
        except (*UNSENDABLE, InvalidObjectPathError, errors.LimitExceeded) as error:
            if (path, member) not in self._dropped:
                self._dropped.add((path, member))
                log.error("bug: the signal %s of %s cannot be sent: %s", member, path, error)
            return
        sent.add_done_callback(_retrieve)

    async def add_match(self, rule: str) -> None:
        await self.call(DBUS, DBUS_PATH, DBUS, "AddMatch", "s", [rule])

    async def own(self, name: str, *, patience_s: float = 0.0) -> None:
        """Acquires `name` on the bus. Raises AlreadyExists if another process owns it.

        Waits up to `patience_s` for the bus to permit it: the bus reads our policy only after our package is completely
        installed, which may be after we were started.
        """
        deadline = asyncio.get_running_loop().time() + patience_s
        while True:
            try:
                reply = await self._bus.request_name(name, NameFlag.DO_NOT_QUEUE)
                break
            except DBusError as error:
                if error.type != f"{DBUS}.Error.AccessDenied" or asyncio.get_running_loop().time() >= deadline:
                    raise errors.NotAuthorized(f"the bus does not permit us to own {name}: {error.text}") from error
            await asyncio.sleep(_POLICY_RETRY_S)
        if reply is not RequestNameReply.PRIMARY_OWNER:
            raise errors.AlreadyExists(
                f"another process owns {name} on this bus", hint="flash status shows it; flash stop ends it"
            )

    async def credentials(self, peer: str) -> Credentials:
        """Asks the bus for the credentials of a connection at the time when it connected."""
        reply = await self.call(DBUS, DBUS_PATH, DBUS, "GetConnectionCredentials", "s", [peer])
        known = plain(reply.body[0])
        return Credentials(int(known["UnixUserID"]), frozenset(map(int, known.get("UnixGroupIDs", ()))))

    async def watch_peers(self, on_peer_left: Callable[[str], None]) -> None:
        """Has `on_peer_left` called for each connection that has called us and leaves the bus."""
        self._on_peer_left = on_peer_left
        await self.add_match(f"type='signal',sender='{DBUS}',interface='{DBUS}',member='NameOwnerChanged',arg2=''")

    def is_present(self, peer: str) -> bool:
        """Tells whether a connection that has called us is still on the bus. Needs `watch_peers`."""
        return peer in self._peers

    async def closed(self) -> None:
        """Waits until we or the bus end the connection."""
        ended = self._bus._disconnect_future
        await asyncio.wait([ended])  # not `await ended`, because the cancellation of one waiter would cancel it for all
        ended.exception()

    async def close(self) -> None:
        """Ends the connection. Calls in progress are answered with Cancelled; pending answers are sent."""
        while self._queue:
            self._refuse(self._queue.next(), errors.Cancelled("the daemon is stopping"))
        for task in self._tasks - self._replying:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_TIMEOUT_S)
        if self._bus.connected:
            self._bus.disconnect()
        await self.closed()
        self._bus.release()

    def _on_message(self, message: Message) -> bool:
        for fd in message.unix_fds:
            os.set_inheritable(fd, False)
        if message.message_type is MessageType.SIGNAL:
            self._on_signal(_received(message))
        if message.message_type in {
            MessageType.SIGNAL,
            MessageType.METHOD_CALL,
        }:  # those of a reply are passed to its caller
            messages.close_aside(message.unix_fds)
        return False

    def _expects(self, head: Head) -> int | None:
        """Returns how many bytes of a body are kept: of a call as many as its contract permits, of signals those of the
        bus.
        """
        if head.kind == messages.SIGNAL:
            is_ours = isinstance(self._contract, _Everything) or head.sender == DBUS
            return head.body_bytes if is_ours and head.body_bytes <= messages.MAX_BODY_BYTES else None
        group = self._contract.group(head.sender)
        try:
            of_peer, of_group = (self._waiting[key] for key in _keys(head, group))
            self._contract.check_room(head, of_peer, of_group)
            arguments = self._contract.arguments(head)
            kept_bytes = min(head.body_bytes, arguments.max_body_bytes) if arguments else 0
            self._check_bytes(group, kept_bytes)
        except errors.FlashdError as error:
            self._send_error(head, error)
            return None
        # Here, not when the call is answered, because the bus may report the caller's end right after this message.
        self._peers.add(head.sender)
        self._expected = arguments, group
        return kept_bytes

    def _check_bytes(self, group: Hashable, more_bytes: int) -> None:
        """Limits the bytes of waiting calls. One large call always passes. Raises LimitExceeded."""
        for whose, most_bytes in ((group, _MOST_WAITING_BYTES), (None, _MOST_WAITING_OF_ALL_BYTES)):
            waiting_bytes = self._waiting_bytes[whose]
            if more_bytes > _SMALL_BYTES and waiting_bytes and waiting_bytes + more_bytes > most_bytes:
                said = f"{format_bytes(waiting_bytes)} of calls are already waiting for their answers"
                raise errors.LimitExceeded(said, hint="wait for some answers")

    def _enqueue(self, head: Head, body: bytes, fds: tuple[int, ...]) -> None:
        arguments, group = self._expected
        call = _Call(head, arguments, body, fds, group)
        for key in _keys(head, group):
            self._waiting[key] += 1
        for whose in (group, None):
            self._waiting_bytes[whose] += len(body)
        self._queue.add(call)
        self._serve_next()

    def _answered(self, call: _Call) -> None:
        for key in _keys(call.head, call.group):
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]
        for whose in (call.group, None):
            self._waiting_bytes[whose] -= len(call.body)
            if not self._waiting_bytes[whose]:
                del self._waiting_bytes[whose]
        call.close_fds()

    def _serve_next(self) -> None:
        """Begins to serve the next call, unless the readers of our answers are far behind."""
        if self._queue and not self._is_serving and not self._bus._writer.unsent_bytes:
            self._is_serving = True
            asyncio.get_running_loop().call_soon(self._begin_next)

    def _begin_next(self) -> None:
        self._is_serving = False
        if self._queue:
            task = asyncio.ensure_future(self._answer(self._queue.next()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self._serve_next()

    def _on_signal(self, signal: Received) -> None:
        if signal.sender == DBUS and signal.member == "NameOwnerChanged":
            name, _, new_owner = signal.body
            if not new_owner and name in self._peers:
                self._peers.discard(name)
                self._on_peer_left(name)
        for listener in self._listeners:
            listener(signal)

    async def _answer(self, call: _Call) -> None:
        assert self._serve is not None
        fds: tuple[int, ...] = ()
        head = call.head
        try:
            is_peers = head.interface == _PEER
            result = _of_any_peer(head) if is_peers else await self._serve(call.received())
            fds = result.fds
            reply = _reply(head, result)
        except BaseException as error:  # noqa: BLE001 -- the boundary: every call gets exactly one reply
            reply = error_reply(head, error)
        this = asyncio.current_task()
        self._replying.add(this)
        try:
            if not head.flags & messages.NO_REPLY:
                await self._sent(head, reply)
        except (OSError, EOFError):
            log.debug("%s left before its reply", head.sender)
        finally:
            self._replying.discard(this)
            self._answered(call)
            for fd in fds:
                os.close(fd)

    def _refuse(self, call: _Call, error: errors.FlashdError) -> None:
        self._send_error(call.head, error)
        self._answered(call)

    def _send_error(self, head: Head, error: errors.FlashdError) -> None:
        if not head.flags & messages.NO_REPLY:
            self._bus.send(error_reply(head, error)).add_done_callback(_retrieve)

    def _sent(self, call: Head, reply: Message) -> Awaitable[None]:
        """Sends a reply, or an error in place of a reply that cannot be sent."""
        try:
            return cast(Awaitable[None], self._bus.send(reply))
        except Exception as error:  # noqa: BLE001 -- the boundary: every call gets exactly one reply
            return cast(Awaitable[None], self._bus.send(error_reply(call, error)))


def _keys(head: Head, group: Hashable) -> tuple[tuple[Hashable, ...], tuple[Hashable, ...]]:
    """Returns the keys under which a call is counted: its peer and its group. Read-only calls count separately."""
    is_reading = head.interface.startswith(DBUS)
    return ("peer", head.sender, is_reading), ("group", group, is_reading)


def _of_any_peer(head: Head) -> Reply:
    """Answers calls that every peer must answer (D-Bus specification, org.freedesktop.DBus.Peer)."""
    if head.member == "Ping":
        return Reply()
    if head.member == "GetMachineId":
        return Reply("s", (_MACHINE_ID.read_text().strip() if _MACHINE_ID.exists() else "",))
    raise errors.InvalidArgument(f"{_PEER} has no method {head.member}")


def _reply(call: Head, result: Reply) -> Message:
    reply = (_Prepared if result.marshalled else Message)(
        message_type=MessageType.METHOD_RETURN,
        reply_serial=call.serial,
        destination=call.sender,
        signature=result.signature,
        body=list(result.values),
        unix_fds=list(result.fds),
    )
    if result.marshalled:
        reply.marshalled = result.marshalled
    return reply


def _retrieve(future: asyncio.Future[None]) -> None:
    """Ignores that a signal is lost with its connection: listeners see the connection end."""
    if not future.cancelled() and future.exception() is not None:
        log.debug("a signal was not sent: %s", future.exception())


async def connect(address: str) -> Connection:
    """Connects to `session`, `system` or a D-Bus address as this user; to the first of its servers that answers.

    Raises Unavailable if there is no bus.
    """
    refused = []
    for entry in bus_address.entries(address):
        try:
            bus = await asyncio.wait_for(_connected(bus_address.server(entry)), _CONNECT_TIMEOUT_S)
            return Connection(bus)
        except TimeoutError:
            refused.append(Refusal(entry, f"no answer in {_CONNECT_TIMEOUT_S:.0f} s"))
        except errors.InvalidArgument as error:
            refused.append(Refusal(entry, error.message, error.hint))
        except Exception as error:  # noqa: BLE001 -- the library passes on all exceptions of connect(2) and SASL
            refused.append(Refusal(entry, str(error)))
    raise bus_address.unreachable(address, refused)


async def _connected(server: bus_address.Server) -> _Bus:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                made.connect(server.socket)
                break
            except BlockingIOError:  # the server's queue is full (connect(2), EAGAIN)
                await asyncio.sleep(_QUEUE_S)
        bus = _Bus(made, server.guid)
    except BaseException:
        made.close()
        raise
    return await bus.connect()
