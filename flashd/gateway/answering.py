# SPDX-License-Identifier: Apache-2.0
"""A request of a client and its answer, in any dialect: errors in its form, and the end of the work when it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from aiohttp import ClientError, ClientResponse

from flashd.errors import EngineFailed, FlashdError, Internal, Unavailable
from flashd.gateway.dialects.chunks import Chunk, ChunkReader, refused
from flashd.gateway.dialects.dialect import Dialect, name_of, retry_headers, status_of
from flashd.gateway.exchange import (
    BodyBudget,
    ClientLeft,
    Message,
    Receive,
    Send,
    pieces,
    read_body,
    send_json,
    unless_left,
)
from flashd.gateway.keep_alive import HEADER, KEEP_ALIVE, seconds
from flashd.gateway.metrics.observed import observed
from flashd.units import MiB, format_bytes

log = logging.getLogger(__name__)

_MOST_ANSWER_BYTES = 256 * MiB  # thousands of embeddings as text
_MOST_REFUSAL_BYTES = 64 << 10
_SHOWN = 500


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has been read. `arrived_ns` is the time of time.monotonic_ns()."""

    scope: Message
    body: bytes
    arrived_ns: int

    def header(self, name: bytes) -> str:
        """The value of a header by its name in lower case; empty if there is none."""
        return next((value.decode("latin-1") for found, value in self.scope["headers"] if found == name), "")

    @property
    def target(self) -> str:
        """Path and query."""
        query = self.scope["query_string"].decode("latin-1")
        return str(self.scope["path"]) + (f"?{query}" if query else "")


class Sending:
    """Sends an answer, and knows whether it has begun. `is_stream` is whether an error may end it as its last piece."""

    def __init__(self, send: Send, dialect: Dialect) -> None:
        self._send = send
        self._dialect = dialect
        self.has_begun = False
        self.is_stream = False

    async def __call__(self, message: Message) -> None:
        if self.has_begun and message["type"] == "http.response.start":
            return  # of a stream that began while its client waited
        await self._send(message)
        self.has_begun = True

    async def json(self, content: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        await send_json(self, content, status=status, headers=headers)

    async def begin_stream(self, media_type: str) -> None:
        self.is_stream = True
        headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-cache")]
        await self({"type": "http.response.start", "status": 200, "headers": headers})

    async def piece(self, content: bytes) -> None:
        await self({"type": "http.response.body", "body": content, "more_body": True})

    async def end_stream(self) -> None:
        await self({"type": "http.response.body", "body": b""})

    async def fail(self, error: FlashdError) -> None:
        """Says what went wrong: as the answer, or as the last piece of a stream that has begun. Else the connection is
        closed before the answer is complete, which clients notice."""
        observed().failed(name_of(error))
        if not self.has_begun:
            await self.json(self._dialect.described(error), status=status_of(error), headers=retry_headers(error))
        elif self.is_stream:
            await self({"type": "http.response.body", "body": self._dialect.ending(error)})
        else:
            log.warning("an answer was cut: %s", error)
            raise error


Answer = Callable[[Asked, Sending], Awaitable[None]]


class Endpoint:
    """An ASGI application: a function that answers, with errors in the form of a dialect."""

    def __init__(self, dialect: Dialect, answer: Answer, budget: BodyBudget) -> None:
        self._dialect = dialect
        self._answer = answer
        self._budget = budget

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        sending = Sending(send, self._dialect)
        arrived_ns = time.monotonic_ns()
        try:
            with self._budget.share() as hold:
                body = await read_body(receive, hold)
                await unless_left(receive, self._answered(Asked(scope, body, arrived_ns), sending))
        except ClientLeft:
            return
        except FlashdError as error:
            await sending.fail(error)
        except asyncio.CancelledError:
            # The gateway ends, and has waited for answers for as long as it does (server.py).
            with contextlib.suppress(FlashdError):  # of an answer that cannot say so: it is cut, as its client notices
                await sending.fail(Unavailable("the gateway was stopped during the answer", hint="ask again"))

    async def _answered(self, asked: Asked, sending: Sending) -> None:
        try:
            if keep_alive := asked.header(HEADER):
                KEEP_ALIVE.set(seconds(keep_alive))
            await self._answer(asked, sending)
        except FlashdError:
            raise
        except Exception as error:
            log.exception("a request could not be answered")
            raise Internal("the gateway could not answer", hint="the gateway's log has more") from error


async def whole(response: ClientResponse) -> dict[str, Any]:
    """An engine's answer that is one object. Raises Refused if it is a refusal, or EngineFailed."""
    await check_status(response)
    body = await _read(response, _MOST_ANSWER_BYTES)
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise EngineFailed("the engine's answer is not a JSON object", hint="see the engine's log for the reason")
    return found


async def chunks(response: ClientResponse) -> AsyncGenerator[Chunk, None]:
    """The pieces of an engine's streamed answer, as they come. Raises like `whole`."""
    await check_status(response)
    reader = ChunkReader()
    try:
        async for received in pieces(response):
            for chunk in reader.feed(received):
                yield chunk
    except (ClientError, OSError) as error:
        raise EngineFailed("the engine ended in the middle of its answer", hint="ask again") from error
    reader.end()


async def check_status(response: ClientResponse) -> None:
    """Raises Refused if an engine's answer is a refusal."""
    if response.status < HTTPStatus.BAD_REQUEST:
        return
    body = await _read(response, _MOST_REFUSAL_BYTES)
    try:
        found = json.loads(body)
        error = found.get("error", found)
    except (ValueError, RecursionError, AttributeError):
        error = body.decode(errors="replace")[:_SHOWN]
    raise refused(error, response.status)


async def _read(response: ClientResponse, most_bytes: int) -> bytes:
    found = bytearray()
    try:
        async for received in pieces(response):
            found += received
            if len(found) > most_bytes:
                raise EngineFailed(f"the engine's answer is longer than {format_bytes(most_bytes)}")
    except (ClientError, OSError) as error:
        raise EngineFailed("the engine ended in the middle of its answer", hint="ask again") from error
    return bytes(found)
