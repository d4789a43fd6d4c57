# SPDX-License-Identifier: Apache-2.0
"""Parses OpenAI's request bodies, and checks them field by field, so that only valid values reach the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashd.json_values import WrongValue
from flashd.workers.torch import fields
from flashd.workers.torch.fields import CHAT, COMPLETION, EMBEDDING, MAX_INPUTS, is_token

MAX_BODY_BYTES = 8 << 20
_MESSAGE = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
_SHOWN = 80  # characters of a name that a client made up


class BadRequest(Exception):
    """Raised for an invalid request, with a message for the user, the parameter concerned, and the HTTP status."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling of a request.

    None stands for the default in the model's generation_config.json. Temperature 0 is greedy.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for generation. `prompt` is text, token ids, or the messages of a chat."""

    model: str
    prompt: str | list[int]
    messages: Sequence[dict[str, object]]
    sampling: Sampling
    stream: bool
    include_usage: bool
    template_options: dict[str, object]
    add_special_tokens: bool
    return_token_ids: bool


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A request for embeddings. `inputs` are texts or token ids."""

    model: str
    inputs: Sequence[str | list[int]]
    is_base64: bool
    dimensions: int | None


def parse_body(raw: bytes) -> dict[str, object]:
    try:
        body = json.loads(raw)
        if b"\\ud" in raw.lower():
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRequest("the body has half of a surrogate pair, which is not valid text") from None
    except (ValueError, RecursionError):
        raise BadRequest("the body is not valid JSON") from None
    if not isinstance(body, dict):
        raise BadRequest("the body is not a JSON object")
    return body


def chat_request(body: dict[str, object]) -> GenerationRequest:
    read = _read(body, CHAT)
    messages = read.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message", param="messages")
    return _request(read, "", [_message(message, index) for index, message in enumerate(messages)])


def completion_request(body: dict[str, object]) -> GenerationRequest:
    read = _read(body, COMPLETION)
    prompt = read.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    is_text = isinstance(prompt, str) and prompt != ""
    if not is_text and not _is_tokens(prompt):
        message = "prompt must be a non-empty text or a list of token ids; only one per request"
        raise BadRequest(message, param="prompt")
    return _request(read, prompt, [])


def embedding_request(body: dict[str, object]) -> EmbeddingRequest:
    read = _read(body, EMBEDDING)
    found = read.get("input")
    inputs = [found] if isinstance(found, str) or _is_tokens(found) else found
    if (
        not isinstance(inputs, list)
        or not inputs
        or not all((one and isinstance(one, str)) or _is_tokens(one) for one in inputs)
    ):
        raise BadRequest("input must be a text, a list of token ids, or a list of either; not empty", param="input")
    if len(inputs) > MAX_INPUTS:
        raise BadRequest(f"at most {MAX_INPUTS} inputs per request", param="input")
    encoding = read.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise BadRequest("encoding_format can only be float or base64", param="encoding_format")
    return EmbeddingRequest(read.get("model", ""), inputs, encoding == "base64", read.get("dimensions"))


def _read(body: dict[str, object], path: str) -> dict[str, Any]:
    """Returns the fields that are not null, converted for use. Raises BadRequest for unsupported ones."""
    found = {}
    for name, value in body.items():
        field = fields.TABLE.get(name)
        if value is None:
            continue
        if field is None or path not in field.paths:
            message = f"{name[:_SHOWN]!r} is not a field of {path} in this engine: leave it out"
            raise BadRequest(message, param=name[:_SHOWN], code="unknown_parameter")
        try:
            found[name] = field.read(value)
        except WrongValue as error:
            raise BadRequest(f"{name} {error}" + (error.hint and f": {error.hint}"), param=name) from None
    return found


def _request(read: dict[str, Any], prompt: Any, messages: Sequence[dict[str, object]]) -> GenerationRequest:
    own = {name: read[name] for name in Sampling.__dataclass_fields__ if name in read}
    if limit := read.get("max_completion_tokens"):
        own["max_tokens"] = limit
    return GenerationRequest(
        model=read.get("model", ""),
        prompt=prompt,
        messages=messages,
        sampling=Sampling(**own),
        stream=read.get("stream", False),
        include_usage=read.get("stream_options", False),
        template_options=read.get("chat_template_kwargs", {}),
        add_special_tokens=read.get("add_special_tokens", not messages),
        return_token_ids=read.get("return_token_ids", False),
    )


def _message(message: object, index: int) -> dict[str, object]:
    """Checks a message, and returns it with its content as a list of texts, because templates need different forms."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _wrong(index, "has no role")
    said = {name: value for name, value in message.items() if value is not None and value != []}
    if unknown := [name for name in said if name not in _MESSAGE]:
        raise _wrong(index, f"has {unknown[0][:_SHOWN]!r}, which this engine cannot pass to a model")
    for name in ("name", "tool_call_id", "reasoning_content"):
        if name in said and not isinstance(said[name], str):
            raise _wrong(index, f"has a {name} that is not a text")
    if "tool_calls" in said:
        said["tool_calls"] = _tool_calls(said["tool_calls"], index)
    content = said.get("content", "" if said["role"] == "assistant" or message.get("content") == [] else None)
    return {**said, "content": _texts(content, index)}


def _texts(content: object, index: int) -> list[str]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise _wrong(index, "has no text as its content")
    parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) != len(content):
        raise _wrong(index, "has parts that are not text, which this engine cannot read")
    return texts


def _tool_calls(calls: object, index: int) -> list[dict[str, object]]:
    """Converts tool calls for templates, which expect arguments as an object, not as JSON."""
    found = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong(index, "has tool_calls that are not calls of functions")
        arguments = function.get("arguments") or {}
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            raise _wrong(index, "has tool_calls with arguments that are not JSON") from None
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found


def _wrong(index: int, what: str) -> BadRequest:
    return BadRequest(f"message {index} {what}", param="messages")


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(is_token(token) for token in value)
