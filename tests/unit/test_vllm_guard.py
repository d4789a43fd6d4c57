# SPDX-License-Identifier: Apache-2.0
"""The gate before vLLM's server, with another application in its place."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from flashd.workers import guard
from flashd.workers.connections import ELSEWHERE
from flashd.workers.gate import Gate
from flashd.workers.guard import Guard

SCOPE = {"type": "http", "path": "/v1/completions"}


class Client:
    """One request, sent in parts as the test says, and what comes back."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.got: list[Any] = []

    def send(self, body: bytes, *, more: bool) -> None:
        self.parts.put_nowait({"type": "http.request", "body": body, "more_body": more})

    async def receive(self) -> Any:
        return await self.parts.get()

    async def take(self, message: Any) -> None:
        self.got.append(message)

    @property
    def status(self) -> int:
        return int(self.got[0]["status"])


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def gate() -> Gate:
    made = Gate()
    made.open()
    return made


async def test_a_client_that_is_slow_to_send_holds_up_no_swap(gate: Gate) -> None:
    client = Client()
    asking = asyncio.create_task(Guard(echo, gate)(SCOPE, client.receive, client.take))
    client.send(b"one ", more=True)
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await gate.drain(60)
    gate.open()
    client.send(b"two", more=False)
    await asking
    assert (client.status, client.got[1]["body"]) == (200, b"one two")


async def test_a_body_without_end_is_refused(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 5)
    client = Client()
    client.send(b"123456", more=True)
    await Guard(echo, gate)(SCOPE, client.receive, client.take)
    assert client.status == 413 and json.loads(client.got[1]["body"])["error"]["type"] == "invalid_request_error"


async def test_one_that_comes_to_a_parked_engine_may_be_passed_on(gate: Gate) -> None:
    gate.park()
    client = Client()
    client.send(b"", more=False)
    await Guard(echo, gate)(SCOPE, client.receive, client.take)
    assert client.status == 503 and ELSEWHERE in client.got[0]["headers"]
