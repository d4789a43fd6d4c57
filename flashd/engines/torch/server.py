# SPDX-License-Identifier: Apache-2.0
"""How do clients reach the model? OpenAI's HTTP interface on a Unix socket."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flashd.engines.gate import Gate, NotServing
from flashd.engines.torch import generation, requests
from flashd.engines.torch.model import Model
from flashd.engines.torch.requests import BadRequest, GenerationRequest

_END = object()
_AGAIN = {"Retry-After": "1", "Connection": "close"}  # by the endpoint, which may lead elsewhere now


@dataclass(slots=True)
class Bound:
    """What the engine holds now; changed only while the gate is shut."""

    model: Model
    model_name: str
    names: frozenset[str]
    since: int


class Server:
    """The HTTP application. `turns` is an executor of one thread: one generation at a time."""

    def __init__(self, gate: Gate, turns: Executor, max_tokens_default: int) -> None:
        self.gate = gate
        self.bound: Bound | None = None
        self._turns = turns
        self._max_tokens_default = max_tokens_default

    def application(self) -> Starlette:
        routes = [
            Route("/health", self._guarded(self._health)),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._completion), methods=["POST"]),
            Route("/v1/embeddings", self._guarded(self._embeddings), methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={404: _not_found, 405: _not_found})

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except BadRequest as error:
                return _error(error.status, error.message, "invalid_request_error", error.param, error.code)
            except NotServing as error:
                return _error(503, str(error), "service_unavailable", None, "not_serving", _AGAIN)
            except ClientDisconnect:
                return Response(status_code=499)

        return guarded

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "active_requests": self.gate.active})

    async def _models(self, _: Request) -> Response:
        entries = [] if self.bound is None else [self._entry(self.bound)]
        return JSONResponse({"object": "list", "data": entries})

    @staticmethod
    def _entry(bound: Bound) -> dict[str, Any]:
        return {"id": bound.model_name, "object": "model", "created": bound.since, "owned_by": "flashd"}

    async def _chat(self, request: Request) -> Response:
        asked = requests.chat_request(await _body(request), self._max_tokens_default)
        return await self._generate(request, asked, _ChatShape())

    async def _completion(self, request: Request) -> Response:
        asked = requests.completion_request(await _body(request), self._max_tokens_default)
        return await self._generate(request, asked, _TextShape())

    async def _embeddings(self, request: Request) -> Response:
        name, texts = requests.embedding_inputs(await _body(request))
        async with self.gate.passage():
            bound = self._bound_as(name)
            loop = asyncio.get_running_loop()
            vectors, count = await loop.run_in_executor(self._turns, generation.embed, bound.model, texts)
        data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": bound.model_name, "usage": usage})

    async def _generate(self, request: Request, asked: GenerationRequest, shape: _Shape) -> Response:
        async with AsyncExitStack() as stack:
            cut = await stack.enter_async_context(self.gate.passage())
            bound = self._bound_as(asked.model)
            if not bound.model.can_generate:
                raise BadRequest(f"{bound.model_name} does not generate text: it has embeddings (/v1/embeddings)")
            tokens = generation.prompt_tokens(bound.model, asked)
            stack.callback(cut.set)  # whoever leaves, leaves no generation behind
            if asked.stream:
                pieces = self._pieces(bound, asked, tokens, cut)
                # The passage lasts as long as the stream, which outlives this function.
                events = _events(pieces, shape, bound.model_name, asked.include_usage, stack.pop_all())
                return StreamingResponse(events, media_type="text/event-stream")
            text, ended = "", None
            watch = asyncio.create_task(_cut_on_disconnect(request, cut))
            try:
                async for piece in self._pieces(bound, asked, tokens, cut):
                    if isinstance(piece, generation.Ended):
                        ended = piece
                    else:
                        text += piece
            finally:
                watch.cancel()
            assert ended is not None
            if ended.reason == "cut":
                raise NotServing("the request was cut short by a swap")
            return JSONResponse(shape.whole(bound.model_name, text, ended))

    async def _pieces(
        self, bound: Bound, asked: GenerationRequest, tokens: list[int], cut: threading.Event
    ) -> AsyncGenerator[str | generation.Ended, None]:
        """The text as it grows, then how it ended. Raises what the generation raised."""
        loop = asyncio.get_running_loop()
        grown: asyncio.Queue[Any] = asyncio.Queue()

        def emit(piece: object) -> None:
            loop.call_soon_threadsafe(grown.put_nowait, piece)

        work = partial(generation.generate, bound.model, asked, tokens, emit, cut)
        ended = loop.run_in_executor(self._turns, work)
        self.gate.track(ended, cut)
        ended.add_done_callback(lambda _: grown.put_nowait(_END))
        try:
            while (piece := await grown.get()) is not _END:
                yield piece
            yield await ended
        finally:
            cut.set()

    def _bound_as(self, name: str) -> Bound:
        bound = self.bound
        if bound is None:
            raise NotServing("this engine holds no model")
        if name and name not in bound.names:
            message = (
                f"the model {name!r} is not active ({bound.model_name!r} is): swap to it first (flash swap {name})"
            )
            raise BadRequest(message, param="model", status=404, code="model_not_found")
        return bound


class _Shape:
    """How OpenAI writes answers of one kind."""

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self) -> None:
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def choice(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, text: str, *, first: bool) -> dict[str, Any]:
        raise NotImplementedError

    def whole(self, model_name: str, text: str, ended: generation.Ended) -> dict[str, Any]:
        choice = {"index": 0, **self.choice(text), "logprobs": None, "finish_reason": ended.reason}
        return {**self._head(self.whole_object, model_name), "choices": [choice], "usage": usage(ended)}

    def chunk(self, model_name: str, text: str, *, first: bool, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, **self.delta(text, first=first), "finish_reason": reason}
        return {**self._head(self.chunk_object, model_name), "choices": [choice]}

    def last(self, model_name: str, ended: generation.Ended) -> dict[str, Any]:
        return {**self._head(self.chunk_object, model_name), "choices": [], "usage": usage(ended)}

    def _head(self, kind: str, model_name: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": model_name}


class _ChatShape(_Shape):
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def delta(self, text: str, *, first: bool) -> dict[str, Any]:
        return {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text else {})}


class _TextShape(_Shape):
    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str, *, first: bool) -> dict[str, Any]:  # noqa: ARG002
        return {"text": text}


def usage(ended: generation.Ended) -> dict[str, int]:
    total = ended.prompt_tokens + ended.completion_tokens
    return {"prompt_tokens": ended.prompt_tokens, "completion_tokens": ended.completion_tokens, "total_tokens": total}


async def _events(
    pieces: AsyncGenerator[str | generation.Ended, None],
    shape: _Shape,
    model_name: str,
    include_usage: bool,
    passage: AsyncExitStack,
) -> AsyncIterator[str]:
    """Server-sent events, as OpenAI streams them."""
    async with passage, aclosing(pieces):
        first = True
        async for piece in pieces:
            if not isinstance(piece, generation.Ended):
                yield _event(shape.chunk(model_name, piece, first=first))
                first = False
            elif piece.reason == "cut":
                yield _event(
                    {"error": {"message": "the request was cut short by a swap", "type": "service_unavailable"}}
                )
            else:
                yield _event(shape.chunk(model_name, "", first=first, reason=piece.reason))
                if include_usage:
                    yield _event(shape.last(model_name, piece))
        yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _body(request: Request) -> dict[str, Any]:
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > requests.MAX_BODY_BYTES:
            raise BadRequest(f"the body is larger than {requests.MAX_BODY_BYTES >> 20} MiB", status=413)
    return requests.parse_body(bytes(raw))


async def _cut_on_disconnect(request: Request, cut: threading.Event) -> None:
    while not await request.is_disconnected():  # noqa: ASYNC110 -- starlette offers no event for it
        await asyncio.sleep(0.1)
    cut.set()


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return _error(status, f"there is no {request.method} {request.url.path} here", "invalid_request_error", None, None)


def _error(
    status: int,
    message: str,
    kind: str,
    param: str | None,
    code: str | None,
    headers: dict[str, str] | None = None,
) -> Response:
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status_code=status, headers=headers)
