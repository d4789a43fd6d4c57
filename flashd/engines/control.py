# SPDX-License-Identifier: Apache-2.0
"""The channel between the daemon and its engine processes: JSON messages with descriptors on a Unix socket pair.

A message is sent in a frame, which is one packet, so that a killed process never leaves half a frame in the socket,
which the next daemon may go on using. A frame too large for a packet is sent in a sealed memfd, as the last descriptor.
Orders are numbered, and each answer has the number of its order. Messages from a worker are bounded and checked: a
worker runs models, and is trusted with nothing but its own answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import secrets
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from flashd.engines import messages
from flashd.engines.messages import Message, Order
from flashd.errors import EngineFailed
from flashd.tasks import close_all
from flashd.units import KiB, MiB

KIND = socket.SOCK_SEQPACKET
MAX_FRAME_BYTES = 64 * MiB  # three times the layout of the largest model
MAX_FDS = 64
_PACKET_BYTES = 32 * KiB  # well below the size of a socket's buffer
_ENCLOSED = b"@"  # a packet that means: the frame is in the attached memfd
# Version of the way in which vLLM builds a model for an image, and moves its tensors there. Part of each image's key.
VLLM_IMAGE_FORMAT = "3"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

M = TypeVar("M", bound=Message)
A = TypeVar("A", bound=Message)


@dataclass(frozen=True, slots=True)
class Frame:
    """A received frame, as JSON. The receiver closes the descriptors."""

    content: dict[str, object]
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Parcel(Generic[M]):
    """A message and the descriptors that travel with it."""

    message: M
    fds: tuple[int, ...] = ()


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, KIND | socket.SOCK_CLOEXEC)


class Channel:
    """The blocking end, for workers and zygotes. Each sent message answers the last received order, or is a notice.

    Raises EOFError when the other side has closed the channel.
    """

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._number: dict[str, object] = {}  # number of the last received order

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        with _packed({**messages.to_json(message), **self._number}, fds) as (packet, enclosed):
            socket.send_fds(self.socket, [packet], enclosed)

    def forward(self, frame: Frame) -> None:
        """Sends a frame received elsewhere as the answer, unparsed and without its descriptors."""
        with _packed({**frame.content, **self._number}, ()) as (packet, enclosed):
            socket.send_fds(self.socket, [packet], enclosed)

    def notify(self, message: Message, fds: Sequence[int] = (), *, waits: bool = True) -> bool:
        """Sends a notice, from any thread. Returns False if it cannot be sent now and `waits` is false."""
        with _packed({**messages.to_json(message), "notice": True}, fds) as (packet, enclosed):
            try:
                socket.send_fds(self.socket, [packet], enclosed, 0 if waits else socket.MSG_DONTWAIT)
            except OSError:
                if waits:
                    raise
                return False
        return True

    def receive(self) -> Frame:
        frame = _received(self.socket)
        self._number = {"order": frame.content.pop("order")} if "order" in frame.content else {}
        return frame


class AsyncChannel:
    """The daemon's end: sends one order at a time and awaits its answer. Other received messages are notices.

    Answers to the orders of an earlier daemon are ignored.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._turn = asyncio.Lock()
        self.notices: asyncio.Queue[dict[str, object]] = asyncio.Queue()
        self.on_notice: Callable[[Frame], None] | None = None  # receives notices, and closes their descriptors
        self._numbers = itertools.count(secrets.randbits(48))  # numbers that no earlier daemon has used
        self._asked: int | None = None
        self._answer: asyncio.Future[Frame] | None = None
        self._reader = asyncio.create_task(self._read(), name="engine control")
        self.closed = asyncio.Event()

    def fileno(self) -> int:
        return self._socket.fileno()

    async def request(self, order: Order[A], fds: Sequence[int] = ()) -> A:
        """Sends an order like `exchange`, whose answer has no descriptors."""
        answer = await self.exchange(order, fds)
        close_all(answer.fds)
        return answer.message

    async def exchange(self, order: Order[A], fds: Sequence[int] = ()) -> Parcel[A]:
        """Sends an order and returns the answer.

        Raises EngineFailed if the peer refuses, answers with an invalid message, or ends before it answers. If the
        caller is cancelled, the answer is still awaited, lest it be taken for the answer to the next order. `fds` are
        duplicated, and need to stay open only until this coroutine first runs.
        """
        ours = [os.dup(fd) for fd in fds]
        exchange = asyncio.ensure_future(self._exchange(messages.to_json(order), ours))
        exchange.add_done_callback(_looked_at)
        try:
            answer = await asyncio.shield(exchange)
        except asyncio.CancelledError:
            exchange.add_done_callback(_not_wanted)
            raise
        try:
            return Parcel(messages.answer_from_json(order, answer.content), answer.fds)
        except EngineFailed:
            close_all(answer.fds)
            raise

    async def _exchange(self, content: dict[str, object], fds: Sequence[int]) -> Frame:
        try:
            async with self._turn:
                if self.closed.is_set():
                    raise EngineFailed("the engine's process has ended")
                self._asked, self._answer = next(self._numbers), asyncio.get_running_loop().create_future()
                try:
                    await self._send({**content, "order": self._asked}, fds)
                    return await self._answer
                except OSError as error:
                    raise EngineFailed(f"the engine's process has ended: {error.strerror}") from None
                finally:
                    self._asked, self._answer = None, None
        finally:
            close_all(fds)

    async def close(self) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._end()

    async def _send(self, content: dict[str, object], fds: Sequence[int]) -> None:
        loop = asyncio.get_running_loop()
        with _packed(content, fds) as (packet, enclosed):
            while True:
                try:
                    socket.send_fds(self._socket, [packet], enclosed)
                    return
                except BlockingIOError:
                    await _ready(self._socket, loop.add_writer, loop.remove_writer)

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    frame = _received(self._socket)
                except BlockingIOError:
                    await _ready(self._socket, loop.add_reader, loop.remove_reader)
                    continue
                if frame.content.pop("notice", False):
                    if self.on_notice is not None:
                        self.on_notice(frame)
                        continue
                    close_all(frame.fds)
                    self.notices.put_nowait(frame.content)
                elif frame.content.get("order") != self._asked or self._answer is None or self._answer.done():
                    close_all(frame.fds)
                else:
                    self._answer.set_result(frame)
        except (OSError, EOFError, ValueError):
            pass
        finally:
            self._end()

    def _end(self) -> None:
        if not self.closed.is_set():
            self.closed.set()
            self._socket.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(EngineFailed("the engine's process ended before it answered"))


@contextlib.contextmanager
def _packed(content: dict[str, object], fds: Sequence[int]) -> Iterator[tuple[bytes, list[int]]]:
    """Encodes a frame as a packet, with the descriptors to send."""
    raw = json.dumps(content, separators=(",", ":")).encode()
    if len(raw) <= _PACKET_BYTES:
        yield raw, list(fds)
        return
    enclosure = os.memfd_create("flashd:frame", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(enclosure, "wb", closefd=False) as file:
            file.write(raw)
        fcntl.fcntl(enclosure, fcntl.F_ADD_SEALS, _SEALS)
        yield _ENCLOSED, [*fds, enclosure]
    finally:
        os.close(enclosure)


def _received(end: socket.socket) -> Frame:
    """Receives the next frame. Raises EOFError at the end, BlockingIOError if there is none yet, ValueError if the
    packet is not a frame.
    """
    raw, fds, flags, _ = socket.recv_fds(end, 2 * _PACKET_BYTES, MAX_FDS)
    try:
        for fd in fds:
            os.set_inheritable(
                fd, False
            )  # recv_fds lacks MSG_CMSG_CLOEXEC, so child processes of a zygote would keep GPU memory alive
        if not raw:
            raise EOFError
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("a frame is truncated")
        if raw == _ENCLOSED:
            raw = _enclosed(fds)
        content = _parsed(raw)
        if not isinstance(content, dict):
            raise ValueError("a frame is not a JSON object")
    except BaseException:
        close_all(fds)
        raise
    return Frame(content, tuple(fds))


def _parsed(raw: bytes) -> object:
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("a frame is nested too deeply") from None


def _enclosed(fds: list[int]) -> bytes:
    """Reads and closes the last descriptor, a sealed memfd, which no process can change or truncate meanwhile."""
    if not fds:
        raise ValueError("the memfd is missing")
    with os.fdopen(fds.pop(), "rb") as file:
        fd = file.fileno()
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ValueError("the descriptor is not sealed memory")
        if status.st_size > MAX_FRAME_BYTES:
            raise ValueError("a frame is too large")
        return os.pread(fd, status.st_size, 0)


async def _ready(end: socket.socket, add: Callable[..., None], remove: Callable[[socket.socket], bool]) -> None:
    """Waits until the socket is ready to receive, or to send."""
    ready = asyncio.get_running_loop().create_future()

    def wake_up() -> None:
        if not ready.done():
            ready.set_result(None)

    add(end, wake_up)
    try:
        await ready
    finally:
        remove(end)


def _looked_at(exchange: asyncio.Future[Frame]) -> None:
    """Retrieves the exception, which a cancelled caller does not."""
    if not exchange.cancelled():
        exchange.exception()


def _not_wanted(exchange: asyncio.Future[Frame]) -> None:
    if not exchange.cancelled() and exchange.exception() is None:
        close_all(exchange.result().fds)
