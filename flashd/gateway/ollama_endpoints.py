# SPDX-License-Identifier: Apache-2.0
"""Ollama's interface: requests are translated to OpenAI's, which engines answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from flashd._version import __version__
from flashd.client.client import Client
from flashd.client.results import Engine
from flashd.errors import EngineFailed, InvalidArgument, NotAuthorized
from flashd.gateway.access import ACCESS
from flashd.gateway.answering import Asked, Sending, check_status, chunks, whole
from flashd.gateway.dialects import ollama, ollama_requests
from flashd.gateway.dialects.chunks import Chunk, Usage, usage
from flashd.gateway.dialects.fields import read_fields
from flashd.gateway.dialects.ollama_answers import Durations, Joined, OllamaAnswer
from flashd.gateway.dialects.ollama_requests import EngineBody, OllamaRequest
from flashd.gateway.directory import Connect, Wanted
from flashd.gateway.dispatch import Dispatcher, EngineRequest
from flashd.gateway.exchange import parse_object
from flashd.gateway.passed import name_in
from flashd.gateway.waiting import Waiting

NDJSON = "application/x-ndjson"
_HEADERS = {"content-type": "application/json"}


class OllamaEndpoints:
    """What answers the paths under /api."""

    def __init__(self, dispatcher: Dispatcher, connect: Connect) -> None:
        self._dispatcher = dispatcher
        self._connect = connect

    async def version(self, _: Asked, send: Sending) -> None:
        await send.json({"version": ollama.SPEAKS, "flashd": __version__})

    async def tags(self, _: Asked, send: Sending) -> None:
        await send.json({"models": [ollama.tag(*each) for each in self._dispatcher.directory.listed()]})

    async def ps(self, _: Asked, send: Sending) -> None:
        known = self._dispatcher.directory
        serving = [engine for engine in known.engines.values() if engine.state == "serving"]
        found = [(known.models.get(engine.model), engine) for engine in serving]
        await send.json({"models": [ollama.running(model, engine) for model, engine in found if model is not None]})

    async def show(self, asked: Asked, send: Sending) -> None:
        content = parse_object(asked.body)
        read_fields(content, ollama_requests.SHOW, "/api/show")
        await send.json(ollama.shown(*await self._dispatcher.described(_name(content))))

    async def chat(self, asked: Asked, send: Sending) -> None:
        await self._generate(asked, send, ollama_requests.chat)

    async def generate(self, asked: Asked, send: Sending) -> None:
        await self._generate(asked, send, ollama_requests.generate)

    async def embed(self, asked: Asked, send: Sending) -> None:
        content = parse_object(asked.body)
        durations = Durations(asked.arrived_ns)
        vectors, counted = await self._vectors(content, ollama_requests.embed(content), durations)
        said = {"model": _name(content), "embeddings": vectors, **durations.whole()}
        await send.json(said | {"prompt_eval_count": counted.prompt_tokens})

    async def embeddings(self, asked: Asked, send: Sending) -> None:
        content = parse_object(asked.body)
        request = ollama_requests.embeddings(content)
        vectors, _ = await self._vectors(content, request, Durations(asked.arrived_ns))
        await send.json({"embedding": vectors[0] if vectors else []})

    async def pull(self, asked: Asked, send: Sending) -> None:
        self._check_may_change()
        content = parse_object(asked.body)
        streams = read_fields(content, ollama_requests.PULL, "/api/pull").get("stream", True)
        name = _name(content)
        if not name:
            raise InvalidArgument("`model` is missing", hint="name a repository of the hub, such as Qwen/Qwen3-0.6B")
        repository = ollama.repository(name)
        async with self._dispatcher.pulls.joined(repository) as pull, aclosing(pull.steps()) as steps:
            if streams:
                await send.begin_stream(NDJSON)
                await send.piece(ollama.line({"status": "pulling manifest"}))
            async for progress in steps:
                if streams:
                    said = ollama.pulled(repository, progress.done_bytes, progress.total_bytes)
                    await send.piece(ollama.line(said))
        if streams:
            await send.piece(ollama.line({"status": "success"}))
            await send.end_stream()
        else:
            await send.json({"status": "success"})

    async def delete(self, asked: Asked, send: Sending) -> None:
        self._check_may_change()
        content = parse_object(asked.body)
        read_fields(content, ollama_requests.DELETE, "/api/delete")
        if not _name(content):
            raise InvalidArgument("`model` is missing", hint="GET /api/tags lists the models")
        model = await self._dispatcher.resolve(_name(content))
        await self._dispatcher.unload(model.name)  # as Ollama does; one that is still asked is refused
        await asyncio.to_thread(self._with_client, lambda client: client.remove(model.name))
        await send.json({})

    def _check_may_change(self) -> None:
        if hint := ACCESS.get().cannot_change_models(self._dispatcher.settings):
            raise NotAuthorized("models cannot be pulled or deleted at this address", hint=hint)

    async def _generate(
        self, asked: Asked, send: Sending, translate: Callable[[Mapping[str, object]], OllamaRequest]
    ) -> None:
        content = parse_object(asked.body)
        request, wanted = translate(content), await self._wanted(content)
        durations = Durations(asked.arrived_ns)
        answer = OllamaAnswer(_name(content) or wanted.name, translate is ollama_requests.chat, durations)
        if request.asks is None:
            await self._load(wanted, request)
            await send.json(answer.ended("unload" if request.unloads else "load"))
            return
        request.keep()
        made = self._made(request.asks, wanted.name, durations)
        send.is_stream = request.is_stream
        async with (
            Waiting(asked, send, self._dispatcher, wanted.model, answer.waiting, NDJSON) as waiting,
            self._dispatcher.answer(wanted, made) as response,
        ):
            await waiting.over()
            await check_status(response)
            async with aclosing(chunks(response)) as found:
                await (_stream if request.is_stream else _join)(found, answer, send)

    async def _vectors(
        self, content: Mapping[str, object], request: OllamaRequest, durations: Durations
    ) -> tuple[list[Any], Usage]:
        wanted = await self._wanted(content)
        if request.asks is None:
            await self._load(wanted, request)
            return [], Usage(0, 0)
        request.keep()
        async with self._dispatcher.answer(wanted, self._made(request.asks, wanted.name, durations)) as response:
            found = await whole(response)
        try:
            vectors = [entry["embedding"] for entry in sorted(found["data"], key=lambda entry: entry["index"])]
        except (KeyError, TypeError):
            raise EngineFailed("the engine's answer has no embeddings", hint="see the engine's log") from None
        return vectors, usage(found) or Usage(0, 0)

    async def _load(self, wanted: Wanted, request: OllamaRequest) -> None:
        """Has the model serve, or cease to."""
        if request.unloads:
            await self._dispatcher.unload(wanted.model)
        else:
            request.keep()
            await self._dispatcher.load(wanted)

    def _with_client(self, do: Callable[[Client], None]) -> None:
        """Runs in a thread, on a connection of its own."""
        with self._connect(True) as client:
            do(client)

    async def _wanted(self, content: Mapping[str, object]) -> Wanted:
        return await self._dispatcher.wanted(_name(content))

    @staticmethod
    def _made(asks: EngineBody, name: str, durations: Durations) -> Callable[[Engine], EngineRequest]:
        def made(_: Engine) -> EngineRequest:
            durations.note_asked()
            return EngineRequest("POST", asks.path, _HEADERS, asks.raw(name))

        return made


async def _stream(found: AsyncIterator[Chunk], answer: OllamaAnswer, send: Sending) -> None:
    await send.begin_stream(NDJSON)
    async for chunk in found:
        for line in answer.lines(chunk):
            await send.piece(ollama.line(line))
    for line in answer.last_lines():
        await send.piece(ollama.line(line))
    await send.end_stream()


async def _join(found: AsyncIterator[Chunk], answer: OllamaAnswer, send: Sending) -> None:
    joined = Joined()
    async for chunk in found:
        for line in answer.lines(chunk):
            joined.add(line)
    for line in answer.last_lines():
        joined.add(line)
    await send.json(joined.whole())


def _name(content: Mapping[str, object]) -> str:
    """The model as the request names it, with which its answer names it."""
    return name_in(content, "model" if content.get("model") else "name")
