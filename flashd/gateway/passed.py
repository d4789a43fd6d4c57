# SPDX-License-Identifier: Apache-2.0
"""Requests that an engine answers itself: the answer is passed through byte for byte."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

from aiohttp import ClientError, ClientResponse

from flashd.client.results import Engine
from flashd.errors import EngineFailed, InvalidArgument, Unsupported
from flashd.gateway import keep_alive, waiting
from flashd.gateway.answering import Asked, Sending, check_status
from flashd.gateway.dialects import openai
from flashd.gateway.directory import Wanted
from flashd.gateway.dispatch import Dispatcher, EngineRequest, run_by_vllm
from flashd.gateway.exchange import forwarded, parse_object, relay
from flashd.gateway.waiting import Waiting

OF_THE_GATEWAY = frozenset({b"authorization", b"x-api-key", keep_alive.HEADER, waiting.HEADER})  # are not for engines

_ANSWERS_ALL = frozenset({"vllm"})  # kinds of engines
_STREAMS = frozenset({"/v1/chat/completions", "/v1/completions"})


class Passed:
    """A request whose body names a model."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def __call__(self, asked: Asked, send: Sending) -> None:
        content = parse_object(asked.body)
        wanted = await named(content, self._dispatcher)
        send.is_stream = content.get("stream") is True and asked.scope["path"] in _STREAMS
        request = passed_on(asked, content, wanted)
        piece = partial(openai.waiting, asked.scope["path"], wanted.name)
        kind = ""

        def made(engine: Engine) -> EngineRequest:
            nonlocal kind
            kind = engine.kind
            return request

        async with (
            Waiting(asked, send, self._dispatcher, wanted.model, piece) as wait,
            self._dispatcher.answer(wanted, made) as response,
        ):
            await wait.over()
            if await _is_unknown(response):
                raise _without(asked.scope["path"], wanted.model, kind)
            if send.has_begun:
                await check_status(response)
            await pass_back(response, send)


def _without(path: str, model: str, kind: str) -> Unsupported:
    """The error of a model whose engine, of this kind, has no such path."""
    if kind in _ANSWERS_ALL:
        hint = "that is for models of another kind, such as those that embed, rank or write"
        return Unsupported(f"{model} does not answer {path}", hint=hint)
    return Unsupported(f"{model} is in a {kind} engine, which does not answer {path}", hint=run_by_vllm(model, kind))


async def _is_unknown(response: ClientResponse) -> bool:
    """True for the refusal of an engine that has no such path. The body can be read again."""
    if response.status != HTTPStatus.NOT_FOUND:
        return False
    with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError, ClientError):
        return not json.loads(await response.read())["error"].get("param")  # which is the model if that is not there
    return False


async def named(content: Mapping[str, object], dispatcher: Dispatcher, field: str = "model") -> Wanted:
    """What is to answer a request. Raises InvalidArgument, or NotFound."""
    return await dispatcher.wanted(name_in(content, field))


def name_in(content: Mapping[str, object], field: str = "model") -> str:
    """The model as a request names it. Raises InvalidArgument."""
    name = content.get(field) or ""
    if not isinstance(name, str):
        raise InvalidArgument(f"`{field}` is not a string", hint="GET /v1/models lists the models")
    return name


def passed_on(asked: Asked, content: Mapping[str, Any], wanted: Wanted) -> EngineRequest:
    """The request as it came, but that it names its model as the engine does.

    It always names one: an engine that serves another model by the time it comes would answer a request without.
    """
    body = asked.body
    if content.get("model") != wanted.name:  # aliases may be newer than the engine's
        body = json.dumps({**content, "model": wanted.name}).encode()
    headers = forwarded(asked.scope["headers"], without=OF_THE_GATEWAY)
    return EngineRequest(asked.scope["method"], asked.target, headers, body)


async def pass_back(response: ClientResponse, send: Sending, body: AsyncIterator[bytes] | None = None) -> None:
    """Passes an answer on like `relay`. Raises EngineFailed if the engine ends before its answer does."""
    try:
        await relay(response, send, body)
    except (ClientError, OSError) as error:
        raise EngineFailed("the engine ended in the middle of its answer", hint="ask again") from error
