# SPDX-License-Identifier: Apache-2.0
"""One HTTP exchange with a client: its body within bounds, its leaving, and answers of our own (ASGI)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from aiohttp import ClientResponse

from flashd.errors import InvalidArgument, LimitExceeded
from flashd.gateway.metrics.observed import observed
from flashd.json_values import JsonObject
from flashd.units import MiB

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY_BYTES = 64 * MiB  # pictures come in requests, in base64
# Of the connection and not of the request or the answer (RFC 9110, 7.6.1), and what each hop says itself.
_OF_THE_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade "
    b"host content-length expect date server".split()
)


class ClientLeft(Exception):
    """The client has closed its connection."""


class TooLarge(InvalidArgument):
    """The body is larger than MAX_BODY_BYTES."""


class BodyBudget:
    """The memory that the bodies of all requests may take at once, those that wait for their turn included."""

    def __init__(self, most_bytes: int = 16 * MAX_BODY_BYTES) -> None:
        self.most_bytes = most_bytes
        self._left_bytes = most_bytes

    @property
    def held_bytes(self) -> int:
        return self.most_bytes - self._left_bytes

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """A request's share: call it with each number of bytes to hold; all are given back at the end. The call raises
        LimitExceeded if there is no memory for them."""
        held_bytes = 0

        def hold(size_bytes: int) -> None:
            nonlocal held_bytes
            if size_bytes > self._left_bytes:
                raise LimitExceeded("too many large requests wait at once", hint="try again in a moment")
            self._left_bytes -= size_bytes
            held_bytes += size_bytes

        try:
            yield hold
        finally:
            self._left_bytes += held_bytes


async def read_body(receive: Receive, hold: Callable[[int], None]) -> bytes:
    """Reads a request's body. Raises TooLarge, what `hold` raises, or ClientLeft."""
    parts: list[bytes] = []
    size_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        size_bytes += len(part)
        if size_bytes > MAX_BODY_BYTES:
            raise TooLarge(f"the body is larger than {MAX_BODY_BYTES >> 20} MiB")
        hold(len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def unless_left(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs the work to its end, or cancels it when the client leaves. Call it once the body has been read."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
    try:
        await working
    except asyncio.CancelledError:
        if watching.done() and not watching.cancelled():
            raise ClientLeft from None
        raise


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def forwarded(headers: Iterable[tuple[bytes, bytes]], *, without: frozenset[bytes] = frozenset()) -> dict[str, str]:
    """The headers of a request that are for the engine."""
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in headers
        if name not in _OF_THE_HOP and name not in without
    }


async def relay(response: ClientResponse, send: Send, body: AsyncIterator[bytes] | None = None) -> None:
    """Passes an engine's answer on as it comes, byte for byte; `body` is its body if the caller looks at it.

    Raises aiohttp's ClientError if the engine ends before its answer does.
    """
    headers = [(name.lower(), value) for name, value in response.raw_headers if name.lower() not in _OF_THE_HOP]
    if response.content_length is not None:
        headers.append((b"content-length", str(response.content_length).encode()))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    async for chunk in body or pieces(response):
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def pieces(response: ClientResponse) -> AsyncIterator[bytes]:
    """The body of an engine's answer as it comes, also if it has been read already. Raises aiohttp's ClientError."""
    seen = observed()
    if response.content.at_eof():
        received = await response.read()
        seen.received(received)
        yield received
        return
    async for received in response.content.iter_any():
        seen.received(received)
        yield received


async def send_json(
    send: Send, content: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> None:
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    listed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    listed += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": listed})
    await send({"type": "http.response.body", "body": body})


def parse_object(body: bytes) -> JsonObject:
    """Reads a JSON object. Raises InvalidArgument for anything else."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"the body is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidArgument("the body is not a JSON object")
    return content
