# SPDX-License-Identifier: Apache-2.0
"""The layer around the whole application in which the metrics and the trace of a request begin and end."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from flashd.gateway.exchange import Message, Receive, Send
from flashd.gateway.guard import Application
from flashd.gateway.metrics.observed import Observed, Trace, observe

_WITH_NAMES = {"/v1/models/": "{name}", "/flashd/v1/actions/": "{action}"}
_OTHER = "other"


class Sees(Protocol):
    """What wants to know of requests."""

    def ended(self, request: Observed) -> None:
        """The answer to a request has ended."""


BeginTrace = Callable[[Message, str], Trace]  # of a scope, and the endpoint's name


class Observing:
    """An ASGI application around another, whose `paths` are the endpoints that have names in metrics."""

    def __init__(
        self, inside: Application, *sees: Sees, paths: Collection[str], begin_trace: BeginTrace | None = None
    ) -> None:
        self._inside = inside
        self._sees = sees
        self._paths = frozenset(paths)
        self._begin_trace = begin_trace

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inside(scope, receive, send)
            return
        endpoint = self._endpoint(scope["path"])
        request = Observed(endpoint, self._begin_trace(scope, endpoint) if self._begin_trace is not None else None)
        observe(request)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                request.status = message["status"]
            await send(message)

        try:
            await self._inside(scope, receive, noted)
        finally:
            for each in self._sees:
                each.ended(request)
            if request.trace is not None:
                request.trace.ended(request)

    def _endpoint(self, path: str) -> str:
        if path in self._paths:
            return path
        return next((start + name for start, name in _WITH_NAMES.items() if path.startswith(start)), _OTHER)
