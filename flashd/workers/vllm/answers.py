# SPDX-License-Identifier: Apache-2.0
"""Turns all error answers of vLLM's server into OpenAI's error object, with clear messages.

For unknown routes, exceptions, and bodies that fail validation, vLLM answers with bare phrases, FastAPI's objects or
pydantic's text, depending on the version.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import traceback
from http import HTTPStatus

from flashd.workers.connections import Application, Message, Receive, Send

_MOST_BYTES = 1 << 20  # limit of an error's body
_MOST_CHARACTERS = 1000
_PHRASES = {status.phrase for status in HTTPStatus}
_REPLACED = {b"content-length", b"content-type", b"content-encoding"}
_OF_PYDANTIC = re.compile(r"^\d+ validation errors?\b")
_NO_PARSER = "requires --enable-auto-tool-choice"
_UNTOLD = (
    "vLLM is not told how this model calls tools: set models.NAME.arguments, such as to "
    '["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]'
)
_NO_MODEL = re.compile(r"The model `.*` does not exist", re.DOTALL)
_INTERNAL = re.compile(r"[\[\](){}-]")  # in pydantic's names for branches of a union: list[str], function-wrap[...]


class Described:
    """An ASGI application around vLLM's."""

    def __init__(self, inner: Application) -> None:
        self._inner = inner

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        answer = _Answer(scope, send)
        try:
            await self._inner(scope, receive, answer)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            if answer.has_begun:
                raise  # which ends the connection, so that clients do not take half an answer for a whole one
            await answer.fail()


class _Answer:
    """Passes on successful answers, and holds back errors until they are complete."""

    def __init__(self, scope: Message, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._error: Message | None = None
        self._body = bytearray()
        self.has_begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= HTTPStatus.BAD_REQUEST:
            self._error = message
        elif self._error is not None and message["type"] == "http.response.body":
            self._body += message.get("body", b"")[: _MOST_BYTES - len(self._body)]
            if not message.get("more_body", False):
                await self._tell(self._error, described(self._error["status"], bytes(self._body), self._asked))
        else:
            self.has_begun = True
            await self._send(message)

    async def fail(self) -> None:
        await self._tell({"type": "http.response.start", "status": 500}, described(500, b"", self._asked))

    @property
    def _asked(self) -> str:
        return f"{self._scope.get('method', '')} {str(self._scope.get('path', ''))[:200]}"

    async def _tell(self, start: Message, error: dict[str, object]) -> None:
        raw = json.dumps({"error": error}).encode()
        headers = [(name, value) for name, value in start.get("headers", ()) if name.lower() not in _REPLACED]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
        self.has_begun = True
        self._error = None
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": raw})


def described(status: int, raw: bytes, asked: str) -> dict[str, object]:
    """Returns OpenAI's error object for an answer with this status and body. `asked` is the method and the path."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = raw.decode(errors="replace").strip()
    inner = found.get("error", found) if isinstance(found, dict) else found
    known = inner if isinstance(inner, dict) else {}
    message, param = known.get("message", known.get("detail", inner)), known.get("param")
    if isinstance(message, list):  # FastAPI's
        message, param = _of_entries(message)
    elif isinstance(message, str) and _OF_PYDANTIC.match(message):
        message, param = _of_entries(_entries(message))
    if not isinstance(message, str) or not message.strip() or message.strip() in _PHRASES:
        message = _plainly(status, asked)
    if _NO_PARSER in message:
        message, param = _UNTOLD, "tools"
    if param is None and status == HTTPStatus.NOT_FOUND and _NO_MODEL.match(message):
        param = "model"  # vLLM's answers in Anthropic's form lack it
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    return {
        "message": " ".join(message.split())[:_MOST_CHARACTERS],
        "type": str(known.get("type") or kind),
        "param": param,
        "code": known.get("code"),
    }


def _plainly(status: int, asked: str) -> str:
    match status:
        case HTTPStatus.NOT_FOUND | HTTPStatus.METHOD_NOT_ALLOWED:
            return f"there is no {asked} here"
        case HTTPStatus.UNSUPPORTED_MEDIA_TYPE:
            return "the body must be JSON, with the content type application/json"
        case status if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return "the engine could not answer; see its log"
    return f"{asked} is refused, with status {status}"


def _entries(text: str) -> list[object]:
    """Parses errors printed by pydantic or vLLM, one Python dictionary per line."""
    found = []
    for line in text.splitlines()[1:]:
        try:
            found.append(ast.literal_eval(line.strip().removesuffix(",")))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return found or [{"msg": " ".join(text.splitlines()[1:])}]


def _of_entries(entries: list[object]) -> tuple[str, str | None]:
    """Describes the first few entries, and returns the field of the first one."""
    said, param = [], None
    for entry in entries[:3]:
        if isinstance(entry, dict):
            place = entry.get("loc", ())
            parts = place.split(".") if isinstance(place, str) else [str(part) for part in place]
            name = ".".join(part for part in parts if part != "body" and not _INTERNAL.search(part))
            words = str(entry.get("msg", "is invalid"))
            said.append(f"{name}: {words}" if name else words)
            param = param or name.split(".")[0] or None
    return "; ".join(dict.fromkeys(said)), param
