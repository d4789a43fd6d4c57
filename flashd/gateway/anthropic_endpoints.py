# SPDX-License-Identifier: Apache-2.0
"""Anthropic's interface: engines that have it answer themselves; for others, requests and answers are translated."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from aiohttp import ClientResponse

from flashd.client.results import Engine
from flashd.gateway.answering import Asked, Sending, check_status, chunks, whole
from flashd.gateway.dialects import anthropic
from flashd.gateway.dialects.anthropic import MessageAnswer, PassedEvents, chat_request, count_request
from flashd.gateway.dialects.chunks import Usage, usage
from flashd.gateway.dialects.openai import CHAT_PATH
from flashd.gateway.dispatch import Dispatcher, EngineRequest
from flashd.gateway.exchange import parse_object, pieces
from flashd.gateway.passed import named, pass_back, passed_on
from flashd.gateway.waiting import EVENTS, Waiting

_SPEAKS_IT = frozenset({"vllm"})  # kinds of engines


class AnthropicEndpoints:
    """What answers /v1/messages and /v1/messages/count_tokens."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def messages(self, asked: Asked, send: Sending) -> None:
        content = parse_object(asked.body)
        wanted = await named(content, self._dispatcher)
        made = _Made(passed_on(asked, content, wanted), lambda: chat_request(content, wanted.name).body)
        send.is_stream = content.get("stream") is True
        async with (
            Waiting(asked, send, self._dispatcher, wanted.model, anthropic.waiting) as waiting,
            self._dispatcher.answer(wanted, made) as response,
        ):
            await waiting.over()
            await check_status(response)
            if not made.is_translated:
                await pass_back(response, send, _watched(response) if send.is_stream else None)
                return
            request = chat_request(content, wanted.name)
            answer = MessageAnswer(str(content.get("model") or wanted.name), request.stops)
            async with aclosing(chunks(response)) as found:
                if not request.is_stream:
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

    async def count_tokens(self, asked: Asked, send: Sending) -> None:
        content = parse_object(asked.body)
        wanted = await named(content, self._dispatcher)
        made = _Made(passed_on(asked, content, wanted), lambda: count_request(content, wanted.name))
        async with self._dispatcher.answer(wanted, made) as response:
            await check_status(response)
            if not made.is_translated:
                await pass_back(response, send)
                return
            counted = usage(await whole(response)) or Usage(0, 0)
            await send.json({"input_tokens": counted.prompt_tokens})


async def _watched(response: ClientResponse) -> AsyncIterator[bytes]:
    watch = PassedEvents()
    async for received in pieces(response):
        if passed := watch.feed(received):
            yield passed
    yield watch.rest()


class _Made:
    """Makes the request that suits the engine, which is known only when the model's turn has come."""

    def __init__(self, passed: EngineRequest, translate: Callable[[], Mapping[str, Any]]) -> None:
        self._passed = passed
        self._translate = translate
        self.is_translated = False

    def __call__(self, engine: Engine) -> EngineRequest:
        self.is_translated = engine.kind not in _SPEAKS_IT
        if not self.is_translated:
            return self._passed
        body = json.dumps(self._translate(), separators=(",", ":")).encode()
        return EngineRequest("POST", CHAT_PATH, {"content-type": "application/json"}, body)
