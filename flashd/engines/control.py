# SPDX-License-Identifier: Apache-2.0
"""How do the daemon and its engine processes talk? Frames of JSON, with descriptors, on a Unix socket pair.

A frame is four bytes of length and a JSON object; descriptors travel with its first byte. What comes from a worker is
bounded and checked: a worker runs models, and is trusted with nothing but its own answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashd.errors import EngineFailed, EngineOutOfMemory, Unsupported
from flashd.units import MiB

MAX_FRAME_BYTES = 64 * MiB  # the layout of the largest model is a third of this
MAX_FDS = 64
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Frame:
    """Descriptors belong to whoever received the frame."""

    content: dict[str, Any]
    fds: tuple[int, ...] = ()


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)


def encode(content: dict[str, Any]) -> bytes:
    raw = json.dumps(content, separators=(",", ":")).encode()
    return _LENGTH.pack(len(raw)) + raw


class Channel:
    """The blocking end, for workers and zygotes. Raises EOFError when the other side has gone."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    def send(self, content: dict[str, Any], fds: Sequence[int] = ()) -> None:
        raw = encode(content)
        sent = socket.send_fds(self.socket, [raw], list(fds)) if fds else 0
        if sent < len(raw):  # to send nothing is an error too, once the other side has got all and gone
            self.socket.sendall(raw[sent:])

    def receive(self) -> Frame:
        raw, fds, _, _ = socket.recv_fds(self.socket, _LENGTH.size, MAX_FDS)
        if not raw:
            raise EOFError
        raw += self._exactly(_LENGTH.size - len(raw))
        return Frame(json.loads(self._exactly(_LENGTH.unpack(raw)[0])), tuple(fds))

    def _exactly(self, count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            part = self.socket.recv(min(count - len(received), MiB))
            if not part:
                raise EOFError
            received += part
        return bytes(received)


class AsyncChannel:
    """The daemon's end: one request at a time, each with its answer; anything else the peer says is a notice."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._turn = asyncio.Lock()
        self.notices: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._answer: asyncio.Future[Frame] | None = None
        self._reader = asyncio.create_task(self._read(), name="engine control")
        self.closed = asyncio.Event()

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
                self._answer = asyncio.get_running_loop().create_future()
                try:
                    await self._send(encode(content), fds)
                    answer = await self._answer
                except OSError as error:
                    raise EngineFailed(f"the engine's process has ended: {error.strerror}") from None
                finally:
                    self._answer = None
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

    async def _send(self, raw: bytes, fds: Sequence[int]) -> None:
        loop = asyncio.get_running_loop()
        while fds:
            try:
                raw = raw[socket.send_fds(self._socket, [raw], list(fds)) :]
                break
            except BlockingIOError:
                await asyncio.sleep(0.001)
        await loop.sock_sendall(self._socket, raw)

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                start, fds = await self._start(loop)
                try:
                    start += await self._exactly(loop, _LENGTH.size - len(start))
                    (length,) = _LENGTH.unpack(start)
                    if length > MAX_FRAME_BYTES:
                        break
                    content = json.loads(await self._exactly(loop, length))
                    if not isinstance(content, dict):
                        break
                    if content.pop("notice", False):
                        self.notices.put_nowait(content)
                    elif self._answer is not None and not self._answer.done():
                        self._answer.set_result(Frame(content, fds))
                        fds = ()  # whoever asked has them now
                finally:
                    close_all(fds)
        except (OSError, EOFError, ValueError):
            pass
        finally:
            self._end()

    async def _start(self, loop: asyncio.AbstractEventLoop) -> tuple[bytes, tuple[int, ...]]:
        """The first bytes of a frame, and the descriptors that came with them: asyncio has no call for those."""
        while True:
            try:
                raw, fds, _, _ = socket.recv_fds(self._socket, _LENGTH.size, MAX_FDS)
            except BlockingIOError:
                await _readable(self._socket, loop)
                continue
            if not raw:
                raise EOFError
            return raw, tuple(fds)

    async def _exactly(self, loop: asyncio.AbstractEventLoop, count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            part = await loop.sock_recv(self._socket, min(count - len(received), MiB))
            if not part:
                raise EOFError
            received += part
        return bytes(received)

    def _end(self) -> None:
        if not self.closed.is_set():
            self.closed.set()
            self._socket.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(EngineFailed("the engine's process ended before it answered"))


async def _readable(end: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
    """Returns when something can be received."""
    ready = loop.create_future()

    def wake_up() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(end, wake_up)
    try:
        await ready
    finally:
        loop.remove_reader(end)


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
