# SPDX-License-Identifier: Apache-2.0
"""Has a program carry out a test's orders, one line of JSON each, and report the outcome."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

ENDLESS = 6_000  # tokens, of an answer that is left at its beginning: a minute's
# A tool for models in tests.
TOOL = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
FUNCTION = {"type": "function", "function": TOOL}


def weather(city: str) -> str:
    """The weather in a city."""
    return f"It rains in {city}."


class Begun:
    """An answer that is left at its beginning."""

    def __init__(self) -> None:
        self._stream: Any = None

    def begin(self, pieces: Any, text_of: Callable[[Any], str | None], stream: Any = None) -> str:
        """Reads its first text. `stream` is what to close, where that is not `pieces` itself."""
        self._stream = stream or pieces
        return next(text for piece in pieces if (text := text_of(piece)))

    def leave(self) -> None:
        self._stream.close()


def obey(tasks: Mapping[str, Callable[..., Any]]) -> None:
    """Does tasks by name until the input ends. An error is said, by its kind and words, as any other answer."""
    for line in sys.stdin:
        task = json.loads(line)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # litellm prints advice
                said = {"said": tasks[task.pop("do")](**task)}
        except Exception as error:  # noqa: BLE001 -- whatever the client raises is what its user would see
            said = {"error": type(error).__name__, "words": str(error)}
        print(json.dumps(said), flush=True)
