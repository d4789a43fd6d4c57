# SPDX-License-Identifier: Apache-2.0
"""How does our gate stand before vLLM's server? As ASGI middleware: it holds, refuses and cuts requests.

vLLM's own pause lets requests to a sleeping engine hang, and says that it is healthy meanwhile; so none reaches it
unless its engine can answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from flashd.engines.gate import Gate, NotServing

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

# What says how things are, and is not answered by the model.
_ALWAYS = {"/health", "/ping", "/version", "/metrics", "/load", "/v1/models"}
_CUT = "the request was cut short by a swap"


class _Cut(threading.Event):
    """Set by the gate when a request must end early; tells the request's own task. On the event loop only."""

    def __init__(self) -> None:
        super().__init__()
        self.task: asyncio.Task[None] | None = None

    def set(self) -> None:
        super().set()
        if self.task is not None:
            self.task.cancel()


class Guard:
    """An ASGI application around another one."""

    def __init__(self, inner: Application, gate: Gate) -> None:
        self._inner = inner
        self._gate = gate

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") in _ALWAYS:
            await self._inner(scope, receive, send)
        elif scope["type"] == "http":
            await self._request(scope, receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1013, "reason": "flashd serves HTTP only"})

    async def _request(self, scope: Message, receive: Receive, send: Send) -> None:
        cut = _Cut()
        said = _Said(send)
        try:
            async with self._gate.passage(cut):
                cut.task = asyncio.ensure_future(self._inner(scope, receive, said))
                try:
                    await asyncio.wait({cut.task})
                finally:
                    if not cut.task.done():  # we are cancelled ourselves: the server is ending
                        cut.task.cancel()
                        await asyncio.wait({cut.task})
                if not cut.task.cancelled():
                    cut.task.result()
                elif cut.is_set():
                    raise NotServing(_CUT)
        except NotServing as error:
            with contextlib.suppress(OSError):
                await said.refusal(str(error))


class _Said:
    """Passes an answer on, and knows how far it has got."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_stream = False
        self._begun = False
        self._ended = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            headers = dict(message.get("headers", ()))
            self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def refusal(self, why: str) -> None:
        """Ends the answer with an error: as a whole, or as a stream's last event."""
        error = {"message": why, "type": "service_unavailable", "param": None, "code": "not_serving"}
        raw = json.dumps({"error": error}).encode()
        if not self._begun:
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(raw)).encode()),
                (b"retry-after", b"1"),
                (b"connection", b"close"),  # who tries again comes by the endpoint, which may lead elsewhere now
            ]
            await self._send({"type": "http.response.start", "status": 503, "headers": headers})
            await self._send({"type": "http.response.body", "body": raw})
        elif not self._ended:
            last = b"data: " + raw + b"\n\ndata: [DONE]\n\n" if self._is_stream else b""
            await self._send({"type": "http.response.body", "body": last})
