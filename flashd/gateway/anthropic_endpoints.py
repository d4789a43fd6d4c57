# SPDX-License-Identifier: Apache-2.0
"""Anthropic's interface: engines that have it answer themselves; for others, requests and answers are translated."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import ClientResponse

from flashd.gateway.answering import Asked, Sending, check_status, whole
from flashd.gateway.dialects import anthropic
from flashd.gateway.dialects.anthropic import MessageAnswer, PassedEvents, chat_request, count_request
from flashd.gateway.dialects.chunks import Usage, usage
from flashd.gateway.dispatch import Dispatcher
from flashd.gateway.exchange import parse_object, pieces
from flashd.gateway.passed import named, pass_back, passed_on
from flashd.gateway.translated import Made, send_translated
from flashd.gateway.waiting import Waiting


class AnthropicEndpoints:
    """What answers /v1/messages and /v1/messages/count_tokens."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def messages(self, asked: Asked, send: Sending) -> None:
        content = parse_object(asked.body)
        wanted = await named(content, self._dispatcher)
        made = Made(passed_on(asked, content, wanted), lambda: chat_request(content, wanted.name).body)
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
            await send_translated(response, answer, send)

    async def count_tokens(self, asked: Asked, send: Sending) -> None:
        content = parse_object(asked.body)
        wanted = await named(content, self._dispatcher)
        made = Made(passed_on(asked, content, wanted), lambda: count_request(content, wanted.name))
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
