# SPDX-License-Identifier: Apache-2.0
"""Errors of every version of vLLM's server are turned into OpenAI's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from flashd.workers.connections import Application, Message, Receive, Send
from flashd.workers.vllm.answers import Described, described

PYDANTIC = (
    "2 validation errors:\n  {'type': 'missing', 'loc': ('body', 'function-wrap[log()]', 'messages'), "
    "'msg': 'Field required', 'input': {'a': 1}}\n  {'type': 'int_parsing', 'loc': 'body.n', 'msg': 'no integer'}"
)


@pytest.mark.parametrize(
    ("status", "body", "message", "param"),
    [
        (404, b'{"detail": "Not Found"}', "there is no POST /x here", None),
        (405, b'{"error": {"message": "Method Not Allowed", "type": "t", "param": null, "code": 405}}',
         "there is no POST /x here", None),
        (500, b"Internal Server Error", "the engine could not answer; see its log", None),
        (500, b"", "the engine could not answer; see its log", None),
        (422, b'{"detail": [{"loc": ["body", "prompt"], "msg": "Field required", "type": "missing"}]}',
         "prompt: Field required", "prompt"),
        (400, json.dumps({"error": {"message": PYDANTIC, "type": "Bad Request", "code": 400}}).encode(),
         "messages: Field required; n: no integer", "messages"),
        (400, b'{"error": {"message": "max_tokens is too large", "param": "max_tokens"}}',
         "max_tokens is too large", "max_tokens"),
        (400, b'{"error": {"message": "\\"auto\\" tool choice requires --enable-auto-tool-choice and more"}}',
         "vLLM is not told how this model calls tools: set models.NAME.arguments", "tools"),
        (404, b'{"object": "error", "message": "There is no such model."}', "There is no such model.", None),
        (415, b"", "the body must be JSON, with the content type application/json", None),
        (418, b"[" * 100_000, "[", None),
    ],
)  # fmt: skip
def test_errors_say_what_was_wrong(status: int, body: bytes, message: str, param: str | None) -> None:
    error = described(status, body, "POST /x")
    assert error["message"].startswith(message) and error["param"] == param and len(error["message"]) <= 1000
    assert set(error) == {"message", "type", "param", "code"} and error["type"]


def ask(inner: Application) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    scope = {"type": "http", "method": "POST", "path": "/x"}
    asyncio.run(Described(inner)(scope, receive, send))
    return sent


def test_answers_pass_as_they_come_and_errors_in_one_piece() -> None:
    async def well(scope: Message, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})

    assert [message.get("body") for message in ask(well)] == [None, b"a", b"b"]

    async def ill(scope: Message, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"4"), (b"content-type", b"text/plain"), (b"x-request-id", b"7")]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": b"Not ", "more_body": True})
        await send({"type": "http.response.body", "body": b"Found"})

    start, body = ask(ill)
    headers = dict(start["headers"])
    assert start["status"] == 404 and headers[b"x-request-id"] == b"7"
    assert headers[b"content-type"] == b"application/json" and int(headers[b"content-length"]) == len(body["body"])
    assert json.loads(body["body"])["error"]["message"] == "there is no POST /x here"


def test_an_exception_is_an_error_object_unless_the_answer_has_begun() -> None:
    async def raises(*_: Any) -> None:
        raise ValueError("secret")

    start, body = ask(raises)
    assert start["status"] == 500 and b"secret" not in body["body"]
    assert json.loads(body["body"])["error"]["type"] == "server_error"

    async def late(scope: Message, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("secret")

    with pytest.raises(ValueError, match="secret"):
        ask(late)
