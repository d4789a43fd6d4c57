# SPDX-License-Identifier: Apache-2.0
"""What clients hear while their model is brought, and for how long it serves after them."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from conftest import SAYS, Daemon, Remote, import_model
from gateways import WHO, Gateway, running_gateway
from imported import TORCH_PYTHON
from waiting import PATIENCE_S, eventually

GREEDY = {"temperature": 0, "max_tokens": 40}


@pytest.fixture
async def gateway(
    daemon: Daemon, remote: Remote, sources: Path, tmp_path: Path, short_path: Path
) -> AsyncIterator[Gateway]:
    """Of a daemon that has no engine yet, and takes three seconds at least to start one; longer while `held` exists."""
    slow = tmp_path / "python"
    hold = f"while [ -e '{tmp_path / 'held'}' ]; do sleep 0.1; done"
    slow.write_text(f'#!/bin/sh\nsleep 3\n{hold}\nexec "{os.environ[TORCH_PYTHON]}" "$@"\n')
    slow.chmod(0o755)
    daemon.stop()
    daemon.config.write_text(daemon.config.read_text() + f'torch.python = "{slow}"\n')
    daemon.start()
    for name in ("ada", "bob"):
        await import_model(remote, sources / name, name)
    async with running_gateway(daemon, tmp_path / "gateway.log", short_path / "gateway.sock") as running:
        yield running


async def test_a_stream_says_what_it_waits_for(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as web:

        async def lines(path: str, body: dict[str, object], **headers: str) -> list[str]:
            asked = {"messages": WHO, "stream": True, **body}
            answer = await web.post(path, json=asked, headers=headers)
            assert answer.status_code == 200
            return answer.text.splitlines()

        chat = "/v1/chat/completions"
        comments, words, failed, ollamas, pings, talk = await asyncio.gather(
            lines(chat, {"model": "ada", **GREEDY}),
            lines(chat, {"model": "ada", **GREEDY}, **{"X-Flashd-Progress": "1"}),
            lines(chat, {"model": "ada", "temperature": -1}),
            lines("/api/chat", {"model": "bob", "options": {"temperature": 0}}),
            lines("/v1/messages", {"model": "bob", "max_tokens": 40}),
            talked(gateway),
        )
    reasons = ("loading ada", "ada waits for its engine")  # by which model's request came first
    assert [line for line in comments if line.removeprefix(": ").startswith(reasons) and line.startswith(": ")]
    assert text_of(comments) == SAYS["ada"] and comments[-2:] == ["data: [DONE]", ""]
    assert text_of(words).startswith(reasons) and text_of(words).endswith("\n" + SAYS["ada"])
    assert "temperature" in json.loads(failed[-2].removeprefix("data: "))["error"]["message"]
    told = [json.loads(line) for line in ollamas]
    assert told[0]["message"]["content"] == "" and not told[0]["done"] and told[-1]["done"]
    assert "".join(line["message"]["content"] for line in told) == SAYS["bob"]
    assert pings[0] == "event: ping" and pings.index("event: message_start") > 2
    assert talk == SAYS["bob"]


def text_of(lines: list[str]) -> str:
    """The text of a stream of chat chunks."""
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


async def talked(gateway: Gateway) -> str:
    """A stream by Anthropic's client, which has to skip the pings."""
    body = {"model": "bob", "messages": WHO, "max_tokens": 40, "extra_body": {"temperature": 0}}
    async with gateway.anthropic() as client, client.messages.stream(**body) as stream:
        return str(await stream.get_final_text())


async def test_a_model_is_parked_when_a_request_said_so_and_nobody_is_cut(gateway: Gateway, remote: Remote) -> None:
    async def is_parked() -> bool:
        return not (await remote.model("ada"))["Serving"]

    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as web:

        async def ask(keep_alive: str) -> httpx.Response:
            body = {"model": "ada", "messages": WHO, **GREEDY}
            return await web.post("/v1/chat/completions", json=body, headers={"X-Flashd-Keep-Alive": keep_alive})

        wrong = await ask("soon")
        assert wrong.status_code == 400 and "5m" in wrong.json()["error"]["message"]
        assert (await ask("1h")).json()["choices"][0]["message"]["content"] == SAYS["ada"]
        long = {"model": "ada", "prompt": "Who are you?", "max_tokens": 200, "temperature": 5.0, "stream": True}
        async with web.stream("POST", "/v1/completions", json=long) as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data: {")
            unloaded = await web.post("/api/generate", json={"model": "ada", "keep_alive": 0})
            assert unloaded.json()["done_reason"] == "unload"
            assert [line async for line in lines][-2:] == ["data: [DONE]", ""], "who is answered is not cut"
        await eventually(is_parked)
        assert (await ask("-1")).json()["choices"][0]["message"]["content"] == SAYS["ada"]
        assert not await is_parked()


async def test_requests_that_wait_are_told_when_the_gateway_stops(gateway: Gateway, tmp_path: Path) -> None:
    """Each in its own form."""
    said = "the gateway is stopping"
    bodies: list[tuple[str, dict[str, object]]] = [
        ("/v1/chat/completions", {"messages": WHO}),
        ("/v1/completions", {"prompt": "Who are you?"}),
        ("/v1/messages", {"messages": WHO, "max_tokens": 40}),
        ("/api/chat", {"messages": WHO, "stream": False}),
        ("/api/generate", {"prompt": "Who are you?", "stream": False}),
    ]
    held = tmp_path / "held"
    held.touch()
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as web:

        async def all_wait() -> bool:
            return f'flashd_queue_length{{model="ada"}} {len(bodies) + 1}' in (await web.get("/metrics")).text

        asked = [asyncio.create_task(web.post(path, json={"model": "ada", **body})) for path, body in bodies]
        async with web.stream(
            "POST", "/v1/chat/completions", json={"model": "ada", "messages": WHO, "stream": True}
        ) as begun:
            lines = begun.aiter_lines()
            async for line in lines:
                if line == ": loading ada: its engine starts":
                    break
            await eventually(all_wait)
            gateway.process.terminate()
            *_, last = [line async for line in lines if line]
        assert said in json.loads(last.removeprefix("data: "))["error"]["message"]
        for (path, _), answer in zip(bodies, await asyncio.gather(*asked), strict=True):
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1", answer.text
            error = answer.json()["error"]
            assert said in (error if path.startswith("/api") else error["message"])
    held.unlink()
