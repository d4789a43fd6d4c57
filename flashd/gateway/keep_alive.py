# SPDX-License-Identifier: Apache-2.0
"""How long a model goes on serving without requests, where a request says so.

Requests say it in `keep_alive` (Ollama's) or in the header `X-Flashd-Keep-Alive`. The daemon is told, and parks the
model: it also knows of the requests that do not come through the gateway.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Collection
from contextvars import ContextVar

from flashd.errors import FlashdError, InvalidArgument
from flashd.tasks import Background

log = logging.getLogger(__name__)

HEADER = b"x-flashd-keep-alive"
_PART = re.compile(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)")
_DURATION = re.compile(rf"([+-]?)((?:{_PART.pattern})+|\d+)", re.ASCII)
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_TEXT = 80
_LONGEST_S = 365 * 86_400  # as good as for ever
FOREVER_S = float("inf")

# Of the request that is being answered: seconds, or None where it does not say.
KEEP_ALIVE: ContextVar[float | None] = ContextVar("keep_alive", default=None)


def seconds(value: object) -> float:
    """Reads a number of seconds, or a duration such as "1h30m"; a negative one is FOREVER_S. Raises InvalidArgument."""
    found: float | None = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        found = value
    elif isinstance(value, str) and len(value) <= _LONGEST_TEXT and (match := _DURATION.fullmatch(value)):
        parts = _PART.findall(match[2])
        size_s = sum(float(number) * _UNITS_S[unit] for number, unit in parts) if parts else float(match[2])
        found = -size_s if match[1] == "-" else size_s
    if found is not None and (found < 0 or found > _LONGEST_S):
        return FOREVER_S
    if found is None or not found <= _LONGEST_S:  # it is not a number
        raise InvalidArgument("keep-alive must be a number of seconds, or a duration", hint='such as "5m"; 0 for none')
    return float(found)


class KeepAlive:
    """Tells the daemon what requests say, once while a model serves. On one event loop."""

    def __init__(self, tell: Callable[[str, float], None]) -> None:
        """`tell` takes a model and seconds, blocks, and runs in a thread."""
        self._tell = tell
        self._told: dict[str, float] = {}
        self._telling = Background()

    def asked(self, model: str, keep_s: float | None) -> None:
        """A request for a model that serves is being answered; None if it does not say."""
        if keep_s is not None and self._told.get(model) != keep_s:
            self._told[model] = keep_s
            self._telling.start(self._say(model, keep_s))

    def serving(self, models: Collection[str]) -> None:
        """Forgets what was said of models that no longer serve, as the daemon does."""
        self._told = {model: keep_s for model, keep_s in self._told.items() if model in models}

    async def close(self) -> None:
        await self._telling.close()

    async def _say(self, model: str, keep_s: float) -> None:
        try:
            await asyncio.to_thread(self._tell, model, keep_s)
        except FlashdError as error:  # it has ceased to serve already, for example
            self._told.pop(model, None)
            log.debug("%s is kept as before: %s", model, error)
