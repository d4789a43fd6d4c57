# SPDX-License-Identifier: Apache-2.0
"""Made-up streams of an engine, for tests of their translations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

TEXTS = st.text(max_size=8)
DELTAS = st.one_of(
    st.builds(lambda text: {"content": text}, TEXTS),
    st.builds(lambda text: {"reasoning_content": text}, TEXTS),
    st.builds(lambda text: {"role": "assistant", "content": text}, TEXTS),
    st.just({}),
)
REASONS = st.sampled_from(["stop", "length"])


def call(index: int, name: str, pieces: Sequence[str]) -> list[dict[str, Any]]:
    """The deltas of a tool call whose arguments come in pieces."""
    first = {"index": index, "id": f"id-{index}", "type": "function", "function": {"name": name, "arguments": ""}}
    rest = [{"index": index, "function": {"arguments": piece}} for piece in pieces]
    return [{"tool_calls": [each]} for each in (first, *rest)]


def events(deltas: Sequence[dict[str, Any]], reason: str, usage: tuple[int, int], *, newline: str = "\n") -> bytes:
    """Server-sent events in OpenAI's form."""
    choices = [[{"index": 0, "delta": delta, "finish_reason": None}] for delta in deltas]
    choices.append([{"index": 0, "delta": {}, "finish_reason": reason}])
    said = [json.dumps({"choices": choice}, ensure_ascii=False) for choice in choices]
    counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    said.append(json.dumps({"choices": [], "usage": counts}))
    lines = [f": a comment{newline}"] + [f"data: {one}{newline}{newline}" for one in [*said, "[DONE]"]]
    return "".join(lines).encode(errors="replace")


@st.composite
def splits(draw: st.DrawFn, whole: bytes) -> list[bytes]:
    """The same bytes in any pieces."""
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=20)))
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
