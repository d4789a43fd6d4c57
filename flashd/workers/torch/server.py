# SPDX-License-Identifier: Apache-2.0
"""OpenAI's HTTP interface to the model, on a Unix socket."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import threading
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flashd.workers.connections import ELSEWHERE, Message, Receive, Send
from flashd.workers.gate import Elsewhere, Gate, NotServing
from flashd.workers.torch import embedding, generation, requests
from flashd.workers.torch.model import Model
from flashd.workers.torch.requests import BadRequest, GenerationRequest

_SHOWN = 200  # characters of a name that a client made up
_FAILED = "the model could not answer"
_ELSEWHERE = {ELSEWHERE[0].decode(): ELSEWHERE[1].decode()}
_AGAIN = {"Retry-After": "1", "Connection": "close"}  # by the endpoint, which may lead to another engine now


@dataclass(slots=True)
class Bound:
    """The current binding of the engine, which changes only while the gate is shut."""

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
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="reader")  # tokenizers are not thread-safe
        self._max_tokens_default = max_tokens_default

    def application(self) -> Starlette:
        routes = [
            Route("/health", self._guarded(self._health)),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._completion), methods=["POST"]),
            Route("/v1/embeddings", self._guarded(self._embeddings), methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _not_found})

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except BadRequest as error:
                return _error(error.status, error.message, "invalid_request_error", error.param, error.code)
            except NotServing as error:
                headers = _AGAIN | (_ELSEWHERE if isinstance(error, Elsewhere) else {})
                return _error(503, str(error), "service_unavailable", None, "not_serving", headers)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:  # noqa: BLE001 -- the boundary of a request
                traceback.print_exc()
                return _error(500, _failure(error), "server_error", None, None)

        return guarded

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "active_requests": self.gate.active})

    async def _models(self, _: Request) -> Response:
        entries = [] if self.bound is None else [self._entry(self.bound)]
        return JSONResponse({"object": "list", "data": entries})

    @staticmethod
    def _entry(bound: Bound) -> dict[str, object]:
        return {"id": bound.model_name, "object": "model", "created": bound.since, "owned_by": "flashd"}

    async def _chat(self, request: Request) -> Response:
        asked = requests.chat_request(await _body(request))
        return await self._generate(request, asked, _ChatShape(asked.return_token_ids))

    async def _completion(self, request: Request) -> Response:
        asked = requests.completion_request(await _body(request))
        return await self._generate(request, asked, _TextShape(asked.return_token_ids))

    async def _embeddings(self, request: Request) -> Response:
        asked = requests.embedding_request(await _body(request))
        async with self.gate.passage() as cut:
            bound = self._bound_as(asked.model)
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(self._turns, embedding.embed, bound.model, asked)
            self.gate.track(work, cut)
            vectors, count = await work
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64(vector) if asked.is_base64 else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": bound.model_name, "usage": usage})

    async def _generate(self, request: Request, asked: GenerationRequest, shape: _Shape) -> Response:
        async with self.gate.passage() as cut, AsyncExitStack() as stack:
            bound = self._bound_as(asked.model)
            if not bound.model.can_generate:
                raise BadRequest(f"{bound.model_name} does not generate text: it has embeddings (/v1/embeddings)")
            stack.callback(cut.set)  # a client that leaves ends its generation
            # In a thread, because templates and long prompts may take long, and other requests are answered meanwhile.
            reading = asyncio.get_running_loop().run_in_executor(
                self._readers, generation.prompt_tokens, bound.model, asked
            )
            self.gate.track(reading, cut)
            tokens = await reading
            if asked.stream:
                stack.pop_all()
                pieces = self._pieces(bound, asked, tokens, cut)
                stream = _Stream(_events(pieces, shape, bound.model_name, asked.include_usage), cut)
                self.gate.track(stream.sent, cut, until_cut=True)
                return stream
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
                raise NotServing("the request was cut off by a swap")
            return JSONResponse(shape.whole(bound.model_name, text, ended))

    def _pieces(
        self, bound: Bound, asked: GenerationRequest, tokens: list[int], cut: threading.Event
    ) -> AsyncGenerator[str | generation.Ended, None]:
        """Begins a generation. Yields pieces of text, then its end. Raises the errors of the generation."""
        if cut.is_set():
            raise NotServing("the request was cut off by a swap")
        loop = asyncio.get_running_loop()
        grown: asyncio.Queue[str | None] = asyncio.Queue()

        def emit(piece: str) -> None:
            loop.call_soon_threadsafe(grown.put_nowait, piece)

        work = partial(generation.generate, bound.model, asked, tokens, self._max_tokens_default, emit, cut)
        ended = loop.run_in_executor(self._turns, work)
        self.gate.track(ended, cut)
        ended.add_done_callback(lambda _: grown.put_nowait(None))
        ended.add_done_callback(lambda ended: ended.exception())  # the event loop may have ended

        async def pieces() -> AsyncGenerator[str | generation.Ended, None]:
            try:
                while (piece := await grown.get()) is not None:
                    yield piece
                yield await ended
            finally:
                cut.set()

        return pieces()

    def _bound_as(self, name: str) -> Bound:
        bound = self.bound
        if bound is None:
            raise NotServing("this engine holds no model")
        if name and name not in bound.names:
            message = f"the model {name[:_SHOWN]!r} is not served here: {bound.model_name!r} is"
            raise BadRequest(message, param="model", status=404, code="model_not_found")
        return bound


class _Shape:
    """The form of OpenAI's answers of one kind."""

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, has_token_ids: bool) -> None:
        self._has_token_ids = has_token_ids
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def choice(self, text: str) -> dict[str, object]:
        raise NotImplementedError

    def delta(self, text: str, *, first: bool) -> dict[str, object]:
        raise NotImplementedError

    def whole(self, model_name: str, text: str, ended: generation.Ended) -> dict[str, object]:
        choice = {"index": 0, **self.choice(text), "logprobs": None, "finish_reason": ended.reason}
        choice |= _stop_reason(ended) | self._token_ids(ended)
        return {**self._head(self.whole_object, model_name), "choices": [choice], "usage": usage(ended)}

    def chunk(
        self, model_name: str, text: str, *, first: bool, ended: generation.Ended | None = None
    ) -> dict[str, object]:
        choice = {"index": 0, **self.delta(text, first=first), "finish_reason": ended.reason if ended else None}
        choice |= _stop_reason(ended) | self._token_ids(ended) if ended else {}
        return {**self._head(self.chunk_object, model_name), "choices": [choice]}

    def last(self, model_name: str, ended: generation.Ended) -> dict[str, object]:
        return {**self._head(self.chunk_object, model_name), "choices": [], "usage": usage(ended)}

    def _token_ids(self, ended: generation.Ended) -> dict[str, object]:
        """Returns the token ids of the whole answer, also at the end of a stream."""
        return {"prompt_token_ids": ended.prompt, "token_ids": ended.tokens} if self._has_token_ids else {}

    def _head(self, kind: str, model_name: str) -> dict[str, object]:
        return {"id": self._id, "object": kind, "created": self._created, "model": model_name}


class _ChatShape(_Shape):
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, object]:
        return {"message": {"role": "assistant", "content": text}}

    def delta(self, text: str, *, first: bool) -> dict[str, object]:
        return {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text else {})}


class _TextShape(_Shape):
    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def choice(self, text: str) -> dict[str, object]:
        return {"text": text}

    def delta(self, text: str, *, first: bool) -> dict[str, object]:  # noqa: ARG002
        return {"text": text}


def _stop_reason(ended: generation.Ended) -> dict[str, object]:
    """The stop text that ended the answer, named as in vLLM."""
    return {"stop_reason": ended.stopped_by} if ended.stopped_by else {}


def usage(ended: generation.Ended) -> dict[str, int]:
    total = ended.prompt_tokens + ended.completion_tokens
    return {"prompt_tokens": ended.prompt_tokens, "completion_tokens": ended.completion_tokens, "total_tokens": total}


class _Stream(StreamingResponse):  # type: ignore[misc]
    """A streamed answer. Its generation ends with it, even if the client left before it began."""

    def __init__(self, events: AsyncIterator[str], cut: threading.Event) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._cut = cut

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._cut.set()
            self.sent.set_result(None)


async def _events(
    pieces: AsyncGenerator[str | generation.Ended, None],
    shape: _Shape,
    model_name: str,
    include_usage: bool,
) -> AsyncIterator[str]:
    """Yields server-sent events in OpenAI's form."""
    async with aclosing(pieces):
        first = True
        try:
            async for piece in pieces:
                if not isinstance(piece, generation.Ended):
                    yield _event(shape.chunk(model_name, piece, first=first))
                    first = False
                elif piece.reason == "cut":
                    yield _event(_described("the request was cut off by a swap", "service_unavailable"))
                else:
                    yield _event(shape.chunk(model_name, "", first=first, ended=piece))
                    if include_usage:
                        yield _event(shape.last(model_name, piece))
        except Exception as error:  # noqa: BLE001 -- the boundary of a request
            traceback.print_exc()
            yield _event(_described(_failure(error), "server_error"))
        yield "data: [DONE]\n\n"


def _event(content: dict[str, object]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _body(request: Request) -> dict[str, object]:
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
    assert isinstance(error, HTTPException)
    path = request.url.path[:_SHOWN]
    if error.status_code == 405:
        message = f"there is no {request.method} {path} here: it answers {(error.headers or {}).get('Allow', 'GET')}"
    else:
        message = f"there is no {request.method} {path} here"
    return _error(error.status_code, message, "invalid_request_error", None, None, dict(error.headers or {}))


def _failure(error: Exception) -> str:
    """Explains a model's error in one line."""
    said = " ".join(str(error).split())[:500]
    return f"{_FAILED}: {type(error).__name__}: {said}" if said else f"{_FAILED}: {type(error).__name__}"


def _base64(vector: torch.Tensor) -> str:
    """Encodes a vector as little-endian float32 in base64, as OpenAI's clients expect."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector.tolist())).decode()


def _error(
    status: int,
    message: str,
    kind: str,
    param: str | None,
    code: str | None,
    headers: dict[str, str] | None = None,
) -> Response:
    return JSONResponse(_described(message, kind, param, code), status_code=status, headers=headers)


def _described(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
