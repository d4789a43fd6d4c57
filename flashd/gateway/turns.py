# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is: the order in which requests for different models reach engines. No I/O, and no clock of its own.

Requests for a model that serves enter at once; requests for another wait, and enter together when their model serves.
Bringing a model may displace others, such as the fine-tune that shares an engine with it. While a model that is waited
for would displace one that serves, the turn of that one ends when nobody asks it any more, or after `turn_s`: what it
generates then is finished, not cut, and newer requests for it wait for its next turn. What has waited longest comes
first, so that no model starves; but nothing waits for the end of a turn that it does not displace.

A turn is at least as long as it took to bring the model, so that at most half of the time goes into reading disks and
starting engines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flashd.errors import LimitExceeded

_MOST_LEARNED = 10_000


@dataclass(slots=True, eq=False)
class Ticket:
    """A request for a model, from its arrival until it has left. `admit` is called when it enters."""

    model: str
    arrived: float
    admit: Callable[[], None] = field(repr=False)
    is_inside: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """A step to do: find out which models `model` would displace, and say it to `Turns.displaces`."""

    model: str


@dataclass(frozen=True, slots=True)
class Bring:
    """A step to do: have `model` serve. `Turns.begin` must be told, and how it ended."""

    model: str


class Turns:
    """All times are seconds of the caller's clock, which never goes backwards.

    Both limits may be changed at any time: `turn_s` holds for turns that begin later, and `max_waiting`, of requests
    for one model, for those that arrive later.
    """

    def __init__(self, *, turn_s: float = 2.0, max_waiting: int = 256) -> None:
        self.turn_s = turn_s
        self.max_waiting = max_waiting
        self._waiting: dict[str, list[Ticket]] = {}  # by model, in the order of arrival
        self._inside: Counter[str] = Counter()
        self._turn_ends: dict[str, float] = {}  # of the models that serve
        self._displaced: dict[str, frozenset[str]] = {}  # by what waits, as long as the same models serve
        self._learned: dict[tuple[str, frozenset[str]], frozenset[str]] = {}  # `_displaced` by what served then
        self._bringing: str | None = None
        self._brought_s: dict[str, float] = {}  # how long it took last
        self._began = 0.0

    @property
    def bringing(self) -> str | None:
        return self._bringing

    def waiting(self, model: str) -> int:
        return len(self._waiting.get(model, ()))

    def inside(self, model: str) -> int:
        return self._inside[model]

    def ask(self, model: str, now: float, admit: Callable[[], None], *, arrived: float | None = None) -> Ticket:
        """Returns the ticket of a request, which may have been admitted already.

        A request that comes back, because its model ceased to serve, keeps its place by when it `arrived` first.
        Raises LimitExceeded if as many requests wait for this model as may.
        """
        ticket = Ticket(model, now if arrived is None else arrived, admit)
        if self._is_open(model, now):
            self._enter(ticket)
            return ticket
        line = self._waiting.get(model, [])
        if len(line) >= self.max_waiting:
            raise LimitExceeded(f"{len(line)} requests wait for {model} already", hint="try again in a moment")
        self._waiting[model] = sorted([*line, ticket], key=lambda waiting: waiting.arrived)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Ends a request, whether it was answered or was still waiting."""
        if ticket.is_inside:
            ticket.is_inside = False
            self._inside[ticket.model] -= 1
            if not self._inside[ticket.model]:
                del self._inside[ticket.model]
                self._ask_anew(ticket.model)
        elif ticket in (line := self._waiting.get(ticket.model, [])):
            line.remove(ticket)
            if not line:
                del self._waiting[ticket.model]

    def _ask_anew(self, idle: str) -> None:
        """Has it found out anew what those would displace who wait for a busy model: the idle one may do as well."""
        for model, others in list(self._displaced.items()):
            if model != self._bringing and idle not in others and any(self._inside[other] for other in others):
                del self._displaced[model]

    def next_step(self, now: float) -> Ask | Bring | None:
        """What to do now, if anything. Requests that may enter do."""
        for model in [model for model in self._waiting if self._is_open(model, now)]:
            for ticket in self._waiting.pop(model):
                self._enter(ticket)
        if self._bringing is not None:
            return None
        for model, _ in sorted(self._waiting.items(), key=lambda item: item[1][0].arrived):
            if model in self._turn_ends:
                continue  # its turn is over: it serves still, for what is inside, and waits for those who wait
            if model not in self._displaced and not self._remember(model):
                return Ask(model)
            if not any(self._inside[other] for other in self._displaced[model]):
                return Bring(model)
        return None

    def displaces(self, model: str, others: frozenset[str]) -> None:
        """Notes which of the models that serve would not, if this one did."""
        self._displaced[model] = others & self._turn_ends.keys()
        if len(self._learned) >= _MOST_LEARNED:
            self._learned.clear()
        self._learned[model, frozenset(self._turn_ends)] = self._displaced[model]

    def _remember(self, model: str) -> bool:
        """Takes what a model displaced when the same models served before, if that was all of them and nobody is
        inside. Memory may have filled since, but then no more is displaced, and until it is brought nobody enters."""
        known = self._learned.get((model, frozenset(self._turn_ends)))
        if known is None or known != self._turn_ends.keys() or any(self._inside.values()):
            return False
        self._displaced[model] = known
        return True

    def begin(self, model: str, now: float) -> None:
        """Notes that the daemon was asked to bring it."""
        self._bringing, self._began = model, now

    def brought(self, now: float) -> None:
        """Notes that it serves now; `serving` may say so earlier or later."""
        if self._bringing is not None:
            self._brought_s[self._bringing] = now - self._began
            self._turn_ends[self._bringing] = now + self._turn(self._bringing)
        self._end()

    def given_up(self) -> None:
        """Notes that it was not brought; what waits for it waits on."""
        self._end()

    def failed(self, model: str) -> list[Ticket]:
        """Notes that it cannot be brought; returns the requests that waited for it, which are no longer in line."""
        self._end()
        return self._waiting.pop(model, [])

    def serving(self, models: Mapping[str, object], now: float) -> None:
        """Notes which models serve, whoever brought them."""
        if models.keys() != self._turn_ends.keys():
            before = self._turn_ends
            self._turn_ends = {model: before.get(model, now + self._turn(model)) for model in models}
            self._displaced.clear()

    def _end(self) -> None:
        self._bringing = None
        self._displaced.clear()

    def _turn(self, model: str) -> float:
        return max(self.turn_s, self._brought_s.get(model, 0.0))

    def _is_open(self, model: str, now: float) -> bool:
        """True if a request for it enters at once."""
        if model not in self._turn_ends:
            return False
        if self._bringing is not None and model in self._displaced.get(self._bringing, ()):
            return False
        return now < self._turn_ends[model] or not any(model in self._displaced.get(each, ()) for each in self._waiting)

    def _enter(self, ticket: Ticket) -> None:
        ticket.is_inside = True
        self._inside[ticket.model] += 1
        ticket.admit()
