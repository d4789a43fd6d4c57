# SPDX-License-Identifier: Apache-2.0
"""How long a model goes on serving after its last request, where requests say so.

That is `keep_alive` of Ollama's requests, and the header `X-Flashd-Keep-Alive` of all. The last request for a model
decides; after one that says nothing, the daemon's own idle timeout does.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable
from contextvars import ContextVar

from flashd.errors import FlashdError, InvalidArgument

log = logging.getLogger(__name__)

HEADER = b"x-flashd-keep-alive"
_PART = re.compile(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)")
_DURATION = re.compile(rf"([+-]?)((?:{_PART.pattern})+|\d+)")
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_TEXT = 80
_LONGEST_S = 365 * 86_400.0  # as good as for ever
FOREVER_S = float("inf")

# Of the request that is being answered: seconds, or None where it does not say.
KEEP_ALIVE: ContextVar[float | None] = ContextVar("keep_alive", default=None)


def seconds(value: object) -> float:
    """Reads a number of seconds, or a duration such as "1h30m"; a negative one is FOREVER_S. Raises InvalidArgument."""
    found = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value)
    elif isinstance(value, str) and (match := _DURATION.fullmatch(value[: _LONGEST_TEXT + 1])):
        parts = _PART.findall(match[2])
        size_s = sum(float(number) * _UNITS_S[unit] for number, unit in parts) if parts else float(match[2])
        found = -size_s if match[1] == "-" else size_s
    if found is None or math.isnan(found):
        raise InvalidArgument("keep-alive must be a number of seconds, or a duration", hint='such as "5m"; 0 for none')
    return FOREVER_S if found < 0 or found > _LONGEST_S else found


class KeepAlive:
    """The timers of all models. On one event loop."""

    def __init__(self, park: Callable[[str], None], is_asked: Callable[[str], bool]) -> None:
        """`park` blocks, and runs in a thread."""
        self._park = park
        self._is_asked = is_asked
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._parking: set[asyncio.Task[None]] = set()

    def begins(self, model: str) -> None:
        """A request for the model has come: what the last one said holds no longer."""
        if (timer := self._timers.pop(model, None)) is not None:
            timer.cancel()

    def ends(self, model: str, keep_s: float | None) -> None:
        """A request has ended. Its model is parked after so many seconds without another."""
        self.begins(model)
        if keep_s is not None and keep_s != FOREVER_S:
            self._timers[model] = asyncio.get_running_loop().call_later(keep_s, self._is_over, model)

    async def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._parking:
            await asyncio.wait(self._parking)

    def _is_over(self, model: str) -> None:
        self._timers.pop(model, None)
        if self._is_asked(model):  # that request decides
            return
        task = asyncio.ensure_future(self._parked(model))
        self._parking.add(task)
        task.add_done_callback(self._parking.discard)

    async def _parked(self, model: str) -> None:
        try:
            await asyncio.to_thread(self._park, model)
        except FlashdError as error:  # it has ceased to serve already, or stays
            log.debug("%s is not parked: %s", model, error)
