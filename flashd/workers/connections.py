# SPDX-License-Identifier: Apache-2.0
"""Passes clients' connections on to the active model if this engine is parked or about to be.

A client that keeps its connection returns to the engine that answered it last. If that engine no longer serves, the
daemon gets the connection as a descriptor, with the bytes of the request read so far, and has it answered. A request is
never passed on once its answer has begun.

This layer is between asyncio and uvicorn's protocol, and sees only bytes and the calls of the application.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from flashd.engines.control import Channel
from flashd.engines.messages import PassedOn
from flashd.units import MiB
from flashd.workers.gate import Gate

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

KEEP_ALIVE_S = 60  # longer than clients keep idle connections (httpx 5 s, aiohttp 15 s)
# On a request for this very engine: it is refused where this engine does not serve, and never passed on.
DIRECT = (b"x-flashd-direct", b"1")
ELSEWHERE = (b"x-flashd-elsewhere", b"1")  # marks a refusal because another engine would answer; never sent to clients
_MAX_READ_BYTES = 32 * MiB


class Connections:
    """The connections of one engine, for the server's event loop only."""

    def __init__(self, gate: Gate, channel: Channel) -> None:
        self.gate = gate
        self._channel = channel
        self.passes_on = False  # until the daemon declares that it accepts them
        self._open: set[_Connection] = set()

    def watch(self, config: Any) -> Any:
        """Wraps the protocols of a uvicorn.Config in ours, and returns it."""
        config.load()
        inner_class = config.http_protocol_class

        def made(**arguments: object) -> _Connection:
            return _Connection(self, inner_class(**arguments))

        config.http_protocol_class = made
        return config

    def part(self) -> None:
        """Notes, before this engine serves again after it was left, that its connections came for the model that was
        active then: their next request, unless it is for this very engine, is passed on to the model that is now."""
        for connection in self._open:
            connection.has_parted = True

    def hand_over(self, transport: asyncio.Transport, read: bytes, *, is_for_active: bool) -> bool:
        """Passes a connection to the daemon. Returns False if that is not possible now, or no descriptor is left."""
        try:
            fd = os.dup(transport.get_extra_info("socket").fileno())
        except OSError:
            return False
        try:
            if not self._channel.notify(PassedOn(base64.b64encode(read).decode(), is_for_active), [fd], waits=False):
                return False
        finally:
            os.close(fd)
        transport.abort()  # closes our descriptor without shutting the connection down
        return True


class _Connection(asyncio.Protocol):
    """A client's connection. Keeps the bytes received since the last answer began."""

    def __init__(self, connections: Connections, inner: Any) -> None:
        self._connections = connections
        self._inner = inner
        self._application: Application = inner.app
        inner.app = self._call
        self._transport: Any = None
        self._read = bytearray()
        self._is_answering = False
        self.has_parted = False
        self._is_mixed = False  # received bytes may belong to this request or to the next

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._connections._open.add(self)
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._is_answering or len(self._read) > _MAX_READ_BYTES:
            self._is_mixed = True
        else:
            self._read += data
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        ends: bool | None = self._inner.eof_received()
        return ends

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections._open.discard(self)
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    async def _call(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        is_direct = DIRECT in scope["headers"]
        if not is_direct and (self.has_parted or not self._connections.gate.serves):
            if self._passed_on():
                await _left(receive)
                return
            if self.has_parted:
                await _refuse(send)
                return
        is_elsewhere = False

        async def sent(message: Message) -> None:
            nonlocal is_elsewhere
            if is_elsewhere:
                return
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                if ELSEWHERE in headers:
                    if is_elsewhere := not is_direct and self._passed_on():
                        return
                    message = {**message, "headers": [header for header in headers if header != ELSEWHERE]}
                self._is_answering = True
                self._read.clear()
            await send(message)

        try:
            await self._application(scope, receive, sent)
        finally:
            self._is_answering = False
        if is_elsewhere:
            await _left(receive)

    def _passed_on(self) -> bool:
        is_whole = bool(self._read) and not self._is_mixed and not self._transport.is_closing()
        if not self._connections.passes_on or not is_whole or self._transport.get_write_buffer_size():
            return False
        return self._connections.hand_over(self._transport, bytes(self._read), is_for_active=self.has_parted)


async def _refuse(send: Send) -> None:
    """Refuses a request that this engine is not to answer and cannot pass on."""
    said = {"message": "the model does not serve here any more", "type": "service_unavailable", "code": "not_serving"}
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": {**said, "param": None}}).encode()})


async def _left(receive: Receive) -> None:
    """Waits until uvicorn knows that the connection is closed, and so expects no answer."""
    while (await receive())["type"] != "http.disconnect":
        pass
