# SPDX-License-Identifier: Apache-2.0
"""A client for OpenAI's HTTP interface over the Unix socket of flashd's endpoint.

An endpoint is the path of that socket, or a function that opens a connection, for users who may not open the socket.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPResponse, IncompleteRead
from typing import Any

from flashd.errors import Busy, EngineFailed, InvalidArgument, NotFound, Unavailable
from flashd.units import KiB, MiB, format_bytes

Message = Mapping[str, str]
Endpoint = str | Callable[[], socket.socket]
CONNECT_S = 5.0
# Limits, because an engine runs third-party code and is not trusted with our memory.
MOST_ANSWER_BYTES = 256 * MiB  # enough for thousands of embeddings as text
MOST_EVENT_BYTES = 16 * MiB
_MOST_REFUSAL_BYTES = 64 * KiB
_READ_BYTES = 64 * KiB
_STREAM_ENDS = b"[DONE]"


def chat(endpoint: Endpoint, model: str, messages: Sequence[Message], **parameters: object) -> str:
    """Returns the answer to a conversation. `parameters` are OpenAI's: temperature, max_tokens, stop, seed, ..."""
    return "".join(stream_chat(endpoint, model, messages, **parameters))


def stream_chat(endpoint: Endpoint, model: str, messages: Sequence[Message], **parameters: object) -> Iterator[str]:
    """Yields the answer piece by piece. Leaving the loop early ends the generation."""
    body = {"model": model, "messages": list(messages), "stream": True, **parameters}
    for event in _events(endpoint, "/v1/chat/completions", body):
        for choice in event.get("choices", []):
            if text := choice.get("delta", {}).get("content"):
                yield text


def stream_completion(endpoint: Endpoint, model: str, prompt: str, **parameters: object) -> Iterator[str]:
    """Yields the continuation of a text piece by piece, for models without a chat template."""
    body = {"model": model, "prompt": prompt, "stream": True, **parameters}
    for event in _events(endpoint, "/v1/completions", body):
        for choice in event.get("choices", []):
            if text := choice.get("text"):
                yield text


def embeddings(endpoint: Endpoint, model: str, texts: Sequence[str]) -> list[list[float]]:
    """Returns one vector for each text."""
    found = ask(endpoint, "/v1/embeddings", {"model": model, "input": list(texts)})
    return [entry["embedding"] for entry in found["data"]]


def models(endpoint: Endpoint) -> list[dict[str, Any]]:
    """Returns the engine's description of the model that it serves, once for each of its names."""
    found: list[dict[str, Any]] = ask(endpoint, "/v1/models")["data"]
    return found


def ask(endpoint: Endpoint, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
    """Sends one request of OpenAI's interface and returns the whole response. Raises the error that a refusal means."""
    with _answer(endpoint, path, body) as response:
        content = response.read(MOST_ANSWER_BYTES + 1)
        if len(content) > MOST_ANSWER_BYTES:
            raise _too_long("answer", MOST_ANSWER_BYTES)
        _check_complete(response)
    return _object(content)


@contextlib.contextmanager
def _answer(endpoint: Endpoint, path: str, body: Mapping[str, object] | None) -> Iterator[HTTPResponse]:
    """Sends one request and yields the response with its body unread. Turns failures in the block into our errors."""
    content = None
    if body is not None:
        content = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    connection = HTTPConnection("flashd")
    connection.auto_open = 0  # so that requests go over the given socket only
    connection.sock = _connected(endpoint)
    with contextlib.closing(connection):
        try:
            # An engine may refuse a request before it has read all of it; its response is valid.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                headers = {"Content-Type": "application/json"} if content is not None else {}
                connection.request("GET" if content is None else "POST", path, content, headers)
            with connection.getresponse() as response:
                if response.status != 200:
                    raise _refusal(response.status, response.read(_MOST_REFUSAL_BYTES))
                # Without a length, a complete response cannot be told from a truncated one.
                if response.length is None and not response.chunked:
                    raise IncompleteRead(b"")
                yield response
        except (OSError, HTTPException) as error:
            cause = str(error) or type(error).__name__
            if isinstance(error, IncompleteRead):
                cause = "its response is cut short"
            what = f"the engine ended while it answered: {cause}"
            raise EngineFailed(what, hint="see flash status") from None


def _connected(endpoint: Endpoint) -> socket.socket:
    made = None
    try:
        if isinstance(endpoint, str):
            made = socket.socket(socket.AF_UNIX)
            made.settimeout(CONNECT_S)
            made.connect(endpoint)
        else:
            made = endpoint()
        # No limit on reading: a long prompt may keep a small machine busy for minutes before the first token.
        made.settimeout(None)
    except OSError:
        if made is not None:
            made.close()
        where = endpoint if isinstance(endpoint, str) else "the endpoint"
        raise Unavailable(f"nothing answers at {where}", hint="no model is active: flash swap MODEL") from None
    return made


def _events(endpoint: Endpoint, path: str, body: Mapping[str, object]) -> Iterator[dict[str, Any]]:
    """Yields server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) as they arrive."""
    with _answer(endpoint, path, body) as response:
        for line in _lines(response):
            field, _, value = line.rstrip(b"\r").partition(b": ")
            if field != b"data" or value == _STREAM_ENDS:
                continue
            event = _object(value)
            if "error" in event:
                raise _interruption(event["error"])
            yield event


def _lines(response: HTTPResponse) -> Iterator[bytes]:
    """Yields whole lines as they arrive.

    HTTPResponse.readline would take a stream that was cut off between two chunks for a complete one (CPython 3.11 to
    3.13, HTTPResponse._peek_chunked).
    """
    begun = bytearray()
    while arrived := response.read1(_READ_BYTES):
        *ends, last = arrived.split(b"\n")
        for end in ends:
            yield bytes(begun + end)
            begun.clear()
        begun += last
        if len(begun) > MOST_EVENT_BYTES:
            raise _too_long("line", MOST_EVENT_BYTES)
    _check_complete(response)
    yield bytes(begun)


def _check_complete(response: HTTPResponse) -> None:
    """Checks that the engine has sent as many bytes as it announced. Raises IncompleteRead."""
    if response.length:
        raise IncompleteRead(b"", response.length)


def _object(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content.decode(errors="replace"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise EngineFailed("the engine's answer is not a JSON object", hint="see the engine's log for the reason")
    return found


def _too_long(what: str, most_bytes: int) -> EngineFailed:
    return EngineFailed(f"the engine's {what} is longer than {format_bytes(most_bytes)}", hint="ask for less at once")


def _interruption(error: Mapping[str, Any]) -> Exception:
    """Returns the error for an answer that ended early: by a swap, or by a failure that a retry does not solve."""
    if error.get("type") == "server_error":
        return EngineFailed(error["message"], hint="see the engine's log for the reason")
    return Busy(error["message"], hint="ask again")


def _refusal(status: int, content: bytes) -> Exception:
    try:
        message = str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        message = content.decode(errors="replace")[:500]
    match status:
        case 404:
            return NotFound(message)
        case 503:
            return Busy(message, hint="try again in a moment")
        case status if status < 500:
            return InvalidArgument(message)
    return EngineFailed(message, hint="see the engine's log for the reason")
