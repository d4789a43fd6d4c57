# SPDX-License-Identifier: Apache-2.0
"""Anthropic's interface: its errors, and its messages as OpenAI's chat completions for engines that lack them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from flashd import json_values
from flashd.client.results import Model
from flashd.errors import EngineFailed, FlashdError, InvalidArgument
from flashd.gateway.dialects import fields
from flashd.gateway.dialects.chunks import MOST_EVENT_BYTES, Chunk, Usage, stream_error
from flashd.gateway.dialects.contents import texts
from flashd.gateway.dialects.dialect import status_of
from flashd.gateway.dialects.fields import Field
from flashd.json_values import JsonObject, vllm_only
from flashd.units import format_bytes

_TYPES = {
    400: "invalid_request_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_NOT_DONE = "not translated: engines of vLLM can do it"
_HARMLESS = "for the bookkeeping of services; no effect here"
_SHOWN = 80
_PARTS = ("text",), ("cache_control",)  # the kinds that are read, and fields without effect

# What is translated for engines without Anthropic's interface; to others requests go as they are.
_COMMON = (
    Field("model", json_values.text),
    Field("messages", fields.objects),
    Field("system", lambda value: value, does="becomes the first message"),
    Field("tools", vllm_only([]), does=_NOT_DONE),
    Field(
        "tool_choice", json_values.only({"type": "auto"}, {"type": "none"}), does="there are no tools to choose from"
    ),
    Field("thinking", vllm_only({"type": "disabled"}), does=_NOT_DONE),
    Field("cache_control", json_values.anything, does="prefixes are cached without it"),
    Field("output_config", vllm_only({}), does=_NOT_DONE),
    Field("speed", json_values.only("standard"), does="engines here have one speed"),
    *(Field(name, json_values.anything, does=_HARMLESS) for name in ("metadata", "service_tier", "inference_geo")),
)
MESSAGE_FIELDS = fields.table(
    [
        *_COMMON,
        Field("max_tokens", json_values.whole(1, fields.MAX_INT32), "max_tokens"),
        Field("stop_sequences", fields.texts, "stop"),
        Field("temperature", json_values.number(0.0, 1.0), "temperature"),
        Field("top_p", json_values.number(0.0, 1.0), "top_p"),
        Field("top_k", json_values.whole(0, fields.MAX_INT64), "top_k"),
        Field("stream", json_values.flag),
    ]
)
COUNT_FIELDS = fields.table(_COMMON)


class Anthropic:
    """The form of errors (https://docs.anthropic.com/en/api/errors)."""

    def described(self, error: FlashdError) -> dict[str, object]:
        return {"type": "error", "error": {"type": _TYPES.get(status_of(error), "api_error"), "message": str(error)}}

    def ending(self, error: FlashdError) -> bytes:
        return event("error", self.described(error))


def waiting(_words: str, _as_text: bool) -> bytes:
    """A piece of a stream whose answer has not begun. It has no place for words."""
    return event("ping", {"type": "ping"})


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request for a message, as a body for /v1/chat/completions that streams."""

    body: Mapping[str, Any]
    is_stream: bool
    stops: Sequence[str]


def chat_request(content: Mapping[str, object], model: str) -> ChatRequest:
    """Translates a request for a message. Raises InvalidArgument for what cannot be translated."""
    read = fields.read_fields(content, MESSAGE_FIELDS, "/v1/messages of this engine")
    if "max_tokens" not in read:
        raise InvalidArgument("max_tokens is missing", hint="it is the most tokens to generate")
    body = {
        "model": model,
        "messages": _conversation(read),
        **fields.translated(read, MESSAGE_FIELDS),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if not body.get("stop"):
        body.pop("stop", None)
    return ChatRequest(body, read.get("stream", False), tuple(read.get("stop_sequences", ())))


def count_request(content: Mapping[str, object], model: str) -> Mapping[str, Any]:
    """Translates a request for a number of tokens: an engine says it with an answer of one token."""
    read = fields.read_fields(content, COUNT_FIELDS, "/v1/messages/count_tokens of this engine")
    return {"model": model, "messages": _conversation(read), "max_tokens": 1}


def _conversation(read: Mapping[str, Any]) -> list[JsonObject]:
    messages = read.get("messages")
    if not messages:
        raise InvalidArgument("messages must be a list with at least one message")
    said = [_message(message, index) for index, message in enumerate(messages)]
    if said[-1]["role"] == "assistant":
        hint = "end with a message of the user, or use an engine of vLLM"
        raise InvalidArgument("the last message is the assistant's, and this engine cannot continue it", hint=hint)
    system = texts(read["system"], "system", *_PARTS) if read.get("system") else ""
    return [{"role": "system", "content": system}, *said] if system else said


def _message(message: Mapping[str, Any], index: int) -> JsonObject:
    where = f"message {index}"
    role = message.get("role")
    if role not in ("user", "assistant", "system"):
        raise InvalidArgument(f"{where} has a role that is none of user, assistant and system")
    if unknown := [name for name in message if name not in ("role", "content")]:
        raise InvalidArgument(f"{where} has {unknown[0][:_SHOWN]!r}, which is not known")
    return {"role": role, "content": texts(message.get("content"), where, *_PARTS)}


def entry(name: str, model: Model) -> dict[str, object]:
    """A model, or the adapter `name` of one, as GET /v1/models lists it for Anthropic's clients."""
    created = datetime.fromtimestamp(model.created_at, UTC).isoformat().replace("+00:00", "Z")
    return {"type": "model", "id": name, "display_name": name, "created_at": created}


def listed(models: Sequence[tuple[str, Model]]) -> dict[str, object]:
    """The answer of GET /v1/models, which has all models at once."""
    names = [name for name, _ in models]
    first, last = (names[0], names[-1]) if names else (None, None)
    return {
        "data": [entry(name, model) for name, model in models],
        "has_more": False,
        "first_id": first,
        "last_id": last,
    }


def event(kind: str, content: Mapping[str, object]) -> bytes:
    """A server-sent event."""
    said = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"event: {kind}\ndata: {said}\n\n".encode(errors="replace")


@dataclass(slots=True)
class PassedEvents:
    """An engine's own stream of Anthropic's events, passed on byte for byte, and watched for an error in OpenAI's form.

    Anthropic's clients would ignore it, and take what has come for the whole message. Lines that are not complete yet
    are held back.
    """

    _line: bytearray = field(default_factory=bytearray)
    _is_named: bool = False

    def feed(self, received: bytes) -> bytes:
        """Returns what to pass on. Raises Refused in place of an error that has no name."""
        *ends, last = received.split(b"\n")
        passed = bytearray()
        for end in ends:
            self._line += end + b"\n"
            self._look(self._line)
            passed += self._line
            self._line.clear()
        self._line += last
        if len(self._line) > MOST_EVENT_BYTES:
            raise EngineFailed(f"the engine's answer has a line longer than {format_bytes(MOST_EVENT_BYTES)}")
        return bytes(passed)

    def rest(self) -> bytes:
        return bytes(self._line)

    def _look(self, line: bytes | bytearray) -> None:
        if line.startswith(b"event:"):
            self._is_named = True
        elif not line.strip():
            self._is_named = False
        elif line.startswith(b"data:") and not self._is_named and b'"error"' in line:
            try:
                content = json.loads(line[5:])
            except (ValueError, RecursionError):
                return
            if isinstance(content, dict) and content.get("error"):
                raise stream_error(content["error"])


@dataclass(slots=True)
class MessageAnswer:
    """An answer as it grows, whole or as Anthropic's events."""

    model: str
    stops: Sequence[str] = ()
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    _texts: list[str] = field(default_factory=list)
    _reason: str = ""
    _stopped_by: str = ""
    _usage: Usage = field(default_factory=lambda: Usage(0, 0))
    _has_begun: bool = False

    def events(self, chunk: Chunk) -> Iterator[bytes]:
        """The events that tell of a piece."""
        if not self._has_begun:
            self._has_begun = True
            yield event("message_start", {"type": "message_start", "message": self._message([], None, Usage(0, 0))})
            block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
            yield event("content_block_start", block)
        self.take(chunk)
        if chunk.text:
            delta = {"type": "text_delta", "text": chunk.text}
            yield event("content_block_delta", {"type": "content_block_delta", "index": 0, "delta": delta})

    def last_events(self) -> Iterator[bytes]:
        yield event("content_block_stop", {"type": "content_block_stop", "index": 0})
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stopped_by or None}
        yield event("message_delta", {"type": "message_delta", "delta": delta, "usage": _usage(self._usage)})
        yield event("message_stop", {"type": "message_stop"})

    def take(self, chunk: Chunk) -> None:
        self._texts.append(chunk.text)
        self._reason = chunk.finish_reason or self._reason
        self._stopped_by = chunk.stopped_by if chunk.stopped_by in self.stops else self._stopped_by
        self._usage = chunk.usage or self._usage

    def whole(self) -> dict[str, object]:
        content = [{"type": "text", "text": "".join(self._texts)}]
        return self._message(content, self._stop_reason, self._usage)

    @property
    def _stop_reason(self) -> str:
        if self._stopped_by:
            return "stop_sequence"
        return "max_tokens" if self._reason == "length" else "end_turn"

    def _message(self, content: Sequence[object], reason: str | None, usage: Usage) -> dict[str, object]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": self._stopped_by or None,
            "usage": _usage(usage),
        }


def _usage(usage: Usage) -> dict[str, int]:
    return {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
