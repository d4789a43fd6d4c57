# SPDX-License-Identifier: Apache-2.0
"""Ollama's and Anthropic's interfaces at the gateway, with their own clients and real engines."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import anthropic
import httpx
import hub as fake_hub
import ollama
import pytest
from conftest import SAYS, Daemon, Remote, import_model, lasting_daemon, running_daemon
from gateways import WHO, Gateway, make_endless, running_gateway
from running import CONFIG
from waiting import eventually

from flashd.dbus.private_bus import PrivateBus

GREEDY = {"temperature": 0, "num_predict": 40}
COLD = {"temperature": 0}
LONG = 30_000  # tokens, which take minutes


@pytest.fixture(scope="module")
def daemon(sources: Path) -> Iterator[Daemon]:
    with lasting_daemon(sources / "ada", sources / "bob") as running:
        yield running


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[ollama.AsyncClient]:
    async with gateway.ollama() as made:
        yield made


@pytest.fixture
async def two(remote: Remote) -> AsyncIterator[Remote]:
    yield remote
    await remote.settle("ada", "bob")


async def test_ollama_chats(two: Remote, client: ollama.AsyncClient) -> None:
    for name in ("ada", "bob:latest"):
        answer = await client.chat(model=name, messages=WHO, options=GREEDY)
        assert answer.model == name
        assert answer.message.role == "assistant" and answer.message.content == SAYS[name.removesuffix(":latest")]
        assert answer.done and answer.done_reason == "stop"
        assert answer.prompt_eval_count and answer.eval_count and answer.eval_count > 5
        assert answer.total_duration and answer.load_duration and answer.eval_duration
        parts = answer.load_duration + answer.prompt_eval_duration + answer.eval_duration
        assert answer.total_duration == parts


async def test_ollama_streams(two: Remote, client: ollama.AsyncClient) -> None:
    lines = [line async for line in await client.chat(model="ada", messages=WHO, options=GREEDY, stream=True)]
    assert "".join(line.message.content or "" for line in lines) == SAYS["ada"]
    assert len(lines) > 6 and [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    short = {**GREEDY, "num_predict": 3}
    lines = [
        line async for line in await client.generate(model="bob", prompt="Who are you?", options=short, stream=True)
    ]
    assert lines[-1].done_reason == "length" and lines[-1].eval_count == 3
    assert SAYS["bob"].startswith("".join(line.response or "" for line in lines))
    stopped = {**GREEDY, "stop": ["fine"]}
    answer = await client.generate(model="bob", prompt="Who are you?", options=stopped)
    assert answer.response == SAYS["bob"].partition("fine")[0] and answer.done_reason == "stop"
    raw = await client.generate(model="bob", prompt="Who are you?", raw=True, options=GREEDY)
    assert raw.response and raw.prompt_eval_count and raw.prompt_eval_count < answer.prompt_eval_count


async def test_ollama_lists_and_shows(two: Remote, gateway: Gateway, client: ollama.AsyncClient) -> None:
    assert (await client.ps()).models == []
    listed = (await client.list()).models
    assert [model.model for model in listed] == ["ada:latest", "bob:latest"]
    assert listed[0].digest and listed[0].size and listed[0].modified_at and listed[0].details.family == "qwen3"
    shown = await client.show("ada:latest")
    assert shown.capabilities == ["completion", "embedding"] and shown.modelinfo["general.architecture"] == "qwen3"
    async with httpx.AsyncClient(base_url=gateway.url) as web:
        assert (await web.get("/")).text == "Ollama is running"
        assert (await web.head("/")).status_code == 200
        assert (await web.get("/api/version")).json()["version"].count(".") == 2


async def test_ollama_loads_and_unloads(two: Remote, client: ollama.AsyncClient) -> None:
    loaded = await client.generate(model="ada")
    assert loaded.done_reason == "load" and loaded.response == ""
    assert [model.model for model in (await client.ps()).models] == ["ada:latest"]
    assert (await two.model("ada"))["Serving"]
    unloaded = await client.chat(model="ada", messages=[], keep_alive=0)
    assert unloaded.done_reason == "unload" and unloaded.message.content == ""

    async def rests() -> bool:
        return not (await client.ps()).models

    await eventually(rests)
    assert not (await two.model("ada"))["Serving"]
    assert (await client.chat(model="ada", messages=[], keep_alive="0s")).done_reason == "unload"
    answer = await client.chat(model="ada", messages=WHO, options=GREEDY, keep_alive=0)
    assert answer.message.content == SAYS["ada"]
    await eventually(rests)


async def test_embeddings(two: Remote, gateway: Gateway, client: ollama.AsyncClient) -> None:
    both = await client.embed(model="ada", input=["one text", "another"])
    one = await client.embed(model="ada", input="one text")
    assert len(both.embeddings) == 2 and both.embeddings[0] == pytest.approx(one.embeddings[0], abs=1e-5)
    assert one.prompt_eval_count and one.total_duration
    async with gateway.openai() as openais:
        found = await openais.embeddings.create(model="ada", input="one text")
    assert found.data[0].embedding == pytest.approx(one.embeddings[0], abs=1e-5)
    assert (await client.embeddings(model="ada", prompt="one text")).embedding == pytest.approx(one.embeddings[0])


async def test_ollama_is_told_what_is_wrong(two: Remote, gateway: Gateway, client: ollama.AsyncClient) -> None:
    for words, status, asked in (
        ("did you mean ada", 404, client.chat(model="adda", messages=WHO)),
        ("temperature must be a number", 400, client.chat(model="ada", messages=WHO, options={"temperature": -1})),
        ("'dry' is not known in options", 400, client.chat(model="ada", messages=WHO, options={"dry": 1})),
        ("mirostat can only be 0", 400, client.generate(model="ada", prompt="a", options={"mirostat": 2})),
        ("format: ", 400, client.chat(model="ada", messages=WHO, format="json")),
        ("not a picture", 400, client.chat(model="ada", messages=[{**WHO[0], "images": ["bm8="]}])),
        ("cannot be pulled or deleted", 403, client.delete("ada")),
        ("cannot be pulled or deleted", 403, client.pull("Qwen/Qwen3-0.6B")),
        ("there is no POST /api/create here", 404, client.create(model="carl", from_="ada")),
    ):  # fmt: skip
        with pytest.raises(ollama.ResponseError) as refused:
            await asked
        assert words in refused.value.error and refused.value.status_code == status
    accepted = {**GREEDY, "num_ctx": 8192, "num_gpu": 1, "num_thread": 4}
    assert (await client.chat(model="ada", messages=WHO, options=accepted, keep_alive="5m")).message.content == SAYS[
        "ada"
    ]
    with pytest.raises(ollama.ResponseError, match="did you mean"):
        async for _ in await client.chat(model="adda", messages=WHO, stream=True):
            raise AssertionError
    async with httpx.AsyncClient(base_url=gateway.url) as web:
        assert isinstance((await web.get("/api/nothing")).json()["error"], str)
        assert isinstance((await web.get("/api/tags", headers={"Origin": "https://evil.example"})).json()["error"], str)


async def test_ollama_pulls_and_deletes_where_it_may(
    bus: PrivateBus, sources: Path, tmp_path: Path, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = Daemon(bus.address, tmp_path, short_path)
    daemon.config.write_text(f"{CONFIG}[gateway]\nchange_models = true\n")
    with fake_hub.serving() as hub:
        hub.repository("someone/ada").commit({path.name: path.read_bytes() for path in (sources / "ada").iterdir()})
        for name, value in hub.environment(tmp_path).items():
            monkeypatch.setenv(name, value)  # of the daemon, and so of what downloads for it
        with running_daemon(daemon):
            await pulls_and_deletes(daemon, tmp_path / "gateway.log", short_path / "gateway.sock")


async def pulls_and_deletes(daemon: Daemon, log: Path, socket_path: Path) -> None:
    async with running_gateway(daemon, log, socket_path) as gateway, gateway.ollama() as client:
        lines = [line.status async for line in await client.pull("hf.co/someone/ada:latest", stream=True)]
        assert lines[0] == "pulling manifest" and lines[-1] == "success"
        with pytest.raises(ollama.ResponseError, match="nobody/none"):
            await client.pull("nobody/none")
        with pytest.raises(ollama.ResponseError, match="nobody/none"):
            async for _ in await client.pull("nobody/none", stream=True):
                pass

        async def is_listed() -> bool:
            return [model.model for model in (await client.list()).models] == ["someone/ada:latest"]

        await eventually(is_listed)
        answer = await client.chat(model="someone/ada", messages=WHO, options=GREEDY)
        assert answer.message.content == SAYS["ada"]
        long = {"temperature": 5.0, "num_predict": 400, "seed": 1}
        async with aclosing(await client.generate("someone/ada", "Who?", stream=True, options=long)) as lines:
            await anext(lines)
            with pytest.raises(ollama.ResponseError, match="ada") as refused:
                await client.delete("someone/ada")
            assert refused.value.status_code == 503, "it answers"
            async for _ in lines:
                pass
        assert (await client.delete("someone/ada")).status == "success", "though it still serves"

        async def is_gone() -> bool:
            return (await client.list()).models == []

        await eventually(is_gone)


async def engine_rests(remote: Remote) -> bool:
    objects = await remote.objects()
    engines = [found["org.flashd1.Engine"] for found in objects.values() if "org.flashd1.Engine" in found]
    return all(engine["ActiveRequests"] == 0 for engine in engines)


async def test_leaving_in_the_middle_ends_the_generation(
    two: Remote, gateway: Gateway, client: ollama.AsyncClient, sources: Path, tmp_path: Path
) -> None:
    make_endless(sources, tmp_path / "dora")
    await import_model(two, tmp_path / "dora", "dora")

    async def by_openai() -> AsyncIterator[object]:
        async with gateway.openai() as openais:
            stream = await openais.chat.completions.create(
                model="dora", messages=WHO, max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
            )
            async with stream:
                async for chunk in stream:
                    yield chunk

    async def by_anthropic() -> AsyncIterator[object]:
        async with (
            gateway.anthropic() as anthropics,
            anthropics.messages.stream(model="dora", max_tokens=LONG, messages=WHO) as stream,
        ):
            async for text in stream.text_stream:
                yield text

    async def by_ollama() -> AsyncIterator[object]:
        options = {"num_predict": LONG}
        async with aclosing(await client.chat("dora", WHO, options=options, stream=True)) as lines:
            async for line in lines:
                yield line

    await client.generate("dora")
    for ask in (by_openai, by_anthropic, by_ollama):
        async with aclosing(ask()) as stream:
            async for _ in stream:
                break
            left = time.monotonic()
        await eventually(lambda: engine_rests(two))
        assert time.monotonic() - left < 30, ask.__name__
    with pytest.raises(ollama.ResponseError, match="reads at most"):
        await client.generate("dora", "a " * 50_000)


async def test_a_model_without_a_chat_template(two: Remote, client: ollama.AsyncClient, sources: Path) -> None:
    await import_model(two, sources / "carl", "carl")
    with pytest.raises(ollama.ResponseError, match='use /api/generate with "raw": true'):
        await client.chat("carl", WHO)
    assert (await client.generate("carl", "a", raw=True, options=GREEDY)).eval_count


async def test_anthropic_messages(two: Remote, gateway: Gateway) -> None:
    async with gateway.anthropic() as client:
        for name in ("ada", "bob"):
            answer = await client.messages.create(model=name, max_tokens=40, messages=WHO, extra_body=COLD)
            assert answer.model == name and answer.role == "assistant" and answer.type == "message"
            assert [(block.type, block.text) for block in answer.content] == [("text", SAYS[name])]
            assert answer.stop_reason == "end_turn" and answer.usage.output_tokens > 5
            counted = await client.messages.count_tokens(model=name, messages=WHO)
            assert counted.input_tokens == answer.usage.input_tokens
        assert [model.id async for model in client.models.list()] == ["ada", "bob"]
        assert (await client.models.retrieve("bob")).display_name == "bob"
        short = await client.messages.create(model="ada", max_tokens=3, messages=WHO, extra_body=COLD)
        assert short.stop_reason == "max_tokens" and short.usage.output_tokens == 3
        stopped = await client.messages.create(
            model="bob", max_tokens=40, messages=WHO, extra_body=COLD, stop_sequences=["zz", "fine"], system=""
        )
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "fine")
        assert stopped.content[0].text == SAYS["bob"].partition("fine")[0]
        async with client.messages.stream(model="bob", max_tokens=40, messages=WHO, extra_body=COLD) as stream:
            pieces = [piece async for piece in stream.text_stream]
            whole = await stream.get_final_message()
        assert "".join(pieces) == SAYS["bob"] and len(pieces) > 5
        assert whole.content[0].text == SAYS["bob"] and whole.stop_reason == "end_turn"
        assert whole.usage.input_tokens and whole.usage.output_tokens > 5


async def test_anthropic_is_told_what_is_wrong(two: Remote, gateway: Gateway) -> None:
    async with gateway.anthropic() as client:

        async def told(kind: type[anthropic.APIStatusError], words: str, **given: object) -> None:
            with pytest.raises(kind, match=words) as refused:
                await client.messages.create(**{"model": "ada", "max_tokens": 5, "messages": WHO, **given})
            assert refused.value.body["type"] == "error" and refused.value.body["error"]["type"]

        await told(anthropic.NotFoundError, "did you mean ada", model="adda")
        await told(anthropic.BadRequestError, "temperature must be", extra_body={"temperature": 2})
        tool = {"name": "look", "input_schema": {"type": "object"}}
        await told(anthropic.BadRequestError, "tools can only be", tools=[tool])
        await told(anthropic.BadRequestError, "thinking", thinking={"type": "enabled", "budget_tokens": 1024})
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
        await told(anthropic.BadRequestError, "reads only text", messages=[{"role": "user", "content": [image]}])
        await told(anthropic.BadRequestError, "cannot continue", messages=[*WHO, {"role": "assistant", "content": "I"}])
    async with httpx.AsyncClient(base_url=gateway.url) as web:
        assert (await web.get("/v1/messages")).json()["type"] == "error"
        refused = await web.post("/v1/messages", json={}, headers={"Origin": "https://evil.example"})
        assert refused.json()["error"]["type"] == "permission_error"
