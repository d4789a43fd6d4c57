# SPDX-License-Identifier: Apache-2.0
"""How is a model asked? OpenAI's HTTP interface, over the Unix socket that flashd's endpoint is.

An endpoint is the path of that socket, or a function that makes a connection to it, for who cannot.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import httpcore
import httpx

from flashd.errors import Busy, EngineFailed, InvalidArgument, NotFound, Unavailable

Message = Mapping[str, str]
Endpoint = str | Callable[[], socket.socket]
CONNECT_S = 5.0


def chat(endpoint: Endpoint, model: str, messages: Sequence[Message], **parameters: Any) -> str:
    """The answer to a conversation. `parameters` are OpenAI's: temperature, max_tokens, stop, seed, ..."""
    return "".join(stream_chat(endpoint, model, messages, **parameters))


def stream_chat(endpoint: Endpoint, model: str, messages: Sequence[Message], **parameters: Any) -> Iterator[str]:
    """The answer as it grows. Leaving the loop early ends the generation."""
    body = {"model": model, "messages": list(messages), "stream": True, **parameters}
    for event in _events(endpoint, "/v1/chat/completions", body):
        for choice in event.get("choices", []):
            if text := choice.get("delta", {}).get("content"):
                yield text


def stream_completion(endpoint: Endpoint, model: str, prompt: str, **parameters: Any) -> Iterator[str]:
    """The continuation of a text as it grows, for models without a chat template."""
    body = {"model": model, "prompt": prompt, "stream": True, **parameters}
    for event in _events(endpoint, "/v1/completions", body):
        for choice in event.get("choices", []):
            if text := choice.get("text"):
                yield text


def embeddings(endpoint: Endpoint, model: str, texts: Sequence[str]) -> list[list[float]]:
    """One vector a text."""
    found = ask(endpoint, "/v1/embeddings", {"model": model, "input": list(texts)})
    return [entry["embedding"] for entry in found["data"]]


def models(endpoint: Endpoint) -> list[dict[str, Any]]:
    """What an engine says of the model that it serves, and of it under other names."""
    found: list[dict[str, Any]] = ask(endpoint, "/v1/models")["data"]
    return found


def ask(endpoint: Endpoint, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The whole answer to one request of OpenAI's interface. Raises as it is refused."""
    with _client(endpoint) as client:
        try:
            response = client.get(path) if body is None else client.post(path, json=body)
        except httpx.TransportError as error:
            raise _unreachable(endpoint, error) from None
    if response.status_code != 200:
        raise _refusal(response)
    found: dict[str, Any] = response.json()
    return found


class _Stream(httpcore.NetworkStream):
    """A connected socket, for the HTTP library."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _as_errors_of_httpcore(httpcore.ReadError):
            self._connection.settimeout(timeout)
            return self._connection.recv(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with _as_errors_of_httpcore(httpcore.WriteError):
            self._connection.settimeout(timeout)
            self._connection.sendall(buffer)

    def close(self) -> None:
        self._connection.close()

    def get_extra_info(self, info: str) -> Any:
        """By this the library sees whether an idle connection was closed at the other end."""
        if info != "is_readable":
            return None
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        return bool(poll.poll(0))


class _Backend(httpcore.NetworkBackend):
    """Connections that somebody else makes."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect

    def connect_tcp(self, *_: Any, **__: Any) -> httpcore.NetworkStream:
        return _Stream(self._connect())


class _Transport(httpx.HTTPTransport):
    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        super().__init__(verify=False)
        self._pool = httpcore.ConnectionPool(network_backend=_Backend(connect))


@contextlib.contextmanager
def _as_errors_of_httpcore(error: type[Exception]) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        raise error(str(cause)) from cause


def _client(endpoint: Endpoint) -> httpx.Client:
    # No limit on reading: a long prompt may keep a small machine busy for minutes before the first token.
    timeout = httpx.Timeout(None, connect=CONNECT_S)
    # There is no TLS on a socket of this machine, and reading the certificates for it would take 20 ms a question.
    transport = httpx.HTTPTransport(uds=endpoint, verify=False) if isinstance(endpoint, str) else _Transport(endpoint)
    return httpx.Client(transport=transport, base_url="http://flashd", timeout=timeout)


def _events(endpoint: Endpoint, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with _client(endpoint) as client:
        try:
            with client.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(response)
                for line in response.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise Busy(event["error"]["message"], hint="ask again")
                    yield event
        except httpx.TransportError as error:
            raise _unreachable(endpoint, error) from None


def _unreachable(endpoint: Endpoint, error: Exception) -> Exception:
    if isinstance(error, httpx.ConnectError):
        return Unavailable(
            f"nobody answers at {endpoint if isinstance(endpoint, str) else 'the endpoint'}",
            hint="no model is active: flash swap MODEL",
        )
    return EngineFailed(f"the engine ended while it answered: {error}", hint="flash status shows what is left")


def _refusal(response: httpx.Response) -> Exception:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = response.text[:500]
    match response.status_code:
        case 404:
            return NotFound(message)
        case 503:
            return Busy(message, hint="try again in a moment")
        case status if status < 500:
            return InvalidArgument(message)
    return EngineFailed(message, hint="the engine's log has the reason")
