# SPDX-License-Identifier: Apache-2.0
"""Tools and structured output by way of the gateway, with vLLM and the programs that people use.

Nothing pretends: tess (tests/tool_model.py) learned to call a tool, and vLLM finds the call in what it says.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import conformance
import httpx
import made_models
import programs
import pytest
import pytest_asyncio
import tool_model
from gateways import Gateway, make_endless, running_gateway
from running import Daemon
from waiting import PATIENCE_S, until

import flashd
from flashd.dbus.private_bus import PrivateBus

pytestmark = pytest.mark.timeout(300)
ASK: list[Any] = [{"role": "user", "content": tool_model.QUESTION}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"name": "weather", "description": "The weather in a city.", "parameters": SCHEMA}
FUNCTION: Any = {"type": "function", "function": TOOL}


@pytest.fixture(scope="module")
def daemon(
    made: Path, imported_vllm: str, compiled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    """One with tess, whose engine is told how she calls tools, a model for embeddings, and dora, who does not end."""
    models = tmp_path_factory.mktemp("models")
    dora = models / "dora"
    made_models.put(models, "ada", "carl")
    make_endless(models, dora)
    tess = tool_model.put(made / "ada")
    with tempfile.TemporaryDirectory(prefix="fd-") as folder, PrivateBus(Path(folder)) as bus:
        running = Daemon(bus.address, Path(folder), Path(folder))
        running.config.write_text(
            "[engines]\nwarm_up = false\nwarm_new = false\ndefault = 'vllm'\n"
            f"[engines.vllm]\npython = '{imported_vllm}'\nkv_cache = '64MiB'\narguments = ['--seed', '0']\n"
            f"[models.tess]\narguments = {json.dumps(tool_model.ARGUMENTS)}\n"
            "[models.dora]\narguments = ['--max-model-len', '8000']\n"
        )
        running.share_compiled(compiled)
        running.start()
        try:
            with flashd.connect(bus.address) as client:
                client.import_(tess, "tess")
                client.import_(made / "bert", "bert")
                client.import_(dora, "dora")
                client.swap("tess")
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
    await conformance.check(name, "vllm", gateway.url, "tess", "bert")


@pytest.mark.parametrize("by", programs.BY)
async def test_a_program_has_the_model_call_a_tool(by: str, gateway: Gateway, tmp_path: Path) -> None:
    async with programs.running(by, gateway.url, tmp_path) as program:
        for prefix in programs.BY[by]:
            found = await program.said("tools", name=prefix + "tess", question=tool_model.QUESTION)
            assert found == {"called": tool_model.CALLS, "streamed": [tool_model.CALLS], "text": tool_model.ANSWER}


@pytest.mark.parametrize("by", programs.BY)
async def test_what_a_program_leaves_is_not_generated(
    by: str, daemon: Daemon, gateway: Gateway, tmp_path: Path
) -> None:
    def requests(client: flashd.Client) -> int:
        return sum(engine.active_requests for engine in client.engines())

    with flashd.connect(daemon.address) as client:
        async with programs.running(by, gateway.url, tmp_path) as program:
            for prefix in programs.BY[by]:
                assert await program.said("begin", name=prefix + "dora", question=tool_model.QUESTION)
                until(lambda: requests(client) == 1)
                await program.said("leave")
                left = time.monotonic()
                until(lambda: requests(client) == 0)
                assert time.monotonic() - left < 30, "6,000 tokens take longer"


async def test_models_say_beforehand_what_they_do(gateway: Gateway) -> None:
    async with gateway.ollama() as client:
        found = {name: (await client.show(name)).capabilities for name in ("tess", "bert")}
        assert found == {"tess": ["completion", "tools"], "bert": ["embedding"]}


async def test_openais_client_has_the_model_call_a_tool(gateway: Gateway) -> None:
    async with gateway.openai() as client:
        ask: dict[str, Any] = {"model": "tess", "temperature": 0, "tools": [FUNCTION], "max_tokens": 120}
        answer = (await client.chat.completions.create(**ask, messages=ASK)).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.tool_calls
        (call,) = answer.message.tool_calls
        assert [call.function.name, json.loads(call.function.arguments)] == tool_model.CALLS
        result = {"role": "tool", "tool_call_id": call.id, "content": tool_model.RESULT}
        told = await client.chat.completions.create(**ask, messages=[*ASK, answer.message, result])
        assert told.choices[0].message.content == tool_model.ANSWER
        async with client.chat.completions.stream(**ask, messages=ASK) as stream:
            streamed = (await stream.get_final_completion()).choices[0].message.tool_calls
        assert [json.loads(each.function.arguments) for each in streamed] == [tool_model.CALLS[1]]
        ask["tools"] = [{"type": "function", "function": {**TOOL, "strict": True}}]
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            forced = await client.chat.completions.create(**ask, messages=ASK, tool_choice=choice)
            (call,) = forced.choices[0].message.tool_calls
            assert json.loads(call.function.arguments) == {"city": "Oslo"}, "the schema allows nothing else"


async def test_openais_client_gets_an_answer_of_a_schema(gateway: Gateway) -> None:
    kind: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    async with gateway.openai() as client:
        answer = await client.chat.completions.create(
            model="tess", messages=ASK, temperature=0, response_format=kind, max_tokens=100
        )
        assert json.loads(answer.choices[0].message.content) == {"city": "Oslo"}


async def test_anthropics_client_has_the_model_call_a_tool(gateway: Gateway) -> None:
    tool: Any = {"name": "weather", "description": "The weather in a city.", "input_schema": SCHEMA}
    ask: dict[str, Any] = {"model": "tess", "tools": [tool], "max_tokens": 120, "extra_body": {"temperature": 0}}
    async with gateway.anthropic() as client:
        answer = await client.messages.create(**ask, messages=ASK)
        assert answer.stop_reason == "tool_use"
        (call,) = [block for block in answer.content if block.type == "tool_use"]
        assert [call.name, call.input] == tool_model.CALLS
        result = {"type": "tool_result", "tool_use_id": call.id, "content": tool_model.RESULT}
        turns = [*ASK, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        told = await client.messages.create(**ask, messages=turns)
        assert "".join(block.text for block in told.content) == tool_model.ANSWER
        async with client.messages.stream(**ask, messages=ASK) as stream:
            whole = await stream.get_final_message()
        assert [block.input for block in whole.content if block.type == "tool_use"] == [tool_model.CALLS[1]]


async def test_ollamas_client_has_the_model_call_a_tool(gateway: Gateway) -> None:
    greedy = {"temperature": 0, "num_predict": 120}
    async with gateway.ollama() as client:
        answer = await client.chat("tess", ASK, tools=[FUNCTION], options=greedy)
        (call,) = answer.message.tool_calls or []
        assert [call.function.name, call.function.arguments] == tool_model.CALLS
        result = {"role": "tool", "tool_name": "weather", "content": tool_model.RESULT}
        told = await client.chat("tess", [*ASK, answer.message, result], tools=[FUNCTION], options=greedy)
        assert told.message.content == tool_model.ANSWER


async def test_what_claude_code_asks_is_answered(gateway: Gateway) -> None:
    """A request in the form of Claude Code's, which is not here itself: a beta, blocks of system, tools, a stream."""
    body = {
        "model": "tess",
        "max_tokens": 120,
        "stream": True,
        "temperature": 0,
        "system": [{"type": "text", "text": "", "cache_control": {"type": "ephemeral"}}],
        "metadata": {"user_id": "someone"},
        "messages": [{"role": "user", "content": [{"type": "text", "text": tool_model.QUESTION}]}],
        "tools": [{"name": "weather", "description": "The weather in a city.", "input_schema": SCHEMA}],
    }
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219",
        "authorization": "Bearer none",
    }
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as client:
        answer = await client.post("/v1/messages?beta=true", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
        (call,) = [e["content_block"] for e in events if e.get("content_block", {}).get("type") == "tool_use"]
        assert call["name"] == "weather"


def test_llm_has_the_model_call_a_function(gateway: Gateway, tmp_path: Path) -> None:
    entry = f"- model_id: tess\n  model_name: tess\n  api_base: {gateway.url}/v1\n  supports_tools: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry)
    function = "def weather(city: str) -> str:\n    return f'It rains in {city}.'"
    done = subprocess.run(
        [programs.interpreter(), "-m", "llm", "-m", "tess", "--functions", function, "--td", "--no-stream",
         "-o", "temperature", "0", "-o", "max_tokens", "120", tool_model.QUESTION],
        env=programs.environment(tmp_path, LLM_USER_PATH=str(tmp_path)), capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == tool_model.ANSWER and "It rains in Rome." in done.stderr
