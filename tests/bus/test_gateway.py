# SPDX-License-Identifier: Apache-2.0
"""The gateway's HTTP address for all models, with common clients and real engines."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from conftest import SAYS, Daemon, Remote
from gateways import WHO, Gateway, free_port
from waiting import PATIENCE_S, eventually

from flashd.dbus import wire
from flashd.errors import InvalidArgument, Unavailable
from flashd.gateway.tokens import TokenFile


@pytest.fixture
def daemon(shared: Daemon) -> Daemon:
    return shared


@pytest.fixture
def three(lasting: Remote) -> Remote:
    return lasting


async def said(client: openai.AsyncOpenAI, model: str) -> str:
    answer = await client.chat.completions.create(model=model, messages=WHO, temperature=0, max_tokens=40)
    assert answer.model == model
    return str(answer.choices[0].message.content)


async def test_every_model_answers_as_itself(three: Remote, gateway: Gateway) -> None:
    async with gateway.openai() as client:
        lengths = {model.id: model.model_extra["max_model_len"] async for model in await client.models.list()}
        assert lengths == {"ada": 512, "bob": 512, "carl": 512}
        assert [await said(client, name) for name in ("ada", "bob", "ada")] == [SAYS[n] for n in ("ada", "bob", "ada")]
        names = ("ada", "bob") * 6
        others = [client.completions.create(model="carl", prompt="a", max_tokens=2) for _ in range(3)]
        answers, _ = await asyncio.gather(
            asyncio.gather(*[said(client, name) for name in names]), asyncio.gather(*others)
        )
        assert answers == [SAYS[name] for name in names]
    serving = {name for name in ("ada", "bob", "carl") if (await three.model(name))["Serving"]}
    assert "carl" in serving and len(serving) == 2, "carl has an engine of its own; ada and bob share one"


async def test_a_stream_comes_as_it_grows(three: Remote, gateway: Gateway) -> None:
    async with gateway.openai() as client:
        stream = await client.chat.completions.create(
            model="bob", messages=WHO, temperature=0, max_tokens=40, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert "".join(pieces) == SAYS["bob"] and len(pieces) > 5


async def test_a_name_that_nobody_has(three: Remote, gateway: Gateway) -> None:
    async with gateway.openai() as client:
        with pytest.raises(openai.NotFoundError, match="did you mean ada"):
            await said(client, "adda")
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await client.chat.completions.create(model="ada", messages=WHO, temperature=-1)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/score", "/tokenize", "/classify", "/pooling"])
async def test_what_the_engine_of_a_model_does_not_answer_says_which_does(
    path: str, three: Remote, gateway: Gateway
) -> None:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as web:
        refused = await web.post(path, json={"model": "ada", "input": "a", "prompt": "a"})
    assert refused.status_code == 501
    message = refused.json()["error"]["message"]
    assert f"torch engine, which does not answer {path}" in message and "models.ada.engine vllm" in message


async def test_a_request_without_a_name_is_for_the_active_model(three: Remote, gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as client:
        body = {"messages": WHO, "temperature": 0, "max_tokens": 40}
        refused = await client.post("/v1/chat/completions", json=body)
        assert refused.status_code == 404 and "names no model" in refused.json()["error"]["message"]
        (job,) = await three.call("Swap", "sa{sv}", "bob", {})
        assert (await three.finished(job))["State"] == "done"

        async def is_known() -> bool:
            return bool((await client.get("/health")).json()["active"] == "bob")

        await eventually(is_known)
        for name in ({}, {"model": ""}, {"model": "bob:latest"}):
            answer = (await client.post("/v1/chat/completions", json=body | name)).json()
            assert answer["model"] == "bob" and answer["choices"][0]["message"]["content"] == SAYS["bob"]


async def test_what_a_web_page_sends_is_refused(three: Remote, gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url) as client:
        for headers in (
            {"Origin": "https://evil.example"},
            {"Host": "evil.example:8434"},
            {"Sec-Fetch-Site": "cross-site"},
        ):
            answer = await client.get("/v1/models", headers=headers)
            assert (answer.status_code == 403 and "may not ask" in answer.text) or "not known" in answer.text
        assert (await client.get("/v1/models", headers={"Host": f"localhost:{gateway.port}"})).status_code == 200


async def test_a_token_is_for_its_models_alone(three: Remote, gateway: Gateway) -> None:
    secret = TokenFile(gateway.tokens).new("laptop", ["bob"])
    async with gateway.openai(secret) as client:
        assert [model.id async for model in await client.models.list()] == ["bob"]
        assert await said(client, "bob") == SAYS["bob"]
        with pytest.raises(openai.NotFoundError):
            await said(client, "ada")
        TokenFile(gateway.tokens).revoke("laptop")
        with pytest.raises(openai.AuthenticationError, match="revoked"):
            await said(client, "bob")


async def test_private_models_are_for_the_socket_alone(three: Remote, gateway: Gateway) -> None:
    await three.call("SetPrivate", "b", True, path=wire.model_path("bob"), interface=wire.MODEL)
    transport = httpx.AsyncHTTPTransport(uds=str(gateway.socket_path))
    async with (
        httpx.AsyncClient(base_url=gateway.url) as public,
        httpx.AsyncClient(transport=transport, base_url="http://flashd", timeout=PATIENCE_S) as own,
    ):

        async def is_known() -> bool:
            return "bob" not in (await public.get("/v1/models")).text

        await eventually(is_known)
        assert "bob" in (await own.get("/v1/models")).text
        body = {"model": "bob", "messages": WHO, "temperature": 0, "max_tokens": 40}
        refused = await public.post("/v1/chat/completions", json=body)
        assert refused.status_code == 404 and "did you mean" not in refused.text
        answer = (await own.post("/v1/chat/completions", json=body)).json()
        assert answer["choices"][0]["message"]["content"] == SAYS["bob"]


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.0.2.1:80", "nowhere", "127.0.0.1:99999"])
def test_an_address_that_cannot_be_used_says_why(address: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flashd.gateway.main", "--tokens", tmp_path / "none", "--address", address]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode in {InvalidArgument.exit_status, Unavailable.exit_status}
    assert done.stderr.startswith("flashd-gateway: ") and len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("name", ["a file", "a folder", "nowhere/gateway.sock", "long" * 30])
def test_a_socket_that_cannot_be_made_says_why_and_removes_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a file":
        path.write_text("precious")
    elif name == "a folder":
        path.mkdir()
    command = [sys.executable, "-m", "flashd.gateway.main", "--tokens", tmp_path / "none"]
    command += ["--address", f"127.0.0.1:{free_port()}", "--socket", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode in {InvalidArgument.exit_status, Unavailable.exit_status}
    assert done.stderr.startswith("flashd-gateway: ") and len(done.stderr.splitlines()) == 2
    assert name != "a file" or path.read_text() == "precious"


async def test_models_are_listed_while_the_daemon_is_away(three: Remote, daemon: Daemon, gateway: Gateway) -> None:
    daemon.stop()
    async with httpx.AsyncClient(base_url=gateway.url) as client:

        async def is_away() -> bool:
            return (await client.get("/health")).status_code == 503

        await eventually(is_away)
        assert [each["id"] for each in (await client.get("/v1/models")).json()["data"]] == ["ada", "bob", "carl"]
        refused = await client.post("/v1/chat/completions", json={"model": "ada", "messages": WHO})
        assert refused.status_code == 503 and "flashd" in refused.json()["error"]["message"]
    daemon.start()
    async with gateway.openai() as client:

        async def answers() -> bool:
            try:
                return await said(client, "ada") == SAYS["ada"]
            except openai.InternalServerError:
                return False

        await eventually(answers)
