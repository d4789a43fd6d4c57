# SPDX-License-Identifier: Apache-2.0
"""OpenAI's responses as its chat completions, for engines that lack them: text, whole or as events
(https://platform.openai.com/docs/api-reference/responses). Nothing is kept between requests."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flashd import json_values
from flashd.errors import InvalidArgument
from flashd.gateway.dialects import fields
from flashd.gateway.dialects.chunks import Chunk, Usage
from flashd.gateway.dialects.contents import texts
from flashd.gateway.dialects.fields import Field
from flashd.json_values import JsonObject, WrongValue, vllm_only

PATH = "/v1/responses"
_NOT_DONE = "not translated: engines of vLLM can do it"
_HARMLESS = "for the bookkeeping of services; no effect here"
_SHOWN = 80
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_OF_MESSAGES = ("type", "role", "content", "id", "status")
# An engine names a parameter of the chat completion that it was asked for.
PARAMETERS = {"messages": "input", "max_tokens": "max_output_tokens"}


def _earlier(_: object) -> None:
    raise WrongValue(
        "means what was said earlier, and nothing is kept here", hint="send the whole conversation as input"
    )


def _stream_options(value: object) -> None:
    if not isinstance(value, dict) or not value.keys() <= {"include_obfuscation"}:
        raise WrongValue("can only have include_obfuscation here")


FIELDS = fields.table(
    [
        Field("model", json_values.text),
        Field("input", lambda value: value),
        Field("instructions", json_values.text, does="becomes the first message"),
        Field("max_output_tokens", json_values.whole(1, fields.MAX_INT32), "max_tokens"),
        Field("temperature", json_values.number(0.0, 2.0), "temperature"),
        Field("top_p", json_values.number(0.0, 1.0), "top_p"),
        Field("stream", json_values.flag),
        Field("stream_options", _stream_options, does="include_obfuscation: streams are not padded"),
        Field("previous_response_id", _earlier),
        Field("conversation", _earlier),
        Field("tools", vllm_only([]), does=_NOT_DONE),
        Field("tool_choice", json_values.only("none", "auto"), does="there are no tools to choose from"),
        Field("parallel_tool_calls", json_values.flag, does="there are no tools to call"),
        Field("max_tool_calls", json_values.anything, does="there are no tools to call"),
        Field("text", vllm_only({}, {"format": {"type": "text"}}), does=_NOT_DONE),
        Field("reasoning", vllm_only({}), does=_NOT_DONE),
        Field("top_logprobs", vllm_only(0), does=_NOT_DONE),
        Field("include", vllm_only([]), does=_NOT_DONE),
        Field("background", json_values.only(False), does="answers come with the request"),
        Field("truncation", json_values.only("disabled"), does="what is too long for the model is refused"),
        Field("metadata", fields.mapping, does="is in the answer"),
        *(
            Field(name, json_values.anything, does=_HARMLESS)
            for name in ("store", "user", "service_tier", "safety_identifier", "prompt_cache_key",
                         "prompt_cache_retention")
        ),
    ]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """A request for a response: the body for /v1/chat/completions, which streams, and the fields as they were read."""

    body: Mapping[str, Any]
    read: Mapping[str, Any]


def chat_request(content: Mapping[str, object], model: str) -> ResponseRequest:
    """Translates a request. Raises InvalidArgument for what cannot be translated."""
    read = fields.read_fields(content, FIELDS, f"{PATH} of this engine")
    body = {
        "model": model,
        "messages": _conversation(read),
        **fields.translated(read, FIELDS),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return ResponseRequest(body, read)


def _conversation(read: Mapping[str, Any]) -> list[JsonObject]:
    given = read.get("input")
    if not given or not isinstance(given, str | list):
        raise InvalidArgument("input must be a text or a list of messages, and not empty")
    said = (
        [{"role": "user", "content": given}]
        if isinstance(given, str)
        else list(map(_message, given, range(len(given))))
    )
    if said[-1]["role"] == "assistant":
        hint = "end with a message of the user, or use an engine of vLLM"
        raise InvalidArgument("the last message is the assistant's, and this engine cannot continue it", hint=hint)
    instructions = read.get("instructions")
    return [{"role": "system", "content": instructions}, *said] if instructions else said


def _message(item: object, index: int) -> JsonObject:
    where = f"input {index}"
    if not isinstance(item, dict):
        raise InvalidArgument(f"{where} is not an object")
    if (kind := item.get("type", "message")) != "message":
        shown = kind[:_SHOWN] if isinstance(kind, str) else "no text"
        raise InvalidArgument(
            f"{where} has the type {shown!r}; this engine reads only messages", hint=json_values.ASK_VLLM
        )
    if item.get("role") not in _ROLES:
        raise InvalidArgument(f"{where} has a role that is none of {', '.join(_ROLES)}")
    if unknown := [name for name in item if item[name] and name not in _OF_MESSAGES]:
        raise InvalidArgument(f"{where} has {unknown[0][:_SHOWN]!r}, which is not known")
    kinds, harmless = ("input_text", "output_text"), ("annotations", "logprobs")
    return {"role": _ROLES[item["role"]], "content": texts(item.get("content"), where, kinds, harmless)}


@dataclass(slots=True)
class ResponseAnswer:
    """A response as it grows, whole or as events."""

    model: str
    read: Mapping[str, Any]
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created_at: int = field(default_factory=lambda: int(time.time()))
    _texts: list[str] = field(default_factory=list)
    _reason: str = ""
    _usage: Usage | None = None
    _count: int = 0  # of events

    def take(self, chunk: Chunk) -> None:
        self._texts.append(chunk.text)
        self._reason = chunk.finish_reason or self._reason
        self._usage = chunk.usage or self._usage

    def events(self, chunk: Chunk) -> Iterator[bytes]:
        """The events that tell of a piece."""
        if not self._count:
            yield self._event("response.created", response=self._response("in_progress", []))
            yield self._event("response.in_progress", response=self._response("in_progress", []))
            yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
            yield self._event("response.content_part.added", **self._place, part=self._part(""))
        self.take(chunk)
        if chunk.text:
            yield self._event("response.output_text.delta", **self._place, delta=chunk.text, logprobs=[])

    def last_events(self) -> Iterator[bytes]:
        text, whole = "".join(self._texts), self.whole()
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=self._part(text))
        yield self._event("response.output_item.done", output_index=0, item=self._message())
        yield self._event(f"response.{whole['status']}", response=whole)

    def whole(self) -> JsonObject:
        return self._response(self._status, [self._message()])

    @property
    def _status(self) -> str:
        return "incomplete" if self._reason == "length" else "completed"

    @property
    def _place(self) -> JsonObject:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    @property
    def _item_id(self) -> str:
        return self.id.replace("resp_", "msg_", 1)

    def _message(self) -> JsonObject:
        return self._item(self._status, [self._part("".join(self._texts))])

    def _item(self, status: str, parts: list[JsonObject]) -> JsonObject:
        return {"type": "message", "id": self._item_id, "status": status, "role": "assistant", "content": parts}

    @staticmethod
    def _part(text: str) -> JsonObject:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _response(self, status: str, output: list[JsonObject]) -> JsonObject:
        asked = {name: self.read.get(name) for name in ("instructions", "max_output_tokens", "temperature", "top_p")}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "model": self.model,
            "output": output,
            "usage": _usage(self._usage) if self._usage else None,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **asked,
            "metadata": self.read.get("metadata", {}),
            "background": False,
            "parallel_tool_calls": self.read.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
        }

    def _event(self, kind: str, **content: object) -> bytes:
        said = json.dumps({"type": kind, "sequence_number": self._count, **content}, separators=(",", ":"))
        self._count += 1
        return f"event: {kind}\ndata: {said}\n\n".encode()


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
