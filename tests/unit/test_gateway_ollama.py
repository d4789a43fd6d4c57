# SPDX-License-Identifier: Apache-2.0
"""Ollama's requests and answers, translated; without engines."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
from collections.abc import Iterable
from typing import Any

import ollama
import pytest
from gateway_alone import WHISPER
from hypothesis import given
from hypothesis import strategies as st
from streams import DELTAS, REASONS, call, events, splits

from flashd.errors import EngineFailed, FlashdError, InvalidArgument, NotFound
from flashd.gateway.dialects import ollama_requests
from flashd.gateway.dialects.chunks import ChunkReader
from flashd.gateway.dialects.dialect import Refused
from flashd.gateway.dialects.ollama import Ollama, line, repository, shown, tagged
from flashd.gateway.dialects.ollama_answers import Durations, Joined, OllamaAnswer

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(16)).decode()
WHO = [{"role": "user", "content": "Who are you?"}]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
# Fields of Ollama's client for experimental image models, which are refused by name.
PICTURES = {"width", "height", "steps"}


def told(pieces: Iterable[bytes], *, is_chat: bool = True) -> list[dict[str, Any]]:
    """The lines that Ollama's clients get, by a clock that stands still."""
    answer = OllamaAnswer("ada", is_chat, Durations(0, clock=lambda: 1), now=lambda: 0.0)
    reader = ChunkReader()
    lines = [each for piece in pieces for chunk in reader.feed(piece) for each in answer.lines(chunk)]
    reader.end()
    return [*lines, *answer.last_lines()]


@given(st.data(), st.lists(DELTAS, max_size=8), REASONS, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_any_chunking_gives_the_same_lines(
    data: st.DataObject, deltas: list[dict[str, Any]], reason: str, newline: str, is_chat: bool
) -> None:
    whole = events(deltas, reason, (3, 5), newline=newline)
    lines = told([whole], is_chat=is_chat)
    assert told(data.draw(splits(whole)), is_chat=is_chat) == lines
    assert told([bytes([byte]) for byte in whole], is_chat=is_chat) == lines
    said = [each["message"]["content"] if is_chat else each["response"] for each in lines]
    assert "".join(said) == "".join(delta.get("content", "") for delta in deltas)
    assert [each["done"] for each in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["done_reason"] == reason
    assert (lines[-1]["prompt_eval_count"], lines[-1]["eval_count"]) == (3, 5)
    assert [json.loads(line(each)) for each in lines] == lines


@given(st.lists(DELTAS, max_size=8), st.booleans())
def test_joined_lines_say_the_same(deltas: list[dict[str, Any]], is_chat: bool) -> None:
    joined = Joined()
    lines = told([events(deltas, "stop", (1, 1))], is_chat=is_chat)
    for each in lines:
        joined.add(each)
    whole = joined.whole()
    said = whole["message"] if is_chat else whole
    assert said["content" if is_chat else "response"] == "".join(delta.get("content", "") for delta in deltas)
    assert said.get("thinking", "") == "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert whole["done"] is True and whole["done_reason"] == "stop"
    (ollama.ChatResponse if is_chat else ollama.GenerateResponse)(**whole)


@given(st.data())
def test_calls_of_tools_are_told_whole(data: st.DataObject) -> None:
    arguments = [{"place": "Å"}, {}]
    raw = [json.dumps(arguments[0]), ""]
    cut = data.draw(st.integers(0, len(raw[0])))
    deltas = [*call(0, "look", [raw[0][:cut], raw[0][cut:]]), *call(1, "wait", [raw[1]])]
    lines = told(data.draw(splits(events(deltas, "tool_calls", (1, 1)))))
    assert [each["function"]["arguments"] for each in lines[-2]["message"]["tool_calls"]] == arguments
    assert lines[-1]["done_reason"] == "stop" and len(lines) == 2
    message = ollama.ChatResponse(**lines[-2]).message
    assert [each.function.name for each in message.tool_calls or ()] == ["look", "wait"]


def test_calls_that_are_no_json_are_an_error() -> None:
    with pytest.raises(EngineFailed, match="arguments that are not JSON"):
        told([events(call(0, "look", ["{"]), "tool_calls", (1, 1))])


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (b"", EngineFailed, "in the middle"),
        (b'data: {"choices": []}\n\n', EngineFailed, "in the middle"),
        (b"data: what?\n\n", EngineFailed, "not JSON"),
        (b"data: []\n\n", EngineFailed, "not JSON"),
        (b'data: {"error": {"message": "cut", "type": "service_unavailable"}}\n\n', Refused, "cut"),
        (b'data: {"error": "no"}\n\ndata: [DONE]\n\n', Refused, "no"),
        (b"data: " + b"x" * (17 << 20), EngineFailed, "longer than"),
    ],
)
def test_a_stream_that_is_no_answer(said: bytes, kind: type[FlashdError], words: str) -> None:
    with pytest.raises(kind, match=words):
        told([said])


@given(st.lists(st.dictionaries(st.sampled_from(["choices", "usage", "delta"]), VALUES), max_size=5))
def test_an_engine_may_say_anything(contents: list[dict[str, Any]]) -> None:
    said = "".join(f"data: {json.dumps(content)}\n\n" for content in contents) + "data: [DONE]\n\n"
    for each in told([said.encode()]):
        line(each)


def test_durations_add_up() -> None:
    times = itertools.count(100, 10)
    durations = Durations(100, clock=lambda: next(times))
    answer = OllamaAnswer("ada", True, durations, now=lambda: 0.0)
    durations.note_asked()  # 100
    for chunk in ChunkReader().feed(events([{"content": "a"}, {"content": "b"}], "stop", (1, 2))):
        list(answer.lines(chunk))  # the first at 110
    last = list(answer.last_lines())[-1]  # 120
    parts = (last["load_duration"], last["prompt_eval_duration"], last["eval_duration"])
    assert parts == (0, 10, 10) and last["total_duration"] == 20


# -- requests ----------------------------------------------------------------------------------------------------------


def test_every_field_of_ollamas_client_is_known() -> None:
    from ollama._types import ChatRequest, EmbeddingsRequest, EmbedRequest, GenerateRequest, PullRequest, ShowRequest

    assert ollama.Options.model_fields.keys() <= ollama_requests.OPTIONS.keys()
    for theirs, ours in (
        (ChatRequest, ollama_requests.CHAT),
        (GenerateRequest, ollama_requests.GENERATE),
        (EmbedRequest, ollama_requests.EMBED),
        (EmbeddingsRequest, ollama_requests.EMBEDDINGS),
        (ShowRequest, ollama_requests.SHOW),
        (PullRequest, ollama_requests.PULL),
    ):
        assert set(theirs.model_fields) - set(ours) <= PICTURES


def test_a_chat_becomes_a_chat_completion() -> None:
    options = {
        **{"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": 7, "stop": ["a", "b"]},
        **{"num_predict": 12, "repeat_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3},
        **{"num_ctx": 4096, "num_gpu": 1, "mirostat": 0, "repeat_last_n": -1},
    }
    request = ollama_requests.chat({"model": "ada", "messages": WHO, "options": options, "keep_alive": "5m"})
    assert request.asks and request.is_stream and not request.unloads
    assert request.asks.path == "/v1/chat/completions"
    assert json.loads(request.asks.raw("ada")) == {
        **{"model": "ada", "messages": WHO, "stream": True, "stream_options": {"include_usage": True}},
        **{"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": 7, "stop": ["a", "b"]},
        **{"max_tokens": 12, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3},
    }


@pytest.mark.parametrize(
    ("given_", "body"),
    [
        ({"options": {"num_predict": -1, "seed": -1, "stop": []}}, {}),
        ({"format": "json"}, {"response_format": {"type": "json_object"}}),
        ({"format": ""}, {}),
        (
            {"format": {"type": "object"}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": {"type": "object"}},
                }
            },
        ),
        ({"think": False}, {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}),
        ({"think": "high"}, {"reasoning_effort": "high"}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
        ({"tools": [{"type": "function"}]}, {"tools": [{"type": "function"}]}),
        ({"tools": [], "truncate": True, "shift": False}, {}),
    ],
)
def test_fields_of_chats(given_: dict[str, Any], body: dict[str, Any]) -> None:
    asks = ollama_requests.chat({"model": "ada", "messages": WHO, **given_}).asks
    assert asks is not None
    common = {"messages": WHO, "stream": True, "stream_options": {"include_usage": True}}
    assert asks.body == common | body


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"options": {"dry": 1}}, "'dry' is not known in options"),
        ({"options": {"temperature": "hot"}}, "temperature must be a number"),
        ({"options": {"temperature": float("nan")}}, "temperature must be a number"),
        ({"options": {"mirostat": 1}}, "mirostat can only be 0"),
        ({"options": {"repeat_last_n": 64}}, "repeat_last_n can only be -1"),
        ({"options": 3}, "options must be an object"),
        ({"keep_alive": "soon"}, "keep_alive must be"),
        ({"think": "much"}, "think must be"),
        ({"format": "xml"}, "format must be"),
        ({"sampler": 1}, "'sampler' is not known in /api/chat"),
        ({"messages": [{"role": "poet", "content": "a"}]}, "message 0 has a role"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "content that is not a text"),
        ({"messages": [{"role": "user", "content": "a", "images": ["bm8="]}]}, "not a picture"),
        ({"messages": [{"role": "user", "content": "a", "audio": "bm8="}]}, "'audio', which is not known"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "no call of one is before it"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": 1}]}]}, "not calls of functions"),
    ],
)
def test_what_cannot_be_translated_is_refused(given_: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        ollama_requests.chat({"model": "ada", "messages": WHO, **given_})


@given(st.sampled_from(["chat", "generate", "embed", "embeddings"]), VALUES, st.data())
def test_any_request_is_translated_or_refused_in_few_words(path: str, value: Any, data: st.DataObject) -> None:
    known = getattr(ollama_requests, path.upper())
    name = data.draw(st.sampled_from(sorted(known)) | st.text(max_size=2000))
    base = {"messages": WHO} if path == "chat" else {"input": "a"} if path == "embed" else {"prompt": "a"}
    try:
        request = getattr(ollama_requests, path)({"model": "ada", **base, name: value})
    except FlashdError as error:
        assert isinstance(error, InvalidArgument) and len(str(error)) < 2000
    else:
        assert request.asks is None or json.loads(request.asks.raw("ada"))["model"] == "ada"


def test_pictures_become_data_urls() -> None:
    asks = ollama_requests.chat({"messages": [{"role": "user", "content": "what?", "images": [PNG]}]}).asks
    assert asks is not None
    text, picture = asks.body["messages"][0]["content"]
    assert text == {"type": "text", "text": "what?"}
    assert picture == {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}


def test_results_of_tools_find_their_calls() -> None:
    calls = [{"function": {"name": name, "arguments": {"of": name}}} for name in ("look", "wait", "look")]
    messages = [
        *WHO,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "waited", "tool_name": "wait"},
        {"role": "tool", "content": "first", "tool_name": "look"},
        {"role": "tool", "content": "last"},
    ]
    asks = ollama_requests.chat({"messages": messages}).asks
    assert asks is not None
    _, called, *results = asks.body["messages"]
    ids = [each["id"] for each in called["tool_calls"]]
    assert len(set(ids)) == 3 and called["tool_calls"][0]["function"]["arguments"] == '{"of": "look"}'
    assert [each["tool_call_id"] for each in results] == [ids[1], ids[0], ids[2]]


def test_generation_goes_by_the_template_unless_it_is_raw() -> None:
    asks = ollama_requests.generate({"prompt": "a", "system": "be brief", "suffix": "", "template": ""}).asks
    assert asks is not None and asks.path == "/v1/chat/completions"
    assert [each["role"] for each in asks.body["messages"]] == ["system", "user"]
    raw = ollama_requests.generate({"prompt": "a", "raw": True}).asks
    assert raw is not None and (raw.path, raw.body["prompt"]) == ("/v1/completions", "a")
    for refused in ({"raw": True, "system": "b"}, {"suffix": "b"}, {"template": "b"}, {"context": [1]}):
        with pytest.raises(InvalidArgument):
            ollama_requests.generate({"prompt": "a", **refused})


@pytest.mark.parametrize("keep_alive", [0, 0.0, "0", "0s", "0m0s"])
def test_nothing_to_answer_loads_or_unloads(keep_alive: object) -> None:
    for ask, empty in (
        (ollama_requests.chat, {"messages": []}),
        (ollama_requests.generate, {"prompt": ""}),
        (ollama_requests.embed, {"input": ""}),
        (ollama_requests.embed, {"input": []}),
        (ollama_requests.embeddings, {}),
    ):
        assert ask({"model": "ada", **empty}).asks is None
        assert not ask({"model": "ada", **empty, "keep_alive": "1h30m"}).unloads
        assert not ask({"model": "ada", **empty, "keep_alive": -1}).unloads
        assert ask({"model": "ada", **empty, "keep_alive": keep_alive}).unloads


def test_names() -> None:
    assert (tagged("ada"), tagged("ada:7b")) == ("ada:latest", "ada:7b")
    assert repository("hf.co/someone/ada:latest") == repository("https://huggingface.co/someone/ada") == "someone/ada"


def test_a_model_of_an_older_daemon_is_asked_for_completions() -> None:
    """Programs offer none of a model without capabilities."""
    assert shown("whisper", WHISPER)["capabilities"] == ["completion"]
    embeds = dataclasses.replace(WHISPER, capabilities=("embedding",))
    assert shown("whisper", embeds)["capabilities"] == ["embedding"]


def test_errors_name_ollamas_parameters() -> None:
    ollamas = Ollama()
    assert ollamas.described(NotFound("no", hint="or else")) == {"error": "no\nor else"}
    refused = Refused("response_format is not supported", status=400, param="response_format")
    assert ollamas.described(refused) == {"error": "format: response_format is not supported"}
    assert ollamas.ending(refused).endswith(b"\n") and json.loads(ollamas.ending(refused))["error"]
