# SPDX-License-Identifier: Apache-2.0
"""Numbers of tokens, read from an engine's answer while its bytes are passed through.

In a JSON text, unescaped quotation marks around `usage` can only be a name or a whole string, and what follows tells
the two apart. An answer's own usage comes after everything that may look like it (a tool's parameter of this name that
/v1/responses repeats), so the last one counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NAME = b'"usage"'
_OBJECT = re.compile(rb'"usage"\s*:\s*(?=\{)')
_MOST_BYTES = 4096  # of a usage; they have 50 to 500
_EVENT_ENDS = b"\n\n"  # of server-sent events: nothing is split there
_CARRIED = 32  # bytes of a piece that are looked at again with the next: the name may be split
_MOST_TOKENS = 1 << 40  # engines run third-party code


@dataclass(frozen=True, slots=True)
class Tokens:
    """Numbers of tokens, 0 for what the engine does not state."""

    prompt: int
    completion: int


class UsageWatch:
    """Sees the pieces of one answer. Parses nothing before the end, so that passing them on is not delayed."""

    __slots__ = ("_carried", "_found")

    def __init__(self) -> None:
        self._carried = b""
        self._found: bytes | None = None  # from the last usage on

    def feed(self, piece: bytes) -> None:
        looked_at = self._carried + piece if self._carried else piece
        self._carried = b"" if piece.endswith(_EVENT_ENDS) else looked_at[-_CARRIED:]
        if _NAME in looked_at:
            *_, last = (None, *_OBJECT.finditer(looked_at))
            if last is not None:
                self._found = looked_at[last.end() : last.end() + _MOST_BYTES]
                return
        if self._found is not None and len(self._found) < _MOST_BYTES:
            self._found += piece[: _MOST_BYTES - len(self._found)]

    def tokens(self) -> Tokens | None:
        """What the last usage says, if any has come."""
        if self._found is None:
            return None
        try:
            said, _ = json.JSONDecoder().raw_decode(self._found.decode(errors="replace"))
        except (ValueError, RecursionError):
            return None
        # OpenAI's older interfaces have the first names, its Responses and Anthropic's Messages the second.
        return Tokens(_count(said, "prompt_tokens", "input_tokens"), _count(said, "completion_tokens", "output_tokens"))


def _count(said: Mapping[str, Any], *names: str) -> int:
    found = next((said[name] for name in names if name in said), 0)
    return found if type(found) is int and 0 <= found <= _MOST_TOKENS else 0
