# SPDX-License-Identifier: Apache-2.0
"""An engine's answer as Ollama's: a line of JSON for each piece, and a last one with counts and durations."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flashd.errors import EngineFailed
from flashd.gateway.dialects import ollama
from flashd.gateway.dialects.chunks import CallPart, Chunk, Usage
from flashd.gateway.dialects.ollama import timestamp
from flashd.json_values import JsonObject

_MOST_CALLS = 1024


@dataclass(slots=True)
class Durations:
    """Times of a request, of one clock in nanoseconds: its arrival, when its model served, the first piece of the
    answer."""

    arrived_ns: int
    clock: Callable[[], int] = time.monotonic_ns
    asked_ns: int = 0
    first_ns: int = 0

    def note_asked(self) -> None:
        self.asked_ns = self.clock()

    def note_piece(self) -> None:
        self.first_ns = self.first_ns or self.clock()

    def whole(self) -> dict[str, int]:
        """As /api/embed says them."""
        ended_ns = self.clock()
        asked_ns = self.asked_ns or ended_ns
        return {"total_duration": ended_ns - self.arrived_ns, "load_duration": asked_ns - self.arrived_ns}

    def parts(self, usage: Usage) -> dict[str, int]:
        """As /api/chat says them, with the counts of tokens. What the first token took counts as the prompt's."""
        said = self.whole()
        ended_ns = self.arrived_ns + said["total_duration"]
        first_ns = self.first_ns or ended_ns
        return said | {
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": first_ns - (self.asked_ns or first_ns),
            "eval_count": usage.completion_tokens,
            "eval_duration": ended_ns - first_ns,
        }


@dataclass(slots=True)
class _Call:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)

    def add(self, part: CallPart) -> None:
        self.id = self.id or part.id
        self.name = self.name or part.name
        self.arguments.append(part.arguments)

    def said(self, index: int) -> dict[str, object]:
        raw = "".join(self.arguments)
        try:
            arguments = json.loads(raw) if raw.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise EngineFailed(
                f"the model called {self.name[:80]!r} with arguments that are not JSON", hint="ask again"
            )
        return {"id": self.id, "function": {"index": index, "name": self.name, "arguments": arguments}}


@dataclass(slots=True)
class OllamaAnswer:
    """An answer as it grows. `is_chat` is whether it has the form of /api/chat, or that of /api/generate."""

    model: str
    is_chat: bool
    durations: Durations
    now: Callable[[], float] = time.time
    _calls: dict[int, _Call] = field(default_factory=dict)
    _reason: str = ""
    _usage: Usage = field(default_factory=lambda: Usage(0, 0))

    def lines(self, chunk: Chunk) -> Iterator[JsonObject]:
        """What a piece of the engine's answer says, at most one line."""
        self.durations.note_piece()
        self._reason = chunk.finish_reason or self._reason
        self._usage = chunk.usage or self._usage
        for part in chunk.calls:
            if part.index not in self._calls and len(self._calls) >= _MOST_CALLS:
                raise EngineFailed(f"the model made more than {_MOST_CALLS} calls of tools")
            self._calls.setdefault(part.index, _Call()).add(part)
        if chunk.text or chunk.thinking or chunk.logprobs:
            yield self._line(chunk.text, chunk.thinking) | _logprobs(chunk)

    def last_lines(self) -> Iterator[JsonObject]:
        """Calls of tools, which Ollama says whole, and the end. Raises EngineFailed for calls that are no JSON."""
        if self._calls:
            calls = [call.said(index) for index, (_, call) in enumerate(sorted(self._calls.items()))]
            yield self._line("", "", calls)
        reason = "length" if self._reason == "length" else "stop"
        yield self.ended(reason) | self.durations.parts(self._usage)

    def ended(self, reason: str) -> JsonObject:
        """The last line without counts, which is the whole answer if a model was only loaded or unloaded."""
        return self._line("", "") | {"done": True, "done_reason": reason}

    def waiting(self, words: str, as_text: bool) -> bytes:
        """A line of a stream whose answer has not begun."""
        return ollama.line(self._line(f"{words}\n" if as_text else "", ""))

    def _line(self, text: str, thinking: str, calls: list[dict[str, object]] | None = None) -> JsonObject:
        line: JsonObject = {"model": self.model, "created_at": timestamp(self.now())}
        more = ({"thinking": thinking} if thinking else {}) | ({"tool_calls": calls} if calls else {})
        if self.is_chat:
            line["message"] = {"role": "assistant", "content": text} | more
        else:
            line |= {"response": text} | more
        return line | {"done": False}


@dataclass(slots=True)
class Joined:
    """The lines of a stream as one answer, for clients that want no stream."""

    _texts: list[str] = field(default_factory=list)
    _thinking: list[str] = field(default_factory=list)
    _calls: list[object] = field(default_factory=list)
    _logprobs: list[object] = field(default_factory=list)
    _last: JsonObject = field(default_factory=dict)

    def add(self, line: JsonObject) -> None:
        said = line.get("message", line)
        self._texts.append(said.get("content", said.get("response", "")))
        self._thinking.append(said.get("thinking", ""))
        self._calls += said.get("tool_calls", ())
        self._logprobs += line.get("logprobs", ())
        self._last = line

    def whole(self) -> JsonObject:
        more: JsonObject = {}
        if thinking := "".join(self._thinking):
            more["thinking"] = thinking
        if self._calls:
            more["tool_calls"] = self._calls
        line = dict(self._last)
        if "message" in line:
            line["message"] = line["message"] | {"content": "".join(self._texts)} | more
        else:
            line |= {"response": "".join(self._texts)} | more
        return line | ({"logprobs": self._logprobs} if self._logprobs else {})


def _logprobs(chunk: Chunk) -> dict[str, object]:
    if not chunk.logprobs:
        return {}
    told = [_logprob(each) | {"top_logprobs": _top(each)} for each in chunk.logprobs]
    return {"logprobs": told}


def _logprob(found: Mapping[str, Any]) -> dict[str, object]:
    likelihood = found.get("logprob")
    is_number = isinstance(likelihood, int | float) and math.isfinite(likelihood)
    return {"token": str(found.get("token", "")), "logprob": likelihood if is_number else None}


def _top(found: Mapping[str, Any]) -> list[dict[str, object]]:
    found_top = found.get("top_logprobs")
    return [_logprob(each) for each in found_top if isinstance(each, dict)] if isinstance(found_top, list) else []
