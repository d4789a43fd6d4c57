# SPDX-License-Identifier: Apache-2.0
"""Requests at the gateway for models that are on the hub only."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import hub as fake_hub
import pytest
from conftest import SAYS, Daemon, Remote, import_model, running_daemon
from gateways import WHO, Gateway
from hub import Hub
from running import CONFIG
from waiting import PATIENCE_S, eventually

from flashd.dbus import wire
from flashd.dbus.private_bus import PrivateBus
from flashd.gateway.tokens import TokenFile

NAME = "someone/ada"
CHAT = "/v1/chat/completions"
ASKS = {"model": NAME, "messages": WHO, "temperature": 0, "max_tokens": 40}
WEIGHTS = "model.safetensors"
PULLS = "[gateway]\npull = true\nchange_models = true\n"


@pytest.fixture
def hub(sources: Path) -> Iterator[Hub]:
    with fake_hub.serving() as running:
        running.repository(NAME).commit({path.name: path.read_bytes() for path in (sources / "ada").iterdir()})
        yield running


@pytest.fixture
def daemon(
    hub: Hub, bus: PrivateBus, tmp_path: Path, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Daemon]:
    """Its environment, and so that of what downloads for it, leads to the hub of the test."""
    for name, value in hub.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    daemon = Daemon(bus.address, tmp_path, short_path)
    daemon.config.write_text(CONFIG + PULLS)
    with running_daemon(daemon) as running:
        yield running


@pytest.fixture
async def web(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as client:
        yield client


async def pulls(remote: Remote) -> list[str]:
    """The states of all pulls."""
    jobs = [found[wire.JOB] for found in (await remote.objects()).values() if wire.JOB in found]
    return [job["State"] for job in jobs if job["Kind"] == "pull"]


def waits_for_weights(hub: Hub) -> bool:
    return any(WEIGHTS in path for _, path, _ in hub.requests)


async def test_all_who_ask_for_it_wait_for_one_pull(
    hub: Hub, remote: Remote, gateway: Gateway, web: httpx.AsyncClient
) -> None:
    hub.holds[WEIGHTS] = threading.Event()
    quiet = asyncio.create_task(web.post(CHAT, json=ASKS))
    async with gateway.ollama() as client:
        ollamas = asyncio.create_task(client.chat(f"{NAME}:latest", WHO, options={"temperature": 0}))
        async with web.stream(
            "POST", CHAT, json={**ASKS, "stream": True}, headers={"X-Flashd-Progress": "1"}
        ) as streamed:
            lines = streamed.aiter_lines()
            async for line in lines:
                if f"pulling {NAME}: downloading, " in line:
                    break
            assert (await pulls(remote)) == ["running"]
            hub.holds[WEIGHTS].set()
            chunks = [json.loads(line.removeprefix("data: ")) async for line in lines if line.startswith("data: {")]
        text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        assert text.endswith(SAYS["ada"])
        assert (await quiet).json()["choices"][0]["message"]["content"] == SAYS["ada"]
        assert (await ollamas).message.content == SAYS["ada"]
    assert (await pulls(remote)) == ["done"], "there was one for all"
    assert [model["id"] for model in (await web.get("/v1/models")).json()["data"]] == [NAME]
    assert (await web.post(CHAT, json=ASKS)).json()["model"] == NAME


async def test_a_pull_ends_when_the_last_who_waits_leaves(hub: Hub, remote: Remote, web: httpx.AsyncClient) -> None:
    hub.holds[WEIGHTS] = threading.Event()
    first, last = (asyncio.create_task(web.post(CHAT, json=ASKS)) for _ in range(2))

    async def is_downloading() -> bool:
        return waits_for_weights(hub) and (await pulls(remote)) == ["running"]

    await eventually(is_downloading)
    first.cancel()
    # What a later client is told comes long after the gateway has heard that the first has left.
    async with web.stream("POST", CHAT, json={**ASKS, "stream": True}) as streamed:
        async for line in streamed.aiter_lines():
            if line.startswith(": pulling"):
                break
    assert (await pulls(remote)) == ["running"], "another waits for it"
    last.cancel()

    async def is_cancelled() -> bool:
        return (await pulls(remote)) == ["cancelled"]

    await eventually(is_cancelled)
    hub.holds[WEIGHTS].set()
    answer = await web.post(CHAT, json=ASKS)
    assert answer.json()["choices"][0]["message"]["content"] == SAYS["ada"], "the next one pulls again"


async def test_what_the_hub_refuses_is_said(web: httpx.AsyncClient) -> None:
    unknown = await web.post(CHAT, json={**ASKS, "model": "nobody/none"})
    assert unknown.status_code == 404 and "the hub shows you no model 'nobody/none'" in unknown.text
    for name in ("none", "a/b/c", "../b c"):
        refused = await web.post(CHAT, json={**ASKS, "model": name})
        assert refused.status_code == 404 and "there is no model" in refused.text and "hub" not in refused.text


async def test_nothing_is_pulled_for_those_who_may_not(
    hub: Hub, daemon: Daemon, remote: Remote, gateway: Gateway, web: httpx.AsyncClient, sources: Path
) -> None:
    async def refusal(model: str = NAME, **headers: str) -> str:
        answer = await web.post(CHAT, json={**ASKS, "model": model}, headers=headers)
        assert answer.status_code == 404, answer.text
        return str(answer.json()["error"]["message"])

    secret = TokenFile(gateway.tokens).new("laptop", [])
    assert "without a token" in await refusal(Authorization=f"Bearer {secret}")
    await import_model(remote, sources / "bob", "someone/bob")

    async def is_shown() -> bool:
        return "bob" in (await web.get("/v1/models")).text

    async def is_hidden() -> bool:
        return not await is_shown()

    await eventually(is_shown)  # else it would also be hidden as long as the gateway has not heard of it
    await remote.call("SetPrivate", "b", True, path=wire.model_path("someone/bob"), interface=wire.MODEL)
    await eventually(is_hidden)
    assert "there is no model 'someone/bob'" in await refusal("someone/bob"), "another user's request replaced it"
    hidden, absent = [await refusal(name, Authorization=f"Bearer {secret}") for name in ("someone/bob", "someone/eve")]
    assert hidden.replace("bob", "eve") == absent, "no token finds out what is here"
    for settings, words in (("pull = true", "gateway.change_models"), ("change_models = true", "gateway.pull")):
        daemon.stop()
        daemon.config.write_text(f"{CONFIG}[gateway]\n{settings}\n")
        daemon.start()

        async def is_followed() -> bool:
            return words in (await web.post(CHAT, json=ASKS)).text  # noqa: B023 -- it is called in this round

        await eventually(is_followed)
        assert words in await refusal()
        assert words not in await refusal("adda"), "that is no repository"
    assert not hub.requests
