# SPDX-License-Identifier: Apache-2.0
"""Anthropic's requests and answers, translated; without engines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from anthropic.types import Message, message_count_tokens_params, message_create_params
from hypothesis import given
from hypothesis import strategies as st
from streams import REASONS, TEXTS, events, splits

from flashd.errors import EngineFailed, InvalidArgument, LimitExceeded, NotFound, Unavailable
from flashd.gateway.dialects import anthropic
from flashd.gateway.dialects.anthropic import MessageAnswer, PassedEvents
from flashd.gateway.dialects.chunks import ChunkReader
from flashd.gateway.dialects.dialect import Refused

WHO = [{"role": "user", "content": "Who are you?"}]
# Fields of Anthropic's client that are refused by name, because they are not translated.
REFUSED = {"container", "diagnostics", "user_profile_id", "workspace_id"}


def parsed(raw: bytes) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream: their names and what they say."""
    found = []
    for one in raw.decode().split("\n\n")[:-1]:
        name, said = one.split("\n")
        found.append((name.removeprefix("event: "), json.loads(said.removeprefix("data: "))))
    return found


def told(pieces: Iterable[bytes], *stops: str) -> tuple[bytes, dict[str, object]]:
    """The stream that Anthropic's clients get, and the same as one answer."""
    streamed, whole = (MessageAnswer("ada", stops, id="msg_1") for _ in range(2))
    reader, raw = ChunkReader(), b""
    for piece in pieces:
        for chunk in reader.feed(piece):
            raw += b"".join(streamed.events(chunk))
            whole.take(chunk)
    reader.end()
    return raw + b"".join(streamed.last_events()), whole.whole()


@given(st.data(), st.lists(TEXTS, max_size=8), REASONS)
def test_any_chunking_gives_the_same_events(data: st.DataObject, texts: list[str], reason: str) -> None:
    raw = events([{"content": text} for text in texts], reason, (3, 5))
    stream, whole = told([raw])
    assert told(data.draw(splits(raw))) == (stream, whole)
    names = [name for name, _ in parsed(stream)]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) <= {"content_block_delta"} and all(name == said["type"] for name, said in parsed(stream))
    said = "".join(said["delta"]["text"] for name, said in parsed(stream) if name == "content_block_delta")
    message = Message.model_validate(whole)
    assert message.content[0].type == "text" and message.content[0].text == said == "".join(texts)
    assert message.stop_reason == {"stop": "end_turn", "length": "max_tokens"}[reason]
    assert (message.usage.input_tokens, message.usage.output_tokens) == (3, 5)
    last = dict(parsed(stream))["message_delta"]
    assert last["delta"]["stop_reason"] == message.stop_reason and last["usage"] == whole["usage"]


def test_the_stop_text_is_told() -> None:
    chunk = {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop", "stop_reason": "zz"}]}
    raw = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()
    assert (told([raw], "zz")[1]["stop_reason"], told([raw], "zz")[1]["stop_sequence"]) == ("stop_sequence", "zz")
    assert told([raw], "yy")[1]["stop_reason"] == "end_turn"


@given(st.data())
def test_a_stream_of_the_engines_own_passes_unchanged(data: st.DataObject) -> None:
    good, _ = told([events([{"content": 'an "error": {}'}, {"content": "b"}], "stop", (1, 2))])
    good += anthropic.event("error", {"type": "error", "error": {"type": "api_error", "message": "its own"}})
    watch = PassedEvents()
    assert b"".join([watch.feed(piece) for piece in data.draw(splits(good))]) + watch.rest() == good
    cut = b'data: {"error": {"message": "cut off by a swap", "type": "service_unavailable"}}\n\ndata: [DONE]\n\n'
    watch = PassedEvents()
    with pytest.raises(Refused, match="cut off by a swap") as refused:
        for piece in data.draw(splits(good + cut)):
            watch.feed(piece)
    assert refused.value.status == 503


def test_lines_without_an_end_are_not_kept() -> None:
    with pytest.raises(EngineFailed, match="longer than"):
        PassedEvents().feed(b"x" * (17 << 20))


# -- requests ----------------------------------------------------------------------------------------------------------


def test_every_field_of_anthropics_client_is_known() -> None:
    created = message_create_params.MessageCreateParamsBase.__annotations__.keys()
    counted = message_count_tokens_params.MessageCountTokensParams.__annotations__.keys()
    assert created - anthropic.MESSAGE_FIELDS.keys() <= REFUSED
    assert counted - anthropic.COUNT_FIELDS.keys() <= REFUSED


def test_a_message_becomes_a_chat_completion() -> None:
    content = {
        **{"model": "ada", "max_tokens": 9, "messages": WHO, "system": [{"type": "text", "text": "be brief"}]},
        **{"stop_sequences": ["zz"], "temperature": 0.5, "top_p": 0.9, "top_k": 40, "stream": True},
        **{"metadata": {"user_id": "u"}, "tools": [], "thinking": {"type": "disabled"}},
    }
    request = anthropic.chat_request(content, "ada")
    assert request.is_stream and request.stops == ("zz",)
    assert request.body == {
        **{"model": "ada", "messages": [{"role": "system", "content": "be brief"}, *WHO], "max_tokens": 9},
        **{"stop": ["zz"], "temperature": 0.5, "top_p": 0.9, "top_k": 40},
        **{"stream": True, "stream_options": {"include_usage": True}},
    }
    blocks = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in ("a", "b")]
    counted = anthropic.count_request({"model": "ada", "messages": [{"role": "user", "content": blocks}]}, "ada")
    assert counted["messages"][0]["content"] == [{"type": "text", "text": text} for text in ("a", "b")]
    assert counted["max_tokens"] == 1


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"tools": [{"name": "look"}]}, "tools can only be"),
        ({"thinking": {"type": "enabled"}}, "thinking can only be"),
        ({"output_config": {"effort": "low"}}, "output_config can only be"),
        ({"mcp_servers": []}, "'mcp_servers' is not known"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "poet", "content": "a"}]}, "message 0 has a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "reads only text"),
        ({"messages": [{"role": "user", "content": 3}]}, "no text and no list"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "'name', which is not known"),
        ({"messages": [*WHO, {"role": "assistant", "content": "I"}]}, "cannot continue it"),
        ({"system": 3}, "system has no text"),
    ],
)
def test_what_cannot_be_translated_is_refused(given_: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        anthropic.chat_request({"model": "ada", "max_tokens": 9, "messages": WHO, **given_}, "ada")


def test_the_form_of_errors() -> None:
    form = anthropic.Anthropic()
    for error, kind in (
        (InvalidArgument("a"), "invalid_request_error"),
        (NotFound("a"), "not_found_error"),
        (LimitExceeded("a"), "rate_limit_error"),
        (Unavailable("a"), "overloaded_error"),
        (EngineFailed("a"), "api_error"),
        (Refused("a", status=418), "api_error"),
    ):
        assert form.described(error) == {"type": "error", "error": {"type": kind, "message": "a"}}
    assert parsed(form.ending(NotFound("a"))) == [("error", form.described(NotFound("a")))]
