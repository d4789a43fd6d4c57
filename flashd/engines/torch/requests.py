# SPDX-License-Identifier: Apache-2.0
"""What does a request ask for? OpenAI's bodies, checked field by field, so that nothing strange reaches the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_BODY_BYTES = 8 << 20
MAX_STOPS = 16
MAX_INPUTS = 256


class BadRequest(Exception):
    """The client's mistake: a message for its user, the parameter it is about, and the HTTP status."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Sampling:
    """None leaves it to the model's own generation config. Temperature 0 is greedy."""

    max_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    repetition_penalty: float | None
    seed: int | None
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`prompt` is text, or token ids, or, for chats, the messages."""

    model: str
    prompt: str | list[int]
    messages: Sequence[dict[str, Any]]
    sampling: Sampling
    stream: bool
    include_usage: bool
    template_options: dict[str, Any]


def parse_body(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not valid JSON") from None
    if not isinstance(body, dict):
        raise BadRequest("the body is not a JSON object")
    return body


def chat_request(body: dict[str, Any], max_tokens_default: int) -> GenerationRequest:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message", param="messages")
    checked = [_message(message, index) for index, message in enumerate(messages)]
    options = body.get("chat_template_kwargs", {})
    if not isinstance(options, dict) or not all(isinstance(v, bool | int | float | str) for v in options.values()):
        raise BadRequest("chat_template_kwargs must be an object of plain values", param="chat_template_kwargs")
    return _request(body, "", checked, max_tokens_default, options)


def completion_request(body: dict[str, Any], max_tokens_default: int) -> GenerationRequest:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return _request(body, prompt, [], max_tokens_default, {})
    if isinstance(prompt, list) and prompt and all(_is_int(token) and token >= 0 for token in prompt):
        return _request(body, prompt, [], max_tokens_default, {})
    raise BadRequest("prompt must be a text that is not empty, or a list of token ids; one a request", param="prompt")


def embedding_inputs(body: dict[str, Any]) -> tuple[str, list[str]]:
    """The model named, and the texts to embed."""
    inputs = body.get("input")
    texts = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise BadRequest("input must be a text or a list of texts, none of them empty", param="input")
    if len(texts) > MAX_INPUTS:
        raise BadRequest(f"at most {MAX_INPUTS} texts a request", param="input")
    if body.get("encoding_format", "float") != "float":
        raise BadRequest("encoding_format can only be float", param="encoding_format")
    return _text(body, "model"), texts


def _request(
    body: dict[str, Any],
    prompt: str | list[int],
    messages: Sequence[dict[str, Any]],
    max_tokens_default: int,
    template_options: dict[str, Any],
) -> GenerationRequest:
    if body.get("n", 1) != 1:
        raise BadRequest("n can only be 1", param="n")
    if body.get("tools"):
        raise BadRequest("tools are not supported by this engine", param="tools")
    stream = body.get("stream", False)
    if not isinstance(stream, bool):
        raise BadRequest("stream must be true or false", param="stream")
    stream_options = body.get("stream_options") or {}
    include_usage = isinstance(stream_options, dict) and stream_options.get("include_usage") is True
    return GenerationRequest(
        model=_text(body, "model"),
        prompt=prompt,
        messages=messages,
        sampling=_sampling(body, max_tokens_default),
        stream=stream,
        include_usage=include_usage,
        template_options=template_options,
    )


def _sampling(body: dict[str, Any], max_tokens_default: int) -> Sampling:
    stop = body.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise BadRequest(f"stop must be a text or up to {MAX_STOPS} texts", param="stop")
    limit_name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    return Sampling(
        max_tokens=_integer(body, limit_name, 1, 1 << 20) or max_tokens_default,
        temperature=_number(body, "temperature", 0.0, 100.0),
        top_p=_number(body, "top_p", 0.0, 1.0),
        top_k=_integer(body, "top_k", 1, 1 << 20),
        repetition_penalty=_number(body, "repetition_penalty", 0.01, 100.0),
        seed=_integer(body, "seed", -(1 << 63), (1 << 63) - 1),
        stop=tuple(stops),
    )


def _message(message: object, index: int) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequest(f"message {index} has no role", param="messages")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) != len(content) or not all(isinstance(part, str) for part in parts):
            raise BadRequest(
                f"message {index} has parts that are not text, which this engine cannot read", param="messages"
            )
        content = "".join(str(part) for part in parts)
    if not isinstance(content, str):
        raise BadRequest(f"message {index} has no text as its content", param="messages")
    return {"role": message["role"], "content": content}


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name) or ""
    if not isinstance(value, str):
        raise BadRequest(f"{name} must be a text", param=name)
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(body: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not _is_int(value) or not low <= value <= high:
        raise BadRequest(f"{name} must be a whole number from {low} to {high}", param=name)
    return int(value)


def _number(body: dict[str, Any], name: str, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadRequest(f"{name} must be a number from {low:g} to {high:g}", param=name)
    return float(value)
