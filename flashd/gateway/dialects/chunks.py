# SPDX-License-Identifier: Apache-2.0
"""An engine's streamed answer, in OpenAI's form, parsed from the bytes as they come.

Engines run third-party code: nothing is believed about the types in their answers, and their lines are bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashd.errors import EngineFailed
from flashd.gateway.dialects.dialect import Refused
from flashd.json_values import JsonObject
from flashd.units import MiB, format_bytes

MOST_EVENT_BYTES = 16 * MiB
_ENDS = b"[DONE]"
_HINT = "see the engine's log for the reason"


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of a tool call: the first has its id and name, and all have pieces of its arguments, which are JSON."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. `stopped_by` is the stop text that ended it, if the engine says so."""

    text: str = ""
    thinking: str = ""
    calls: Sequence[CallPart] = ()
    logprobs: Sequence[Mapping[str, Any]] = ()
    finish_reason: str = ""
    stopped_by: str = ""
    usage: Usage | None = None


@dataclass(slots=True)
class ChunkReader:
    """Reads server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html), however the bytes are
    split."""

    _line: bytearray = field(default_factory=bytearray)
    _event: list[bytes] = field(default_factory=list)
    _has_ended: bool = False

    def feed(self, received: bytes) -> list[Chunk]:
        """Returns the pieces that are complete now. Raises Refused if the engine ends its answer with an error, and
        EngineFailed for what is no answer."""
        *ends, last = received.split(b"\n")
        found: list[Chunk] = []
        for end in ends:
            line = bytes(self._line + end).removesuffix(b"\r")
            self._line.clear()
            found += self._take(line)
        self._line += last
        if len(self._line) > MOST_EVENT_BYTES or sum(map(len, self._event)) > MOST_EVENT_BYTES:
            raise EngineFailed(f"the engine's answer has a line longer than {format_bytes(MOST_EVENT_BYTES)}")
        return found

    def end(self) -> None:
        """Raises EngineFailed if the stream has ended before the answer did."""
        if not self._has_ended:
            raise EngineFailed("the engine ended in the middle of its answer", hint="ask again")

    def _take(self, line: bytes) -> Iterable[Chunk]:
        if line.startswith(b"data:"):
            self._event.append(line[5:].removeprefix(b" "))
        elif not line and self._event:
            said = b"\n".join(self._event)
            self._event.clear()
            if said == _ENDS:
                self._has_ended = True
            else:
                yield _chunk(said)


def _chunk(said: bytes) -> Chunk:
    try:
        content = json.loads(said.decode(errors="replace"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise EngineFailed("the engine's answer is not JSON", hint=_HINT)
    if (error := content.get("error")) is not None:
        raise stream_error(error)
    choice = next(iter(_list(content.get("choices"))), {})
    delta = _dict(choice.get("delta"))
    logprobs = _list(_dict(choice.get("logprobs")).get("content"))
    return Chunk(
        text=_of(delta, "content") or _of(choice, "text"),
        thinking=_of(delta, "reasoning_content") or _of(delta, "reasoning"),  # by the version of vLLM
        calls=[_call(part) for part in _list(delta.get("tool_calls"))],
        logprobs=logprobs,
        finish_reason=_of(choice, "finish_reason"),
        stopped_by=_of(choice, "stop_reason"),
        usage=usage(content),
    )


def usage(content: Mapping[str, Any]) -> Usage | None:
    """Returns the usage in an answer or a piece of one, if it has one."""
    found = content.get("usage")
    if not isinstance(found, dict):
        return None
    return Usage(_count(found.get("prompt_tokens")), _count(found.get("completion_tokens")))


def refused(error: object, status: int) -> Refused:
    """The refusal that OpenAI's error object means."""
    message = _of(error, "message") or (error if isinstance(error, str) else "the engine could not answer")
    hint = "ask again" if status == 503 else ""
    return Refused(message, hint=hint, status=status, param=_of(error, "param") or None)


def stream_error(error: object) -> Refused:
    """The refusal that OpenAI's error object means in the middle of a stream, where there is no status."""
    return refused(error, 503 if _of(error, "type") == "service_unavailable" else 500)


def _call(part: Mapping[str, Any]) -> CallPart:
    function = _dict(part.get("function"))
    return CallPart(_count(part.get("index")), _of(part, "id"), _of(function, "name"), _of(function, "arguments"))


def _of(content: object, name: str) -> str:
    """The text of this name, or none."""
    found = content.get(name) if isinstance(content, dict) else None
    return found if isinstance(found, str) else ""


def _dict(value: object) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[JsonObject]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
