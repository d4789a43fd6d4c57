# SPDX-License-Identifier: Apache-2.0
"""The HTTP application of a llama.cpp engine: passes requests on to llama-server, under the model's own name.

Only what the model answers is passed on; llama-server's other endpoints read and write files, or change its settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientResponse, ClientSession, ClientTimeout, DummyCookieJar, UnixConnector
from aiohttp.client_exceptions import ClientError

from flashd.workers.connections import Message, Receive, Send
from flashd.workers.gate import Gate, NotServing

# Paths here, and those of llama-server.
_PASSED: Mapping[str, str] = {
    "/v1/chat/completions": "/v1/chat/completions",
    "/v1/completions": "/v1/completions",
    "/v1/embeddings": "/v1/embeddings",
    "/v1/messages": "/v1/messages",
    "/v1/messages/count_tokens": "/v1/messages/count_tokens",
    "/v1/responses": "/v1/responses",
    "/v1/rerank": "/v1/rerank",
    "/rerank": "/v1/rerank",
}
_TOKENIZE, _DETOKENIZE = "/tokenize", "/detokenize"
_OF_POST = {*_PASSED, _TOKENIZE, _DETOKENIZE}
_UNKNOWN_FIELDS = ("prompt_logprobs",)  # which vLLM's clients send, and llama-server would ignore
_UNSUPPORTED = "not supported"  # in what it says, with status 500, of pictures to a model that does not see
_SHOWN = 200  # characters of what a client made up
_MOST_ERROR_BYTES = 1 << 20
_CONNECT_S = 5.0


class _Refused(Exception):
    """Raised with OpenAI's error object for a request."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


@dataclass(slots=True)
class Bound:
    """The model that requests are for. `session` leads to the llama-server that has it."""

    model_name: str
    names: frozenset[str]
    context_length: int
    session: ClientSession
    since: int = field(default_factory=lambda: int(time.time()))


def session_to(address: str) -> ClientSession:
    """Opens connections to a llama-server. Must be called on the event loop."""
    return ClientSession(
        # llama-server closes what is kept after some seconds or requests, perhaps when the next one is on its way.
        connector=UnixConnector(address, limit=0, force_close=True),
        timeout=ClientTimeout(total=None, sock_connect=_CONNECT_S),
        cookie_jar=DummyCookieJar(),
    )


class Proxy:
    """An ASGI application. `bound` changes only while the gate is shut."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.bound: Bound | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            await self._answer(scope, receive, send)
        except (_Refused, RecursionError) as refused:
            error = refused if isinstance(refused, _Refused) else _Refused(400, "the body is nested too deeply")
            kind = "server_error" if error.status >= 500 else "invalid_request_error"
            described = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
            await _send_json(send, {"error": described}, error.status)

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        path, method = str(scope["path"]), str(scope["method"])
        if path == "/health":
            await _send_json(send, {"status": "ok", "active_requests": self._gate.active})
        elif path == "/v1/models":
            await _send_json(send, {"object": "list", "data": self._listed()})
        elif path not in _OF_POST or method != "POST":
            answers = ": it answers POST" if path in _OF_POST else ""
            raise _Refused(405 if answers else 404, f"there is no {method} {path[:_SHOWN]} here{answers}")
        else:
            body, bound = _object(await _body(receive)), self._bound()
            _check_name(body, bound)
            if asked := [name for name in _UNKNOWN_FIELDS if body.get(name) is not None]:
                raise _Refused(400, f"llama.cpp does not support {asked[0]}", param=asked[0])
            if path in _PASSED:
                await _pass_on(bound, _PASSED[path], {**body, "model": bound.model_name}, receive, send)
            else:
                count = _tokens if path == _TOKENIZE else _text
                await _send_json(send, await count(bound, body))

    def _bound(self) -> Bound:
        if self.bound is None:
            raise NotServing("this engine holds no model")
        return self.bound

    def _listed(self) -> list[dict[str, object]]:
        if self.bound is None:
            return []
        made = self.bound.since
        return [{"id": self.bound.model_name, "object": "model", "created": made, "owned_by": "flashd"}]


async def _tokens(bound: Bound, body: Mapping[str, Any]) -> Mapping[str, object]:
    """Counts the tokens of a text or a chat. Requests and answers are like vLLM's."""
    text, adds = body.get("prompt"), body.get("add_special_tokens", True)
    if "messages" in body:
        asked = {"messages": body["messages"], "tools": body.get("tools", [])}
        text, adds = (
            (await _asked(bound, "/apply-template", asked)).get("prompt"),
            body.get("add_special_tokens", False),
        )
    if not isinstance(text, str):
        raise _Refused(400, "it needs a prompt, which is a text, or messages", param="prompt")
    content = {"content": text, "add_special": bool(adds), "parse_special": True}
    tokens = (await _asked(bound, "/tokenize", content)).get("tokens")
    found = tokens if isinstance(tokens, list) else []
    return {"count": len(found), "max_model_len": bound.context_length, "tokens": found}


async def _text(bound: Bound, body: Mapping[str, Any]) -> Mapping[str, object]:
    """Returns the text of tokens. Requests and answers are like vLLM's."""
    answer = await _asked(bound, "/detokenize", {"tokens": body.get("tokens")})
    return {"prompt": answer.get("content", "")}


async def _asked(bound: Bound, path: str, content: Mapping[str, object]) -> Mapping[str, Any]:
    async with _answer_of(bound, path, content) as answer:
        if answer.status != 200:
            raise await _refusal(answer)
        return _object(await answer.read())


async def _pass_on(bound: Bound, path: str, body: Mapping[str, object], receive: Receive, send: Send) -> None:
    """Passes a request on, and its answer back piece by piece. A client that leaves ends it."""
    sending = asyncio.ensure_future(_send_answer(bound, path, body, send))
    left = asyncio.ensure_future(_until_left(receive))
    try:
        await asyncio.wait({sending, left}, return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            sending.result()
    finally:
        for task in (sending, left):
            task.cancel()
        await asyncio.wait({sending, left})


async def _send_answer(bound: Bound, path: str, body: Mapping[str, object], send: Send) -> None:
    async with _answer_of(bound, path, body) as answer:
        if answer.status != 200:
            raise await _refusal(answer)
        headers = [(b"content-type", answer.headers.get("Content-Type", "application/json").encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for piece in answer.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except ClientError as error:  # the connection ends, so that no client takes half an answer for a whole one
            raise RuntimeError(f"llama-server ended before its answer did: {error}") from None
        await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def _answer_of(bound: Bound, path: str, body: Mapping[str, object]) -> AsyncIterator[ClientResponse]:
    """The answer of llama-server. Leaving the block before its end closes the connection, which ends a generation."""
    raw = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    headers = {"Content-Type": "application/json"}
    try:
        async with bound.session.post(f"http://llama{path}", data=raw, headers=headers) as answer:
            try:
                yield answer
            finally:
                if not answer.content.at_eof():
                    answer.close()
    except (ClientError, OSError) as error:
        raise _Refused(500, f"llama-server does not answer: {error}"[:_SHOWN]) from None


async def _refusal(answer: ClientResponse) -> _Refused:
    """Describes an error of llama-server."""
    raw = await answer.content.read(_MOST_ERROR_BYTES)
    try:
        said = json.loads(raw)["error"]
        message = str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, RecursionError, KeyError, TypeError):
        message = f"llama-server refuses it, with status {answer.status}"
    status = 400 if answer.status == 500 and _UNSUPPORTED in message else answer.status
    return _Refused(status, " ".join(message.split())[:1000])


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(receive: Receive) -> bytes:
    """The whole body, whose size the guard before us has limited."""
    raw = bytearray()
    while True:
        message = await receive()
        raw += message.get("body", b"")
        if message["type"] != "http.request" or not message.get("more_body", False):
            return bytes(raw)


def _object(raw: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise _Refused(400, "the body is not valid JSON") from None
    if not isinstance(found, dict):
        raise _Refused(400, "the body is not a JSON object")
    return found


def _check_name(body: Mapping[str, Any], bound: Bound) -> None:
    name = body.get("model", "")
    if not isinstance(name, str):
        raise _Refused(400, "model must be a text", param="model")
    if name and name not in bound.names:
        message = f"the model {name[:_SHOWN]!r} is not served here: {bound.model_name!r} is"
        raise _Refused(404, message, param="model", code="model_not_found")


async def _send_json(send: Send, content: Mapping[str, object], status: int = 200) -> None:
    raw = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})
