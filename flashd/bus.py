# SPDX-License-Identifier: Apache-2.0
"""How do we speak D-Bus, with the defects of dbus-next 0.2.3 closed in one place?

Closed here, each with its test in tests/bus/test_bus.py:
- a full socket buffer ended the connection (its writer does not survive EAGAIN), and what could be sent at once waited
  for a turn of the event loop: `_PatientWriter`;
- unexpected exceptions went to the caller with a traceback: `error_reply`;
- received and sent file descriptors were never closed, and programs that are started had those received:
  `Received.close_fds`, `Connection.reply`;
- handlers did not learn the sender, and ObjectManager signals left from the child's path: we dispatch raw messages
  ourselves (`Connection.serve`, flashd/daemon/exports.py), so that dbus-next's service layer is not used at all.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dbus_next import BusType, Message, MessageType, Variant
from dbus_next._private.marshaller import Marshaller
from dbus_next.aio import MessageBus
from dbus_next.aio.message_bus import _future_set_exception, _future_set_result, _MessageWriter
from dbus_next.constants import MessageFlag, NameFlag, RequestNameReply
from dbus_next.errors import DBusError

from flashd import config, errors

log = logging.getLogger(__name__)

DBUS = "org.freedesktop.DBus"
DBUS_PATH = "/org/freedesktop/DBus"
PROPERTIES = "org.freedesktop.DBus.Properties"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"

_CONNECT_TIMEOUT_S = 10.0
_EMPTY_DICTIONARY_BYTES = 8  # its length, and padding to where its first entry would be
_POLICY_RETRY_S = 0.25
_CLOSE_TIMEOUT_S = 2.0  # for a caller that does not read its answer


class _PatientWriter(_MessageWriter):  # type: ignore[misc]
    """The library's writer, but EAGAIN leaves message, offset and file descriptors as they are and waits; and what the
    socket takes is sent at once, and not when the event loop comes round to it."""

    buf: Any
    offset: int
    unix_fds: list[int] | None
    fut: Any

    def schedule_write(self, msg: Message | None = None, future: asyncio.Future[None] | None = None) -> None:
        if msg is not None:
            self.buffer_message(msg, future)
        if self.bus.unique_name and self.buf is None:  # else there was no room, and we are told when there is
            self.write_callback()

    def write_callback(self) -> None:
        try:
            while self.buf is not None or self._next_message():
                self._send()
                if self.offset < len(self.buf):
                    self._wait()
                    return
                self.buf = None
                _future_set_result(self.fut, None)
            self.loop.remove_writer(self.fd)
        except BlockingIOError:
            self._wait()
        except Exception as error:  # noqa: BLE001 -- the connection is gone, whatever the reason; all waiters learn it
            _future_set_exception(self.fut, error)
            if self.fut is not None:
                self.fut.exception()  # not everybody waits for a message to be sent
            self.loop.remove_writer(self.fd)
            # Not here: the library asks to be told of an answer only after it has sent the question.
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
            self.unix_fds = None  # they travel with the first byte
        else:
            self.offset += self.sock.send(rest)


class _Bus(MessageBus):  # type: ignore[misc]
    """The library's connection, which leaves its socket to the garbage collector unless it is told otherwise."""

    def __init__(self, address: str) -> None:
        match address:
            case "session":
                super().__init__(bus_type=BusType.SESSION, negotiate_unix_fd=True)
            case "system":
                super().__init__(bus_type=BusType.SYSTEM, negotiate_unix_fd=True)
            case _:
                super().__init__(bus_address=address, negotiate_unix_fd=True)
        self._writer = _PatientWriter(self)

    def _setup_socket(self) -> None:
        try:
            super()._setup_socket()
        except BaseException:
            self.release()
            raise

    async def connect(self) -> _Bus:
        try:
            await super().connect()
        except BaseException:
            self.release()
            raise
        return self

    def release(self) -> None:
        """Closes the socket, for good."""
        for resource in (getattr(self, "_stream", None), getattr(self, "_sock", None)):
            if resource is not None:
                with contextlib.suppress(OSError):  # unsent bytes of a dead connection
                    resource.close()


@dataclass(frozen=True, slots=True)
class Received:
    """One message from the bus, with its file descriptors in place of their indexes."""

    sender: str
    path: str
    interface: str
    member: str
    signature: str
    body: tuple[Any, ...]
    fds: tuple[int, ...]
    interactive: bool = False  # a person may be asked for a password before this call is answered

    def close_fds(self) -> None:
        for fd in self.fds:
            with contextlib.suppress(OSError):
                os.close(fd)


def _received(message: Message) -> Received:
    fds = tuple(message.unix_fds)
    body = tuple(message.body)
    if fds or "h" in message.signature:  # without any, large listings are not walked through
        nodes = message.signature_tree.types
        body = tuple(_in_place(value, node, fds) for value, node in zip(body, nodes, strict=True))
    return Received(
        message.sender or "", message.path or "", message.interface or "", message.member or "",
        message.signature, body, fds, bool(message.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION),
    )  # fmt: skip


def _in_place(value: Any, node: Any, fds: Sequence[int]) -> Any:
    """`h` is an index into the message's descriptors (D-Bus specification, UNIX_FD): a bad one is an error."""
    if "h" not in node.signature and "v" not in node.signature:
        return value
    if node.token == "h":
        if not 0 <= value < len(fds):
            raise errors.InvalidArgument("a file descriptor was announced and not sent")
        return fds[value]
    if node.token == "v":
        return Variant(value.signature, _in_place(value.value, value.type, fds))
    if node.token == "a" and node.children[0].token == "{":
        key, item = node.children[0].children
        return {_in_place(k, key, fds): _in_place(v, item, fds) for k, v in value.items()}
    children = node.children if node.token == "(" else [node.children[0]] * len(value)
    return [_in_place(v, child, fds) for v, child in zip(value, children, strict=True)]


def plain(value: Any) -> Any:
    """Variants unwrapped, at any depth."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who a connection is: a user, in groups; no groups where the bus does not tell them."""

    uid: int
    gids: frozenset[int]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a method returns: values that match its signature, and descriptors that are closed once sent.

    `marshalled` is the body of a reply that is one large dictionary, ready to send; its value is then an empty one.
    """

    signature: str = ""
    values: tuple[Any, ...] = ()
    fds: tuple[int, ...] = ()
    marshalled: bytes = b""


def dictionary_entry(signature: str, key: Any, value: Any) -> bytes:
    """One entry of a dictionary of this signature, as it stands in a message; it begins on a multiple of 8."""
    return bytes(Marshaller(signature, [{key: value}]).marshall()[_EMPTY_DICTIONARY_BYTES:])


def dictionary(entries: Iterable[bytes]) -> bytes:
    """The body of a message that is one dictionary (D-Bus specification, Marshaling: arrays)."""
    body = bytearray(_EMPTY_DICTIONARY_BYTES)
    for entry in entries:
        body += bytes(-len(body) % 8) + entry
    struct.pack_into("<I", body, 0, len(body) - _EMPTY_DICTIONARY_BYTES)
    return bytes(body)


class _Prepared(Message):  # type: ignore[misc]
    """A message whose body, one dictionary, is marshalled already."""

    marshalled: bytes

    def _marshall(self, negotiate_unix_fd: bool = False) -> bytes:
        head = bytearray(super()._marshall(negotiate_unix_fd)[:-_EMPTY_DICTIONARY_BYTES])
        struct.pack_into("<I", head, 4, len(self.marshalled))  # the length of the body, in the fixed part of the header
        return bytes(head) + self.marshalled


def error_reply(call: Message, error: BaseException) -> Message:
    """Ours go to the caller with their hint; anything else is our defect: its traceback goes to the journal only."""
    if isinstance(error, asyncio.CancelledError):
        error = errors.Cancelled("the daemon is stopping")
    if isinstance(error, DBusError):
        return Message.new_error(call, error.type, error.text)
    if not isinstance(error, errors.FlashdError):
        log.error("defect in %s.%s", call.interface, call.member, exc_info=error)
        error = errors.Internal("flashd has a defect", hint="its journal has the traceback: please report it")
    return Message.new_error(call, error.bus_name(), error.to_bus())


def raised(reply: Message) -> errors.FlashdError:
    """The error that an error reply stands for."""
    text = str(reply.body[0]) if reply.body else ""
    if reply.error_name.startswith(errors.BUS_PREFIX):
        message, _, hint = text.partition("\n")
        return errors.from_bus(reply.error_name, message, hint)
    match reply.error_name.removeprefix(DBUS + ".Error."):
        case "ServiceUnknown" | "NameHasNoOwner" | "Disconnected" | "NoServer":
            return errors.Unavailable("flashd is not running", hint="start it: flash start")
        case "AccessDenied" | "AuthFailed":
            return errors.NotAuthorized(text, hint="the bus itself refused this; ask an administrator")
        case "UnknownObject":
            return errors.NotFound(text)
        case "InvalidArgs" | "UnknownMethod" | "UnknownProperty" | "UnknownInterface" | "PropertyReadOnly":
            return errors.InvalidArgument(text)
    return errors.from_bus(reply.error_name, text)


class Connection:
    """One connection to a bus: calls out, signals out and in, and, once `serve` is given a handler, calls in."""

    def __init__(self, bus: _Bus) -> None:
        self._bus = bus
        self._serve: Callable[[Received], Coroutine[Any, Any, Reply]] | None = None
        self._listeners: list[Callable[[Received], None]] = []
        self._peers: set[str] = set()
        self._on_peer_left: Callable[[str], None] = lambda peer: None
        self._tasks: set[asyncio.Task[None]] = set()
        self._replying: set[asyncio.Task[Any] | None] = set()
        bus.add_message_handler(self._on_message)

    @property
    def unique_name(self) -> str:
        return str(self._bus.unique_name)

    def serve(self, handler: Callable[[Received], Coroutine[Any, Any, Reply]]) -> None:
        """Every method call that is not org.freedesktop.DBus.Peer's goes to `handler`, in a task of its own."""
        self._serve = handler

    def listen(self, listener: Callable[[Received], None]) -> None:
        """Every signal that a match rule lets through goes to `listener`."""
        self._listeners.append(listener)

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
        timeout_s: float | None = 25.0,
        interactive: bool = False,
        auto_start: bool = False,
    ) -> Received:
        """Raises the error that the peer raised, `Unavailable` when nobody answers in `timeout_s`.

        Without `auto_start` a call to a daemon that has just been stopped does not start it again.
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
        if reply.message_type is MessageType.ERROR:
            raise raised(reply)
        return _received(reply)

    async def _reply_to(self, message: Message, timeout_s: float | None) -> Message:
        """The library leaves callers waiting for ever when the connection ends before the reply."""
        answered = asyncio.ensure_future(self._bus.call(message))
        lost = self._bus._disconnect_future
        try:
            await asyncio.wait({answered, lost}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if answered.done():
                return answered.result()
        finally:
            answered.cancel()
        if lost.done():
            raise ConnectionResetError("the bus went away")
        raise TimeoutError

    def emit(
        self, path: str, interface: str, member: str, signature: str, body: Sequence[Any], *, to: str | None = None
    ) -> None:
        """Sends a signal, to all or `to` one connection; returns at once, whatever the state of the socket."""
        message = Message.new_signal(path, interface, member, signature, list(body))
        message.destination = to
        self._bus.send(message).add_done_callback(_retrieve)

    async def add_match(self, rule: str) -> None:
        await self.call(DBUS, DBUS_PATH, DBUS, "AddMatch", "s", [rule])

    async def own(self, name: str, *, patience_s: float = 0.0) -> None:
        """Becomes `name`; raises AlreadyExists if somebody else is.

        `patience_s` is for a bus that has not read our policy yet: it does so when a package is installed completely,
        which may be after we were started.
        """
        deadline = asyncio.get_running_loop().time() + patience_s
        while True:
            try:
                reply = await self._bus.request_name(name, NameFlag.DO_NOT_QUEUE)
                break
            except DBusError as error:
                if error.type != f"{DBUS}.Error.AccessDenied" or asyncio.get_running_loop().time() >= deadline:
                    raise errors.NotAuthorized(f"the bus does not let us own {name}: {error.text}") from error
            await asyncio.sleep(_POLICY_RETRY_S)
        if reply is not RequestNameReply.PRIMARY_OWNER:
            raise errors.AlreadyExists(
                f"another process owns {name} on this bus", hint="flash status says which; flash stop ends it"
            )

    async def credentials(self, peer: str) -> Credentials:
        """Of a connection, as the bus daemon saw them when it connected."""
        reply = await self.call(DBUS, DBUS_PATH, DBUS, "GetConnectionCredentials", "s", [peer])
        known = plain(reply.body[0])
        return Credentials(int(known["UnixUserID"]), frozenset(map(int, known.get("UnixGroupIDs", ()))))

    async def watch_peers(self, on_peer_left: Callable[[str], None]) -> None:
        """From here on `on_peer_left` hears of every connection that called us and has left the bus."""
        self._on_peer_left = on_peer_left
        await self.add_match(f"type='signal',sender='{DBUS}',interface='{DBUS}',member='NameOwnerChanged',arg2=''")

    def is_present(self, peer: str) -> bool:
        """Whether a connection that called us is still there. Needs `watch_peers`."""
        return peer in self._peers

    async def closed(self) -> None:
        """Returns when the connection ends, by us or by the bus."""
        ended = self._bus._disconnect_future
        await asyncio.wait([ended])  # and not `await ended`: whoever stops waiting would cancel it for all
        ended.exception()

    async def close(self) -> None:
        """Calls under way are answered with Cancelled; answers under way are sent."""
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
            return False
        if message.message_type is not MessageType.METHOD_CALL or self._serve is None:
            return False
        if message.interface == "org.freedesktop.DBus.Peer":
            return False
        # Here and not in the task: what the bus says after this message, it says later.
        self._peers.add(message.sender or "")
        task = asyncio.ensure_future(self._answer(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    def _on_signal(self, signal: Received) -> None:
        if signal.sender == DBUS and signal.member == "NameOwnerChanged":
            name, _, new_owner = signal.body
            if not new_owner and name in self._peers:
                self._peers.discard(name)
                self._on_peer_left(name)
        for listener in self._listeners:
            listener(signal)

    async def _answer(self, message: Message) -> None:
        assert self._serve is not None
        fds: tuple[int, ...] = ()
        try:
            received = _received(message)
            result = await self._serve(received)
            fds = result.fds
            reply = _reply(message, result)
        except BaseException as error:  # noqa: BLE001 -- the boundary: every call gets exactly one reply
            reply = error_reply(message, error)
        finally:
            for fd in message.unix_fds:
                os.close(fd)
        this = asyncio.current_task()
        self._replying.add(this)
        try:
            if not message.flags & MessageFlag.NO_REPLY_EXPECTED:
                await self._bus.send(reply)
        except (OSError, EOFError):
            log.debug("%s left before its reply", message.sender)
        finally:
            self._replying.discard(this)
            for fd in fds:
                os.close(fd)


def _reply(call: Message, result: Reply) -> Message:
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
    """A signal lost with its connection is nobody's error: whoever listens sees the connection end."""
    if not future.cancelled() and future.exception() is not None:
        log.debug("a signal was not sent: %s", future.exception())


async def connect(address: str) -> Connection:
    """Connects to `session`, `system` or a D-Bus address, as this user.

    Raises Unavailable where there is no bus.
    """
    hint = "is the address right, and a bus running there? `flash start` runs one of its own where there is none"
    if address == config.bus_address():
        hint = "FLASHD_BUS_ADDRESS says so: unset it if nothing is there any more, and then flash start"
    try:
        bus = _Bus(address)
        await asyncio.wait_for(bus.connect(), _CONNECT_TIMEOUT_S)
    except Exception as error:  # the library raises whatever its address parser, connect(2) and SASL do
        raise errors.Unavailable(f"no D-Bus at {address!r}: {error}", hint=hint) from error
    return Connection(bus)
