# SPDX-License-Identifier: Apache-2.0
"""The last requests for models whose answers have ended, without what was asked and answered."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from flashd.gateway.metrics.measures import CLIENT_LEFT
from flashd.gateway.metrics.observed import Observed
from flashd.gateway.metrics.usage import Tokens
from flashd.gateway.page.history import History
from flashd.gateway.page.schema import RequestState, as_json

_MOST_KEPT = 300
_ACTIONS = "/flashd/"  # which are jobs, if they take long
_NONE = Tokens(0, 0)


class Requests:
    """On the event loop."""

    def __init__(self, on_change: Callable[[], None], history: History) -> None:
        self._on_change = on_change
        self._history = history
        self._number = 0
        self._ended: OrderedDict[str, dict[str, object]] = OrderedDict()

    def all(self) -> dict[str, dict[str, object]]:
        """The requests by number, oldest first, as JSON."""
        room = _MOST_KEPT - len(self._ended)
        before = self._history.requests()[-room:] if room > 0 else []
        return {**{f"before-{number}": each for number, each in enumerate(before)}, **self._ended}

    def ended(self, request: Observed) -> None:
        """Notes a request whose answer has ended, if a model was asked something."""
        if not request.model or request.endpoint.startswith(_ACTIONS):
            return
        now = time.monotonic()
        seconds = now - request.arrived
        tokens = request.usage.tokens() or _NONE
        self._number += 1
        ended = RequestState(
            model=request.model,
            endpoint=request.endpoint,
            arrived_at=time.time() - seconds,
            wait_s=request.wait_s,
            first_byte_s=request.first_byte - request.arrived if request.first_byte is not None else 0.0,
            seconds=seconds,
            status=request.status or CLIENT_LEFT,
            error=request.error,
            prompt_tokens=tokens.prompt,
            completion_tokens=tokens.completion,
        )
        self._ended[str(self._number)] = as_json(ended)
        self._history.add(ended)
        if len(self._ended) > _MOST_KEPT:
            self._ended.popitem(last=False)
        self._on_change()
