# SPDX-License-Identifier: Apache-2.0
"""Requests in dialects that some engines speak themselves, and that are translated to chat completions for others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Protocol

from aiohttp import ClientResponse

from flashd.client.results import Engine
from flashd.gateway.answering import Sending, chunks
from flashd.gateway.dialects.chunks import Chunk
from flashd.gateway.dialects.openai import CHAT_PATH
from flashd.gateway.dispatch import EngineRequest
from flashd.gateway.waiting import EVENTS

_SPEAK_ALL = frozenset({"vllm", "llama.cpp"})  # kinds of engines


class Made:
    """Makes the request that suits the engine, which is known only when the model's turn has come."""

    def __init__(self, passed: EngineRequest, translate: Callable[[], Mapping[str, Any]]) -> None:
        self._passed = passed
        self._translate = translate
        self.is_translated = False

    def __call__(self, engine: Engine) -> EngineRequest:
        self.is_translated = engine.kind not in _SPEAK_ALL
        if not self.is_translated:
            return self._passed
        body = json.dumps(self._translate(), separators=(",", ":")).encode()
        return EngineRequest("POST", CHAT_PATH, {"content-type": "application/json"}, body)


class Answer(Protocol):
    """An answer as it grows."""

    def take(self, chunk: Chunk) -> None:
        """Adds a piece of the engine's answer."""

    def events(self, chunk: Chunk) -> Iterator[bytes]:
        """Adds a piece, and returns the events that tell of it."""

    def last_events(self) -> Iterator[bytes]:
        """The events that tell of the end."""

    def whole(self) -> Mapping[str, Any]:
        """The answer, when it is complete."""


async def send_translated(response: ClientResponse, answer: Answer, send: Sending) -> None:
    """Sends an engine's streamed answer to a chat, whole or, if `send` is a stream, as events."""
    async with aclosing(chunks(response)) as found:
        if not send.is_stream:
            async for chunk in found:
                answer.take(chunk)
            await send.json(answer.whole())
            return
        await send.begin_stream(EVENTS)
        async for chunk in found:
            for event in answer.events(chunk):
                await send.piece(event)
        for event in answer.last_events():
            await send.piece(event)
        await send.end_stream()
