# SPDX-License-Identifier: Apache-2.0
"""A request as it goes on: what its metrics and its trace are made of."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Protocol

from flashd.gateway.metrics.usage import UsageWatch


class Trace(Protocol):
    """The spans of a request."""

    def queued(self, model: str) -> None:
        """It waits for its model's turn from now on."""

    def admitted(self) -> None:
        """Its turn has come."""

    def asked(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """It is sent to an engine now. Returns these headers with the one that names the span (`traceparent`)."""

    def ended(self, observed: Observed) -> None:
        """Its answer has ended."""


class Observed:
    """A request, from its arrival to the end of its answer. Times are those of time.monotonic()."""

    __slots__ = (
        *("_queued", "arrived", "endpoint", "error", "first_byte", "model", "status", "trace"),
        *("usage", "wait_s", "was_admitted"),
    )

    def __init__(self, endpoint: str, trace: Trace | None = None) -> None:
        self.endpoint = endpoint
        self.trace = trace
        self.arrived = time.monotonic()
        self.model = ""  # a name of the directory, never one that a client made up
        self.status = 0  # 0 until the answer begins
        self.error = ""
        self.first_byte: float | None = None
        self.wait_s = 0.0
        self.was_admitted = False
        self.usage = UsageWatch()
        self._queued = 0.0

    def queued(self, model: str) -> None:
        self.model = model
        self._queued = time.monotonic()
        if self.trace is not None:
            self.trace.queued(model)

    def admitted(self) -> None:
        self.was_admitted = True
        self.wait_s += time.monotonic() - self._queued
        if self.trace is not None:
            self.trace.admitted()

    def asked(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Returns the headers that the engine gets."""
        return headers if self.trace is None else self.trace.asked(headers)

    def received(self, piece: bytes) -> None:
        """Sees a piece of the engine's answer."""
        if self.first_byte is None:
            self.first_byte = time.monotonic()
        self.usage.feed(piece)

    def failed(self, error: str) -> None:
        """`error` is the name of one, as dialect.name_of gives it."""
        self.error = error


_OBSERVED: ContextVar[Observed] = ContextVar("observed")


def observed() -> Observed:
    """The request that this task works for."""
    found = _OBSERVED.get(None)
    return Observed("") if found is None else found  # one that nobody looks at


def observe(request: Observed) -> None:
    """Makes it the request of this task, and of those that the task begins."""
    _OBSERVED.set(request)
