# SPDX-License-Identifier: Apache-2.0
"""Asks an engine, by way of the gateway, for everything that the documentation says of its kind: it does it or refuses.

What is said is the table of packaging/reference/capabilities.py; the page "Use it from your program" is made from it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from waiting import PATIENCE_S

sys.path.append(str(Path(__file__).parents[2] / "packaging" / "reference"))
from capabilities import CAPABILITIES

_CHAT = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0, "max_tokens": 5}
_SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
_TOOL = {"type": "function", "function": {"name": "weather", "parameters": _SCHEMA}}
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
_STOPS = set("ae. ")
_SEEN = [
    {"type": "text", "text": "What is this?"},
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_PIXEL}"}},
]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, and what its answer must be like. `embeds` is whether it is for a model for embeddings; with a `file`,
    it is a form."""

    path: str
    body: Mapping[str, Any]
    holds: Callable[[Any], object]
    embeds: bool = False
    file: bytes = b""


def _first(answer: Any) -> Any:
    return answer["choices"][0]


ASKS: Mapping[str, Ask] = {
    "chat": Ask("/v1/chat/completions", _CHAT, lambda a: _first(a)["message"]["content"]),
    "completion": Ask("/v1/completions", {"prompt": "I am", "max_tokens": 3}, lambda a: _first(a)["text"]),
    "streaming": Ask("/v1/chat/completions", {**_CHAT, "stream": True}, lambda lines: len(lines) > 3),
    "repeatable sampling": Ask(
        "/v1/chat/completions", {**_CHAT, "temperature": 1.5, "seed": 5}, lambda a: _first(a)["message"]["content"]
    ),
    "texts that end the answer": Ask(
        "/v1/completions", {"prompt": "I am", "temperature": 0, "max_tokens": 30, "stop": [*_STOPS]},
        lambda a: _first(a)["finish_reason"] == "stop" and not _STOPS & set(_first(a)["text"]),
    ),
    "biased tokens": Ask(
        "/v1/completions", {"prompt": "I am", "max_tokens": 3, "logit_bias": {"68": 100}},
        lambda a: len(set(_first(a)["text"])) == 1,
    ),
    "Anthropic's messages": Ask("/v1/messages", _CHAT, lambda a: a["content"][0]["text"] and a["stop_reason"]),
    "OpenAI's responses": Ask(
        "/v1/responses", {"input": "Who are you?", "max_output_tokens": 5}, lambda a: a["object"] == "response"
    ),
    "tools": Ask("/v1/chat/completions", {**_CHAT, "tools": [_TOOL]}, lambda a: _first(a)["message"]["role"]),
    "a tool that must be called": Ask(
        "/v1/chat/completions", {**_CHAT, "max_tokens": 120, "tools": [_TOOL], "tool_choice": "required"},
        lambda a: _first(a)["message"]["tool_calls"][0]["function"]["name"] == "weather",
    ),
    "structured output": Ask(
        "/v1/chat/completions",
        {**_CHAT, "max_tokens": 80,
         "response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": _SCHEMA}}},
        lambda a: json.loads(_first(a)["message"]["content"]) == {"city": "Oslo"},
    ),
    "log probabilities": Ask(
        "/v1/chat/completions", {**_CHAT, "logprobs": True, "top_logprobs": 2},
        lambda a: [len(each["top_logprobs"]) for each in _first(a)["logprobs"]["content"]] == [2] * 5,
    ),
    "log probabilities of the prompt": Ask(
        "/v1/chat/completions", {**_CHAT, "prompt_logprobs": 1}, lambda a: len(a["prompt_logprobs"]) > 5
    ),
    "several answers": Ask(
        "/v1/chat/completions", {**_CHAT, "n": 3, "temperature": 1}, lambda a: len(a["choices"]) == 3
    ),
    "vision": Ask("/v1/chat/completions", {**_CHAT, "messages": [{"role": "user", "content": _SEEN}]}, lambda a: a),
    "transcription": Ask("/v1/audio/transcriptions", {}, lambda a: a["text"], file=b"RIFF"),
    "embeddings": Ask(
        "/v1/embeddings", {"input": ["one", "two"]}, lambda a: [len(e["embedding"]) > 9 for e in a["data"]], embeds=True
    ),
    "rerank": Ask(
        "/v1/rerank", {"query": "a cup", "documents": ["a cup", "seven"]},
        lambda a: a["results"][0]["index"] == 0 and len(a["results"]) == 2, embeds=True,
    ),
    "score": Ask(
        "/v1/score", {"text_1": "a cup", "text_2": ["a cup", "seven"]},
        lambda a: a["data"][0]["score"] == max(each["score"] for each in a["data"]), embeds=True,
    ),
    "tokens of a text": Ask("/tokenize", {"prompt": "a cup"}, lambda a: a["count"] == len(a["tokens"]) > 0),
}  # fmt: skip
# What the models here cannot do, because they neither see nor hear: tests of their own prove it.
ELSEWHERE = {
    (
        "a tool that must be called",
        "llama.cpp",
    ): "tests/engines/test_llama_clients.py::test_openais_client_has_the_model_call_a_tool",
    ("rerank", "llama.cpp"): "tests/engines/test_llama_clients.py::test_a_model_for_reranking_ranks",
    ("vision", "vllm"): "tests/engines/test_vllm_engine.py::test_what_other_weights_have_made_is_forgotten",
    (
        "transcription",
        "vllm",
    ): "tests/engines/test_recordings.py::test_a_recording_is_transcribed_as_by_the_engine_itself",
}
every_capability = pytest.mark.parametrize("name", CAPABILITIES)


async def check(name: str, kind: str, url: str, model: str, embedder: str) -> None:
    """`model` answers questions and `embedder` makes vectors, with engines of a kind."""
    if where := ELSEWHERE.get((name, kind)):
        file, _, test = where.partition("::")
        assert f"def {test}(" in (Path(__file__).parents[2] / file).read_text()
        return
    ask = ASKS[name]
    body = {"model": embedder if ask.embeds else model, **ask.body}
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
        form = {"data": body, "files": {"file": ask.file}} if ask.file else {"json": body}
        answer = await client.post(ask.path, **form)
        if not CAPABILITIES[name].is_done(kind):
            assert answer.status_code in (400, 404, 501), (name, answer.text)
            assert answer.json()["error"]["message"]
            return
        assert answer.status_code == 200, (name, answer.text)
        is_stream = body.get("stream", False)
        assert ask.holds(answer.text.split("\n\n") if is_stream else answer.json()), (name, answer.text)
        if "seed" in body:
            again = await client.post(ask.path, json=body)
            assert ask.holds(again.json()) == ask.holds(answer.json())
