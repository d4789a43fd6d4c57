# SPDX-License-Identifier: Apache-2.0
"""The gate in front of a server that is not ours, as ASGI middleware that holds, refuses and cuts requests.

With vLLM's own pause, requests to a sleeping engine would hang, and vLLM would report that it is healthy; so no request
reaches vLLM unless its engine can answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import deque

from flashd.units import MiB
from flashd.workers.connections import ELSEWHERE, Application, Message, Receive, Send
from flashd.workers.gate import Elsewhere, Gate, NotServing

# Paths that report status, and are not answered by the model.
_ALWAYS = {"/health", "/ping", "/version", "/metrics", "/load", "/v1/models"}
_KINDS = {503: ("service_unavailable", "not_serving"), 413: ("invalid_request_error", None)}
MAX_BODY_BYTES = 256 * MiB  # large enough for images in requests
_CUT = "the request was cut off by a swap"


class _Cut(threading.Event):
    """An event set by the gate when a request must end early, which informs the request's task. Event loop only."""

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
        # While a slow client sends its request, it is not inside, and does not delay a swap.
        if (read := await _read(receive)) is None:
            await said.refusal(f"the body is larger than {MAX_BODY_BYTES // MiB} MiB", status=413)
            return
        try:
            async with self._gate.passage(cut):
                if cut.is_set():  # after its admission, and before it went on
                    raise NotServing(_CUT)
                cut.task = asyncio.ensure_future(self._inner(scope, read, said))
                try:
                    await asyncio.wait({cut.task})
                finally:
                    if not cut.task.done():  # we are cancelled ourselves, because the server is ending
                        cut.task.cancel()
                        await asyncio.wait({cut.task})
                if not cut.task.cancelled():
                    cut.task.result()
                elif cut.is_set():
                    raise NotServing(_CUT)
        except NotServing as error:
            with contextlib.suppress(OSError):
                await said.refusal(str(error), is_elsewhere=isinstance(error, Elsewhere))


async def _read(receive: Receive) -> Receive | None:
    """Reads the whole body, and returns a function that provides it again; None if it is too large."""
    messages: deque[Message] = deque()
    left = MAX_BODY_BYTES
    while True:
        messages.append(message := await receive())
        left -= len(message.get("body", b""))
        if left < 0:
            return None
        if message["type"] != "http.request" or not message.get("more_body", False):
            break

    async def again() -> Message:
        return messages.popleft() if messages else await receive()

    return again


class _Said:
    """Passes an answer on, and keeps track of how much was sent."""

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

    async def refusal(self, why: str, *, status: int = 503, is_elsewhere: bool = False) -> None:
        """Ends the answer with an error, as the whole answer or as the last event of a stream."""
        kind, code = _KINDS[status]
        error = {"message": why, "type": kind, "param": None, "code": code}
        raw = json.dumps({"error": error}).encode()
        if not self._begun:
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(raw)).encode()),
                (b"retry-after", b"1"),
                (b"connection", b"close"),  # who tries again comes by the endpoint, which may lead elsewhere now
            ]
            if is_elsewhere:
                headers.append(ELSEWHERE)
            await self._send({"type": "http.response.start", "status": status, "headers": headers})
            await self._send({"type": "http.response.body", "body": raw})
        elif not self._ended:
            last = b"data: " + raw + b"\n\ndata: [DONE]\n\n" if self._is_stream else b""
            await self._send({"type": "http.response.body", "body": last})
