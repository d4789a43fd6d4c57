# SPDX-License-Identifier: Apache-2.0
"""Who answers at the endpoint while the model rests? We: whoever asks a question wakes it, and gets its answer.

A model that was idle for too long is parked, and its engine's socket would refuse. So the endpoint leads here until
some model is active again. Only questions (POST) wake: programs look at health and lists of models all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from flashd.errors import FlashdError, Unavailable

log = logging.getLogger(__name__)

_PATIENCE_S = 30.0  # with those who connect and say nothing
_CHUNK_BYTES = 1 << 16


class Doorman:
    """Listens at `path` from `open` until `close`."""

    def __init__(self, path: Path, mode: int, wake: Callable[[], Awaitable[Path]]) -> None:
        """`wake` returns the socket of the model that is active then; it may raise what a swap raises."""
        self.path = path
        self._mode = mode
        self._wake = wake
        self._server: asyncio.Server | None = None
        self._visits: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._welcome, self.path)
        self.path.chmod(self._mode)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for visit in self._visits:
            visit.cancel()
        if self._visits:
            await asyncio.wait(self._visits)
        self.path.unlink(missing_ok=True)

    def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None or not self._server.is_serving():
            writer.close()  # it came while we were closing
            return
        visit = asyncio.create_task(self._visit(reader, writer), name="doorman")
        self._visits.add(visit)
        visit.add_done_callback(self._visits.discard)
        visit.add_done_callback(lambda _: writer.close())  # also where it is cancelled before it begins

    async def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end: what a client or an engine does to it concerns nobody else."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                first = await reader.readuntil(b"\n")
            try:
                if not first.startswith(b"POST "):
                    raise Unavailable("the model is parked", hint="a question wakes it")
                engine = await self._wake()
            except FlashdError as error:
                await _refuse(reader, writer, error)
            else:
                await _relay(first, reader, writer, engine)
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:  # TimeoutError is one
            log.debug("a connection ended: %s", error)
        finally:
            await _closed(writer)


async def _relay(first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, engine: Path) -> None:
    """To and from the engine, byte for byte, until both have said all. `first` was read already."""
    from_engine, to_engine = await asyncio.open_unix_connection(engine)
    try:
        to_engine.write(first)
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
    with contextlib.suppress(OSError):  # it has left already
        sink.write_eof()


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):  # the other side was quicker
        await writer.wait_closed()


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, error: FlashdError) -> None:
    """As an engine refuses. The rest of the request's head is read first: who still writes does not listen."""
    async with asyncio.timeout(_PATIENCE_S):
        while (await reader.readuntil(b"\n")).strip():
            pass
    said = {"message": str(error), "type": "service_unavailable", "param": None, "code": "not_serving"}
    raw = json.dumps({"error": said}).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\nConnection: close\r\nRetry-After: 1\r\n\r\n"
    )
    writer.write(head.encode() + raw)
    await writer.drain()
