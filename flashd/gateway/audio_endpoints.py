# SPDX-License-Identifier: Apache-2.0
"""OpenAI's transcriptions and translations of recordings, whose requests are forms."""

from __future__ import annotations

import asyncio

from flashd.client.results import Engine
from flashd.errors import Unsupported
from flashd.gateway.answering import Asked, Sending
from flashd.gateway.dispatch import Dispatcher, EngineRequest, run_by_vllm
from flashd.gateway.exchange import forwarded
from flashd.gateway.forms import Form, parse_form
from flashd.gateway.passed import OF_THE_GATEWAY, named, pass_back
from flashd.units import MiB

PATHS = ("/v1/audio/transcriptions", "/v1/audio/translations")
_FIELDS = frozenset({"model", "stream"})
_SPEAKS_IT = frozenset({"vllm"})  # kinds of engines
_LARGE_BYTES = MiB  # above, other requests would notice the time that it takes
_YES = frozenset({"true", "1", "on", "yes"})  # as vLLM reads a form


class AudioEndpoints:
    """What answers `PATHS`. The recording is passed on as it came."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def __call__(self, asked: Asked, send: Sending) -> None:
        form = await _read(asked)
        wanted = await named({"model": form.value("model")}, self._dispatcher)
        send.is_stream = form.value("stream").lower() in _YES
        headers = forwarded(asked.scope["headers"], without=OF_THE_GATEWAY)
        request = EngineRequest("POST", asked.target, headers, form.with_value("model", wanted.name))

        def made(engine: Engine) -> EngineRequest:
            if engine.kind not in _SPEAKS_IT:
                what = f"{wanted.model} is in a {engine.kind} engine, which hears no recordings"
                raise Unsupported(what, hint=run_by_vllm(wanted.model, engine.kind))
            return request

        async with self._dispatcher.answer(wanted, made) as response:
            await pass_back(response, send)


async def _read(asked: Asked) -> Form:
    content_type = next((value for name, value in asked.scope["headers"] if name == b"content-type"), b"")
    arguments = content_type.decode("latin-1"), asked.body, _FIELDS
    if len(asked.body) > _LARGE_BYTES:
        return await asyncio.to_thread(parse_form, *arguments)
    return parse_form(*arguments)
