# SPDX-License-Identifier: Apache-2.0
"""GGUF models by way of the gateway, in the words of those who ask."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import built_llama
import conformance
import gguf_files
import httpx
import made_models
import numpy as np
import programs
import pytest
import pytest_asyncio
import tool_model
from gateways import Gateway, running_gateway
from running import CONFIG, Daemon
from waiting import PATIENCE_S

import flashd
from flashd.dbus.private_bus import PrivateBus

pytestmark = pytest.mark.timeout(1800)  # llama.cpp may have to be built first
ASK: list[Any] = [{"role": "user", "content": tool_model.QUESTION}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One with tess, who calls a tool, and models for embeddings and for ranking."""
    models = tmp_path_factory.mktemp("gguf")
    made_models.put(models, "ada")
    tess = gguf_files.qwen3(tool_model.put(models / "ada"))
    ranker = gguf_files.qwen3(models / "ada")
    ranker.entries["qwen3.pooling_type"] = gguf_files.Value(gguf_files.UINT32, 4)
    ranker.entries["qwen3.classifier.output_labels"] = gguf_files.Value(gguf_files.STRING, ["yes", "no"])
    ranker.tensors["cls.output.weight"] = (gguf_files.F32, (256, 2), np.ones((2, 256), np.float32).tobytes())
    files = {"tess": tess, "vectors": gguf_files.llama(2, pooling=1), "ranker": ranker}
    with tempfile.TemporaryDirectory(prefix="fd-") as folder, PrivateBus(Path(folder)) as bus:
        running = Daemon(bus.address, Path(folder), Path(folder))
        running.config.write_text(f"{CONFIG}llama.threads = 1\nllama.server = '{built_llama.program()}'\n")
        running.start()
        try:
            with flashd.connect(bus.address) as client:
                for name, file in files.items():
                    client.import_(file.write(models / f"{name}.gguf"), name)
            yield running
        finally:
            status, words = running.stop(), running.log.read_text()
    assert status == 0 and "Traceback" not in words, words


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(daemon: Daemon) -> AsyncIterator[Gateway]:
    async with running_gateway(daemon, daemon.root / "gateway.log", daemon.root / "gateway.sock") as running:
        yield running


@conformance.every_capability
async def test_an_engine_does_what_is_said_of_it(name: str, gateway: Gateway) -> None:
    await conformance.check(name, "llama.cpp", gateway.url, "tess", "vectors")


@pytest.mark.parametrize("by", programs.BY)
async def test_a_program_has_the_model_call_a_tool(by: str, gateway: Gateway, tmp_path: Path) -> None:
    async with programs.running(by, gateway.url, tmp_path) as program:
        for prefix in programs.BY[by]:
            found = await program.said("tools", name=prefix + "tess", question=tool_model.QUESTION)
            assert found == {"called": tool_model.CALLS, "streamed": [tool_model.CALLS], "text": tool_model.ANSWER}


async def test_a_model_for_reranking_ranks(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as client:
        ask = {"model": "ranker", "query": "who are you?", "documents": ["Ada", "the first model"]}
        answer = await client.post("/v1/rerank", json=ask)
        assert answer.status_code == 200, answer.text
        assert sorted(each["index"] for each in answer.json()["results"]) == [0, 1]


async def test_openais_client_has_the_model_call_a_tool(gateway: Gateway) -> None:
    async with gateway.openai() as client:
        ask: dict[str, Any] = {"model": "tess", "temperature": 0, "tools": [FUNCTION], "max_tokens": 120}
        answer = (await client.chat.completions.create(**ask, messages=ASK)).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.tool_calls
        (call,) = answer.message.tool_calls
        assert [call.function.name, json.loads(call.function.arguments)] == tool_model.CALLS
        forced = await client.chat.completions.create(**ask, messages=ASK, tool_choice="required")
        assert forced.choices[0].finish_reason == "tool_calls"
        result = {"role": "tool", "tool_call_id": call.id, "content": tool_model.RESULT}
        told = await client.chat.completions.create(**ask, messages=[*ASK, answer.message, result])
        assert told.choices[0].message.content == tool_model.ANSWER
        assert told.model == "tess"
        async with client.chat.completions.stream(**ask, messages=ASK) as stream:
            streamed = (await stream.get_final_completion()).choices[0].message.tool_calls
        assert [json.loads(each.function.arguments) for each in streamed] == [tool_model.CALLS[1]]


async def test_anthropics_client_has_the_model_call_a_tool(gateway: Gateway) -> None:
    tool: Any = {"name": "weather", "input_schema": FUNCTION["function"]["parameters"]}
    async with gateway.anthropic() as client:
        ask: dict[str, Any] = {
            "model": "tess",
            "max_tokens": 120,
            "tools": [tool],
            "messages": ASK,
            "extra_body": {"temperature": 0},
        }
        answer = await client.messages.create(**ask)
        (used,) = [block for block in answer.content if block.type == "tool_use"]
        assert [used.name, used.input] == tool_model.CALLS and answer.stop_reason == "tool_use"
        async with client.messages.stream(**ask) as stream:
            last = await stream.get_final_message()
        assert [block.input for block in last.content if block.type == "tool_use"] == [tool_model.CALLS[1]]
        counted = await client.messages.count_tokens(model="tess", messages=ASK)
        assert counted.input_tokens > 10


async def test_ollamas_client_chats_and_asks_what_models_do(gateway: Gateway) -> None:
    async with gateway.ollama() as client:
        found = {name: (await client.show(name)).capabilities for name in ("tess", "vectors")}
        assert found == {"tess": ["completion", "tools"], "vectors": ["embedding"]}
        shown = await client.show("tess")
        assert shown.details and shown.details.format == "gguf" and shown.details.quantization_level == "BF16"
        pieces = [piece async for piece in await client.chat("tess", ASK, stream=True, options={"temperature": 0})]
        assert "weather" in "".join(piece.message.content or "" for piece in pieces)
        vectors = await client.embed("vectors", ["one", "two"])
        assert [len(vector) for vector in vectors.embeddings] == [64, 64]
