# SPDX-License-Identifier: Apache-2.0
"""Ollama's requests as OpenAI's.

OPTIONS, and a table for each path, have all fields. Those that would change an answer and cannot
be translated are refused; those that only tell Ollama how to run a model are accepted, and have no effect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashd import json_values
from flashd.errors import InvalidArgument
from flashd.gateway import keep_alive
from flashd.gateway.dialects import fields
from flashd.gateway.dialects.fields import Field
from flashd.gateway.dialects.openai import CHAT_PATH, COMPLETION_PATH, EMBEDDING_PATH
from flashd.json_values import JsonObject, WrongValue

_SHOWN = 80
_EFFORTS = ("low", "medium", "high")
_ENGINE = "no effect: how Ollama runs a model"
_SAMPLER = "a way of sampling that engines here lack"
# A file's first bytes in base64. Formats that vision models are commonly given.
_IMAGES = {"iVBORw0KGgo": "png", "/9j/": "jpeg", "R0lGOD": "gif", "UklGR": "webp", "Qk": "bmp"}


def _predicted(value: object) -> int | None:
    """Numbers that are not positive mean no limit."""
    count = json_values.whole(-2, fields.MAX_INT32)(value)
    return count if count > 0 else None


def _seed(value: object) -> int | None:
    """-1 means a random one."""
    seed = json_values.whole(-(1 << 63), fields.MAX_INT64)(value)
    return None if seed == -1 else seed


def _keep_alive(value: object) -> float:
    """In seconds."""
    try:
        return keep_alive.seconds(value)
    except InvalidArgument:
        raise WrongValue('must be a number of seconds, or a duration such as "5m"') from None


def _think(value: object) -> bool | str:
    if not isinstance(value, bool) and value not in _EFFORTS:
        raise WrongValue(f"must be true, false, {', '.join(_EFFORTS)}")
    return value


def _format(value: object) -> JsonObject | None:
    """As OpenAI's response_format."""
    if value == "":
        return None
    if value == "json":
        return {"type": "json_object"}
    if not isinstance(value, dict):
        raise WrongValue('must be "json" or a JSON schema')
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": value}}


OPTIONS = fields.table(
    [
        Field("temperature", json_values.number(0.0, 100.0), "temperature", "default: the model's own"),
        Field("top_p", json_values.number(0.0, 1.0), "top_p"),
        Field("top_k", json_values.whole(-1, fields.MAX_INT64), "top_k"),
        Field("min_p", json_values.number(0.0, 1.0), "min_p"),
        Field("seed", _seed, "seed"),
        Field("stop", fields.texts, "stop"),
        Field("num_predict", _predicted, "max_tokens", "default: the engine's"),
        Field("repeat_penalty", json_values.number(0.01, 100.0), "repetition_penalty", "over prompt and answer"),
        Field("presence_penalty", json_values.number(-2.0, 2.0), "presence_penalty"),
        Field("frequency_penalty", json_values.number(-2.0, 2.0), "frequency_penalty"),
        Field("repeat_last_n", json_values.only(-1), does="only -1: penalties count all tokens"),
        Field("tfs_z", json_values.only(1), does="only 1: " + _SAMPLER),
        Field("typical_p", json_values.only(1), does="only 1: " + _SAMPLER),
        Field("mirostat", json_values.only(0), does="only 0: " + _SAMPLER),
        Field("mirostat_tau", json_values.anything, does="no effect without mirostat"),
        Field("mirostat_eta", json_values.anything, does="no effect without mirostat"),
        Field("penalize_newline", json_values.only(True), does="only true: penalties count newlines, too"),
        *(
            Field(name, json_values.anything, does=_ENGINE)
            for name in ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "numa", "low_vram",
                         "f16_kv", "logits_all", "vocab_only", "use_mmap", "use_mlock", "embedding_only")
        ),
    ]
)  # fmt: skip

_ALL = (
    Field("model", json_values.text),
    Field("name", json_values.text, does="the older name of model"),
    Field("options", fields.mapping, does="see below"),
    Field("keep_alive", _keep_alive, does="how long the model serves without requests; 0 parks it once idle"),
)
_GENERATION = (
    *_ALL,
    Field("stream", json_values.flag, does="default true"),
    Field("format", _format, "response_format"),
    Field("think", _think, does="true and false go to the chat template; low, medium and high are reasoning_effort"),
    Field("logprobs", json_values.flag, "logprobs"),
    Field("top_logprobs", json_values.whole(0, 20), "top_logprobs"),
    Field("truncate", json_values.flag, does="no effect: what is too long for the model is refused"),
    Field("shift", json_values.flag, does="no effect: what is too long for the model is refused"),
)
CHAT = fields.table(
    [
        *_GENERATION,
        Field("messages", fields.objects),
        Field("tools", fields.objects),
    ]
)
GENERATE = fields.table(
    [
        *_GENERATION,
        Field("prompt", json_values.text),
        Field("system", json_values.text),
        Field("images", fields.texts),
        Field("raw", json_values.flag, does="the prompt goes to the model without its chat template"),
        Field("suffix", json_values.only(""), does="only empty: engines here do not fill in the middle"),
        Field("template", json_values.only(""), does="only empty: the model has its own"),
        Field("context", json_values.only([]), does="only empty: answers have none to send back"),
    ]
)
EMBED = fields.table(
    [
        *_ALL,
        Field("input", fields.texts),
        Field("truncate", json_values.flag, does="no effect: what is too long for the model is refused"),
        Field("dimensions", json_values.whole(1, fields.MAX_INT32), "dimensions"),
    ]
)
EMBEDDINGS = fields.table([*_ALL, Field("prompt", json_values.text)])
_NAMES = (Field("model", json_values.text), Field("name", json_values.text))
SHOW = fields.table([*_NAMES, Field("verbose", json_values.flag, does="no effect")])
DELETE = fields.table(_NAMES)
PULL = fields.table(
    [
        *_NAMES,
        Field("stream", json_values.flag, does="default true"),
        Field("insecure", json_values.flag, does="no effect: flashd pulls from the hub only"),
    ]
)


@dataclass(frozen=True, slots=True)
class EngineBody:
    """What an engine is asked: a path and a body, which lacks the model."""

    path: str
    body: Mapping[str, Any]

    def raw(self, model: str) -> bytes:
        return json.dumps({"model": model, **self.body}, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class OllamaRequest:
    """A request. Without `asks`, the model is to be loaded, or unloaded if `unloads`. `keep_s` is how long the model
    shall serve without further requests."""

    asks: EngineBody | None
    is_stream: bool
    keep_s: float | None

    @property
    def unloads(self) -> bool:
        return self.keep_s == 0

    def keep(self) -> None:
        """Has the model serve for as long as the request says, if it does."""
        if self.keep_s is not None:
            keep_alive.KEEP_ALIVE.set(self.keep_s)


def chat(content: Mapping[str, object]) -> OllamaRequest:
    """Translates a request of /api/chat. Raises InvalidArgument."""
    read = fields.read_fields(content, CHAT, "/api/chat")
    body = _generation(read, CHAT)
    if tools := read.get("tools"):
        body["tools"] = tools
    messages = _messages(read.get("messages", []))
    asks = EngineBody(CHAT_PATH, body | {"messages": messages}) if messages else None
    return OllamaRequest(asks, read.get("stream", True), read.get("keep_alive"))


def generate(content: Mapping[str, object]) -> OllamaRequest:
    """Translates a request of /api/generate. Raises InvalidArgument."""
    read = fields.read_fields(content, GENERATE, "/api/generate")
    body = _generation(read, GENERATE)
    prompt, images = read.get("prompt", ""), read.get("images", [])
    asks = None
    if read.get("raw"):
        if read.get("system") or images or "think" in read or read.get("logprobs"):
            raise InvalidArgument("raw goes without system, images, think and logprobs", hint="or use /api/chat")
        asks = EngineBody(COMPLETION_PATH, body | {"prompt": prompt})
    elif prompt or images:
        messages = [{"role": "system", "content": read["system"]}] if read.get("system") else []
        messages.append({"role": "user", "content": _content(prompt, images, "the request")})
        asks = EngineBody(CHAT_PATH, body | {"messages": messages})
    return OllamaRequest(asks if prompt or images else None, read.get("stream", True), read.get("keep_alive"))


def embed(content: Mapping[str, object]) -> OllamaRequest:
    """Translates a request of /api/embed. Raises InvalidArgument."""
    read = fields.read_fields(content, EMBED, "/api/embed")
    return _embedding(read, [text for text in [read.get("input", [])] if text not in ([], [""])], EMBED)


def embeddings(content: Mapping[str, object]) -> OllamaRequest:
    """Translates a request of /api/embeddings. Raises InvalidArgument."""
    read = fields.read_fields(content, EMBEDDINGS, "/api/embeddings")
    return _embedding(read, [[read["prompt"]]] if read.get("prompt") else [], EMBEDDINGS)


def _embedding(read: Mapping[str, Any], inputs: Sequence[object], known: Mapping[str, Field]) -> OllamaRequest:
    _options(read)
    body = fields.translated(read, known)
    asks = EngineBody(EMBEDDING_PATH, body | {"input": inputs[0]}) if inputs else None
    return OllamaRequest(asks, is_stream=False, keep_s=read.get("keep_alive"))


def _options(read: Mapping[str, Any]) -> JsonObject:
    found = fields.read_fields(read.get("options", {}), OPTIONS, "options")
    return {name: value for name, value in fields.translated(found, OPTIONS).items() if value != []}


def _generation(read: Mapping[str, Any], known: Mapping[str, Field]) -> JsonObject:
    """The fields of an engine's request that generation of both kinds has in common. It streams in any case, so that
    the parts of the answer can be timed."""
    body = _options(read) | fields.translated(read, known)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    match read.get("think"):
        case bool(thinks):
            body["chat_template_kwargs"] = {"enable_thinking": thinks, "thinking": thinks}
        case str(effort):
            body["reasoning_effort"] = effort
    if not body.get("logprobs"):
        body.pop("logprobs", None)
        body.pop("top_logprobs", None)
    return body


@dataclass(slots=True)
class _Calls:
    """Ids for calls of tools, which OpenAI's messages need and Ollama's may lack: results follow in order."""

    _unanswered: list[tuple[str, str]] = field(default_factory=list)  # id and name
    _count: int = 0

    def called(self, name: str, given: object) -> str:
        made = given if isinstance(given, str) and given else f"call_{self._count}"
        self._count += 1
        self._unanswered.append((made, name))
        return made

    def answered(self, name: object, given: object, where: str) -> str:
        if isinstance(given, str) and given:
            self._unanswered = [call for call in self._unanswered if call[0] != given]
            return given
        if not self._unanswered:
            raise InvalidArgument(f"{where} is the result of a tool, but no call of one is before it")
        found = next((call for call in self._unanswered if call[1] == name), self._unanswered[0])
        self._unanswered.remove(found)
        return found[0]


def _messages(messages: Sequence[Mapping[str, Any]]) -> list[JsonObject]:
    calls = _Calls()
    return [_message(message, f"message {index}", calls) for index, message in enumerate(messages)]


def _message(message: Mapping[str, Any], where: str, calls: _Calls) -> JsonObject:
    given = {name: value for name, value in message.items() if value not in (None, [], "")}
    known = ("role", "content", "images", "tool_calls", "tool_name", "tool_call_id", "thinking")
    if unknown := [name for name in given if name not in known]:
        raise InvalidArgument(f"{where} has {unknown[0][:_SHOWN]!r}, which is not known")
    role, content = given.get("role"), given.get("content", "")
    if role not in ("system", "user", "assistant", "tool"):
        raise InvalidArgument(f"{where} has a role that is none of system, user, assistant and tool")
    if not isinstance(content, str):
        raise InvalidArgument(f"{where} has content that is not a text")
    said: JsonObject = {"role": role, "content": _content(content, given.get("images", []), where)}
    if "thinking" in given:
        if not isinstance(given["thinking"], str):
            raise InvalidArgument(f"{where} has thinking that is not a text")
        said["reasoning_content"] = given["thinking"]
    if "tool_calls" in given:
        said["tool_calls"] = _tool_calls(given["tool_calls"], where, calls)
    if role == "tool":
        said["tool_call_id"] = calls.answered(given.get("tool_name"), given.get("tool_call_id"), where)
    return said


def _tool_calls(given: object, where: str, calls: _Calls) -> list[JsonObject]:
    found = []
    for call in given if isinstance(given, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidArgument(f"{where} has tool_calls that are not calls of functions")
        name, arguments = function["name"], function.get("arguments") or {}
        raw = arguments if isinstance(arguments, str) else json.dumps(arguments)
        found.append(
            {
                "id": calls.called(name, call.get("id")),
                "type": "function",
                "function": {"name": name, "arguments": raw},
            }
        )
    return found


def _content(text: str, images: object, where: str) -> str | list[JsonObject]:
    if not images:
        return text
    if not isinstance(images, list):
        raise InvalidArgument(f"{where} has images that are not a list")
    parts: list[JsonObject] = [{"type": "image_url", "image_url": {"url": _url(image, where)}} for image in images]
    return [*([{"type": "text", "text": text}] if text else []), *parts]


def _url(image: object, where: str) -> str:
    """A picture in base64 as a data URL (RFC 2397)."""
    kinds = [kind for start, kind in _IMAGES.items() if isinstance(image, str) and image.startswith(start)]
    if not kinds:
        raise InvalidArgument(f"{where} has an image that is not a picture in base64", hint="send PNG, JPEG or WebP")
    return f"data:image/{kinds[0]};base64,{image}"
