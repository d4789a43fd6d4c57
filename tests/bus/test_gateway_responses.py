# SPDX-License-Identifier: Apache-2.0
"""OpenAI's responses at the gateway, with its own client and an engine that has only its chat completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from conftest import SAYS, Daemon
from gateways import Gateway, running_gateway

QUESTION = "Who are you?"
TOOL: Any = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(shared: Daemon) -> AsyncIterator[Gateway]:
    async with running_gateway(shared, shared.root / "gateway.log", shared.root / "gateway.sock") as running:
        yield running


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with gateway.openai() as made:
        yield made


async def test_a_response_is_that_of_a_chat(client: openai.AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model="ada", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=40
    )
    found = await client.responses.create(
        model="ada", input=QUESTION, temperature=0, max_output_tokens=40, metadata={"of": "a test"}
    )
    assert found.output_text == SAYS["ada"] == chat.choices[0].message.content
    assert (found.status, found.model, found.object) == ("completed", "ada", "response")
    assert found.metadata == {"of": "a test"} and found.temperature == 0 and found.max_output_tokens == 40
    assert found.usage is not None and chat.usage is not None
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.usage.output_tokens == chat.usage.completion_tokens
    assert found.usage.total_tokens == chat.usage.total_tokens
    short = await client.responses.create(model="ada", input=QUESTION, temperature=0, max_output_tokens=3)
    assert short.status == "incomplete" and SAYS["ada"].startswith(short.output_text)
    assert short.incomplete_details is not None and short.incomplete_details.reason == "max_output_tokens"


async def test_a_conversation_goes_on_with_what_was_answered(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="bob", input=QUESTION, instructions="Be kind.", temperature=0)
    more: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        *first.output,
        {"role": "user", "content": QUESTION},
    ]
    second = await client.responses.create(model="bob", input=more, instructions="Be kind.", temperature=0)
    messages: Any = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": QUESTION},
    ]
    chat = await client.chat.completions.create(model="bob", messages=messages, temperature=0)
    assert second.output_text == chat.choices[0].message.content
    assert second.usage is not None and chat.usage is not None
    assert second.usage.input_tokens == chat.usage.prompt_tokens, "the model has read the same"
    developer: Any = [{"role": "developer", "content": "Be kind."}, *more]
    third = await client.responses.create(model="bob", input=developer, temperature=0)
    assert third.output_text == second.output_text


async def test_a_stream_has_the_events_of_a_response(client: openai.AsyncOpenAI) -> None:
    ask = {"model": "ada", "input": QUESTION, "temperature": 0}
    events = [event async for event in await client.responses.create(**ask, stream=True)]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == SAYS["ada"] and len(deltas) > 5
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    async with client.responses.stream(**ask) as stream:  # which follows the events, and checks their order
        async for _ in stream:
            pass
        whole = await stream.get_final_response()
    assert whole.output_text == SAYS["ada"] and whole.usage is not None and whole.usage.output_tokens > 5
    short = [event async for event in await client.responses.create(**ask, max_output_tokens=3, stream=True)]
    assert short[-1].type == "response.incomplete" and short[-1].response.status == "incomplete"


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("flash engine install vllm", {"tools": [TOOL]}),
        ("flash config engines.default vllm", {"text": {"format": {"type": "json_schema", "name": "a", "schema": {}}}}),
        ("reasoning can only be", {"reasoning": {"effort": "high"}}),
        ("send the whole conversation as input", {"previous_response_id": "resp_1"}),
        ("send the whole conversation as input", {"conversation": "conv_1"}),
        ("background can only be false", {"background": True}),
        ("truncation can only be", {"truncation": "auto"}),
        ("temperature must be a number from 0 to 2", {"temperature": 3}),
        ("'top_k' is not known", {"extra_body": {"top_k": 3}}),
        ("reads only text", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]}),
        ("reads only messages", {"input": [{"type": "function_call_output", "call_id": "1", "output": "2"}]}),
        ("cannot continue it", {"input": [{"role": "assistant", "content": "I am"}]}),
        ("input must be a text or a list of messages", {"input": []}),
        ("reads at most", {"input": "a " * 5000}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_would_be_ignored_is_refused(
    words: str, given: dict[str, Any], stream: bool, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        await client.responses.create(**{"model": "ada", "input": QUESTION, **given}, stream=stream)
    assert refused.value.param == ("input" if words == "reads at most" else None)


async def test_a_model_that_is_not_there(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean ada"):
        await client.responses.create(model="adda", input=QUESTION)


async def test_a_chat_with_tools_names_the_remedy(client: openai.AsyncOpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    messages: Any = [{"role": "user", "content": QUESTION}]
    with pytest.raises(openai.BadRequestError, match=r"tools can only be .*: engines of vLLM .* engine install vllm"):
        await client.chat.completions.create(model="ada", messages=messages, tools=[tool])
