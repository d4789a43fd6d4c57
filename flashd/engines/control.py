# SPDX-License-Identifier: Apache-2.0
"""How do the daemon and its engine processes talk? Frames of JSON, with descriptors, on a Unix socket pair.

A frame is one packet, so that none is ever half sent or half read, whoever is killed: another daemon may go on with the
socket. What is too large for a packet travels in a sealed memfd, as the last descriptor. Orders are numbered, and each
answer says to which it is one. What comes from a worker is bounded and checked: a worker runs models, and is trusted
with nothing but its own answers.
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
from typing import Any

from flashd.errors import EngineFailed, EngineOutOfMemory, Unsupported
from flashd.units import KiB, MiB

KIND = socket.SOCK_SEQPACKET
MAX_FRAME_BYTES = 64 * MiB  # the layout of the largest model is a third of this
MAX_FDS = 64
_PACKET_BYTES = 32 * KiB  # well below what a socket's buffer takes
_ENCLOSED = b"@"  # a packet that says: the frame is in the memfd that came with it
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True, slots=True)
class Frame:
    """Descriptors belong to whoever received the frame."""

    content: dict[str, Any]
    fds: tuple[int, ...] = ()


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, KIND | socket.SOCK_CLOEXEC)


class Channel:
    """The blocking end, for workers and zygotes: whatever is sent is the answer to the order received last, or a
    notice. Raises EOFError when the other side has gone."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._order: dict[str, Any] = {}

    def send(self, content: dict[str, Any], fds: Sequence[int] = ()) -> None:
        with _packed({**content, **self._order}, fds) as (packet, enclosed):
            socket.send_fds(self.socket, [packet], enclosed)

    def receive(self) -> Frame:
        frame = _received(self.socket)
        self._order = {"order": frame.content.pop("order")} if "order" in frame.content else {}
        return frame


class AsyncChannel:
    """The daemon's end: one request at a time, each with its answer; anything else the peer says is a notice.

    Answers to what a daemon before us has asked are passed over.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._turn = asyncio.Lock()
        self.notices: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._orders = itertools.count(secrets.randbits(48))  # no daemon before us has used these
        self._asked: int | None = None
        self._answer: asyncio.Future[Frame] | None = None
        self._reader = asyncio.create_task(self._read(), name="engine control")
        self.closed = asyncio.Event()

    def fileno(self) -> int:
        return self._socket.fileno()

    async def request(self, content: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """As `exchange`, where no descriptor is expected in the answer."""
        answer = await self.exchange(content, fds)
        close_all(answer.fds)
        return answer.content

    async def exchange(self, content: dict[str, Any], fds: Sequence[int] = ()) -> Frame:
        """The answer. Raises EngineFailed if the peer answers with an error, or ends before it answers.

        A caller that is cancelled does not get the answer; it is awaited all the same, so that it is not taken for the
        answer to the next request. `fds` are duplicated: they need to stay open only until this is first awaited.
        """
        ours = [os.dup(fd) for fd in fds]
        exchange = asyncio.ensure_future(self._exchange(content, ours))
        exchange.add_done_callback(_looked_at)
        try:
            return await asyncio.shield(exchange)
        except asyncio.CancelledError:
            exchange.add_done_callback(_not_wanted)
            raise

    async def _exchange(self, content: dict[str, Any], fds: Sequence[int]) -> Frame:
        try:
            async with self._turn:
                if self.closed.is_set():
                    raise EngineFailed("the engine's process has ended")
                self._asked, self._answer = next(self._orders), asyncio.get_running_loop().create_future()
                try:
                    await self._send({**content, "order": self._asked}, fds)
                    answer = await self._answer
                except OSError as error:
                    raise EngineFailed(f"the engine's process has ended: {error.strerror}") from None
                finally:
                    self._asked, self._answer = None, None
        finally:
            close_all(fds)
        if "error" in answer.content:
            close_all(answer.fds)
            kinds = {"unsupported": Unsupported, "out_of_memory": EngineOutOfMemory}
            kind = next((kind for name, kind in kinds.items() if answer.content.get(name)), EngineFailed)
            raise kind(str(answer.content["error"]), hint=str(answer.content.get("hint", "")))
        return answer

    async def close(self) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._end()

    async def _send(self, content: dict[str, Any], fds: Sequence[int]) -> None:
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
def _packed(content: dict[str, Any], fds: Sequence[int]) -> Iterator[tuple[bytes, list[int]]]:
    """A frame as a packet, and the descriptors to send with it."""
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
    """The next frame. Raises EOFError at the end, BlockingIOError if there is none yet, ValueError if it is none."""
    raw, fds, flags, _ = socket.recv_fds(end, 2 * _PACKET_BYTES, MAX_FDS)
    try:
        for fd in fds:
            os.set_inheritable(fd, False)  # recv_fds asks for no MSG_CMSG_CLOEXEC: a zygote would keep a GPU's memory
        if not raw:
            raise EOFError
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("a frame was cut short")
        if raw == _ENCLOSED:
            raw = _enclosed(fds)
        content = json.loads(raw)
        if not isinstance(content, dict):
            raise ValueError("a frame is an object")
    except BaseException:
        close_all(fds)
        raise
    return Frame(content, tuple(fds))


def _enclosed(fds: list[int]) -> bytes:
    """What is in the last descriptor, which nobody can change or cut short meanwhile; it is closed."""
    if not fds:
        raise ValueError("nothing was enclosed")
    with os.fdopen(fds.pop(), "rb") as file:
        fd = file.fileno()
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ValueError("that is no sealed memory")
        if status.st_size > MAX_FRAME_BYTES:
            raise ValueError("a frame is too large")
        return os.pread(fd, status.st_size, 0)


async def _ready(end: socket.socket, add: Callable[..., None], remove: Callable[[socket.socket], bool]) -> None:
    """Returns when something can be received, or sent."""
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
    """Nobody may be left to hear how it ended."""
    if not exchange.cancelled():
        exchange.exception()


def _not_wanted(exchange: asyncio.Future[Frame]) -> None:
    if not exchange.cancelled() and exchange.exception() is None:
        close_all(exchange.result().fds)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
