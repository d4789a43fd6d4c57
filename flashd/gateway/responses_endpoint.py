# SPDX-License-Identifier: Apache-2.0
"""OpenAI's responses: engines that have them answer themselves; for others, requests and answers are translated."""

from __future__ import annotations

from functools import partial

from flashd.gateway.answering import Asked, Sending, check_status
from flashd.gateway.dialects import openai, responses
from flashd.gateway.dialects.dialect import Refused
from flashd.gateway.dialects.responses import ResponseAnswer, chat_request
from flashd.gateway.dispatch import Dispatcher
from flashd.gateway.exchange import parse_object
from flashd.gateway.passed import named, pass_back, passed_on
from flashd.gateway.translated import Made, send_translated
from flashd.gateway.waiting import Waiting


class ResponsesEndpoint:
    """What answers /v1/responses."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def __call__(self, asked: Asked, send: Sending) -> None:
        content = parse_object(asked.body)
        wanted = await named(content, self._dispatcher)
        made = Made(passed_on(asked, content, wanted), lambda: chat_request(content, wanted.name).body)
        send.is_stream = content.get("stream") is True
        piece = partial(openai.waiting, responses.PATH, wanted.name)
        async with (
            Waiting(asked, send, self._dispatcher, wanted.model, piece) as waiting,
            self._dispatcher.answer(wanted, made) as response,
        ):
            await waiting.over()
            if not made.is_translated:
                if send.has_begun:
                    await check_status(response)
                await pass_back(response, send)
                return
            request = chat_request(content, wanted.name)
            try:
                await check_status(response)
                await send_translated(response, ResponseAnswer(wanted.name, request.read), send)
            except Refused as error:
                error.param = responses.PARAMETERS.get(error.param or "", error.param)
                raise
