# SPDX-License-Identifier: Apache-2.0
"""Relays requests to the active model that come to no engine, or to one that no longer serves.

An idle model is parked, and its engine's socket would refuse connections. So the endpoint leads here until a model is
active again. Only questions (POST) wake a model, because programs poll health and lists of models. Clients that keep a
connection return to the engine that answered them last; if it is parked, it passes the connection on to us.

One request of each connection is relayed to the model that is active then, and the answer announces the end of the
connection (RFC 9112, 9.6): the client's next connection goes to the endpoint, which leads to the engine itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from flashd.daemon.events import Events
from flashd.errors import FlashdError, Unavailable

log = logging.getLogger(__name__)

_PATIENCE_S = 30.0  # for clients that connect and send nothing
_CHUNK_BYTES = 1 << 16
_MAX_HEAD_BYTES = 1 << 16
_MAX_VISITS = 1024


class WakeProxy:
    """Listens at `path` from `open` until `close`."""

    def __init__(
        self,
        path: Path,
        mode: int,
        answering: Callable[[bool], Awaitable[Path]],
        events: Events,
        *,
        is_for_active: Callable[[int], bool] = lambda engine: True,
    ) -> None:
        """`answering` takes whether the request is a question, which wakes a model. It returns the socket of the model
        that is active then, and may raise the errors of a swap. `is_for_active` tells whether connections that an
        engine passes on are for the active model, and not for one that served beside it.
        """
        self.path = path
        self._mode = mode
        self._answering = answering
        self._is_for_active = is_for_active
        self._server: asyncio.Server | None = None
        self._is_closed = False
        self._visits: set[asyncio.Task[None]] = set()
        events.connection_passed_on.subscribe(self._take)

    async def open(self) -> None:
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._welcome, self.path)
        self.path.chmod(self._mode)

    def _take(self, connection: socket.socket, read: bytes, engine: int | None) -> None:
        """Takes over a client's connection that an engine passes on, with the bytes that it has read of a request."""
        if self._is_closed or len(self._visits) >= _MAX_VISITS:
            connection.close()
            return
        is_for_active = engine is None or self._is_for_active(engine)
        self._begin(self._taken(connection, read, is_for_active), connection.close)

    async def close(self) -> None:
        self._is_closed = True
        if self._server is not None:
            self._server.close()
        for visit in self._visits:
            visit.cancel()
        if self._visits:
            await asyncio.wait(self._visits)
        self.path.unlink(missing_ok=True)

    def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None or not self._server.is_serving():
            writer.close()  # it came during `close`
            return
        if len(self._visits) >= _MAX_VISITS:
            writer.close()
            return
        self._begin(self._visit(reader, writer), writer.close)

    def _begin(self, work: Coroutine[Any, Any, None], close: Callable[[], None]) -> None:
        visit = asyncio.create_task(work, name="wake proxy")
        self._visits.add(visit)
        visit.add_done_callback(self._visits.discard)
        visit.add_done_callback(lambda _: close())  # even if it is cancelled before it begins

    async def _taken(self, connection: socket.socket, read: bytes, is_for_active: bool) -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(read)
        loop = asyncio.get_running_loop()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        await self._visit(reader, writer, is_for_active=is_for_active)

    async def _visit(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_for_active: bool = True
    ) -> None:
        """Serves one connection to its end. Errors of a client or an engine do not affect other connections."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                head = await _head(reader)
            try:
                if not is_for_active:
                    raise Unavailable("the model does not serve here any more", hint="ask again")
                engine = await self._answering(head.startswith(b"POST "))
            except FlashdError as error:
                await _refuse(writer, error)
            else:
                await _relay(head, reader, writer, engine)
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:  # includes TimeoutError
            log.debug("a connection ended: %s", error)
        finally:
            await _closed(writer)


async def _head(reader: asyncio.StreamReader) -> bytes:
    """Reads a request's head, and changes it to request the end of the connection after the answer."""
    lines = [await reader.readuntil(b"\n")]
    left = _MAX_HEAD_BYTES
    while (line := await reader.readuntil(b"\n")).strip():
        if (left := left - len(line)) < 0:
            raise ValueError("the head of the request is too large")
        if line.partition(b":")[0].strip().lower() not in {b"connection", b"keep-alive"}:
            lines.append(line)
    return b"".join([*lines, b"Connection: close\r\n", line])


async def _relay(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, engine: Path) -> None:
    """Copies bytes to and from the engine until both sides have ended. The head was already read."""
    from_engine, to_engine = await asyncio.open_unix_connection(engine)
    try:
        to_engine.write(head)
        async with asyncio.TaskGroup() as both:
            both.create_task(_pump(reader, to_engine))
            both.create_task(_pump(from_engine, writer))
    except* OSError as errors:
        log.debug("a connection ended: %s", errors.exceptions[0])
    finally:
        await _closed(to_engine)


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while chunk := await source.read(_CHUNK_BYTES):
        sink.write(chunk)
        await sink.drain()
    with contextlib.suppress(OSError):  # it has already left
        sink.write_eof()


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):  # the other side has already closed it
        await writer.wait_closed()


async def _refuse(writer: asyncio.StreamWriter, error: FlashdError) -> None:
    """Answers like an engine that refuses a request."""
    said = {"message": str(error), "type": "service_unavailable", "param": None, "code": "not_serving"}
    raw = json.dumps({"error": said}).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\nConnection: close\r\nRetry-After: 1\r\n\r\n"
    )
    writer.write(head.encode() + raw)
    await writer.drain()
