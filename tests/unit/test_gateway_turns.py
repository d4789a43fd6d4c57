# SPDX-License-Identifier: Apache-2.0
"""The policy of turns, simulated: traces of requests against engines that exist only as numbers.

Models of one group share an engine, so that bringing one displaces the other; groups are apart.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.errors import LimitExceeded
from flashd.gateway.turns import Ask, Bring, Ticket, Turns

TURN_S = 2.0


@dataclass
class Asked:
    """A request: when it comes, for which model, and how long its answer takes."""

    at: float
    model: str
    takes_s: float
    entered: float = -1.0
    ended: float = -1.0
    ticket: Ticket | None = None

    @property
    def waited_s(self) -> float:
        return self.entered - self.at


@dataclass
class World:
    """Simulates engines and clients; checks at each moment what must hold."""

    groups: Mapping[str, str]  # model to the engine that it shares
    bring_s: float = 0.04
    max_waiting: int = 10_000
    now: float = 0.0
    brought: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.turns = Turns(turn_s=TURN_S, max_waiting=self.max_waiting)
        self.serving: dict[str, str] = {}  # by group
        self.inside: list[Asked] = []
        self._events: list[tuple[float, int, object]] = []
        self._count = itertools.count()

    def run(self, requests: Iterable[Asked]) -> Sequence[Asked]:
        asked = list(requests)
        for request in asked:
            self._at(request.at, lambda request=request: self._arrive(request))
        while self._events:
            self.now, _, happen = heapq.heappop(self._events)
            happen()  # type: ignore[operator]
            self._step()
        assert all(request.ended >= 0 for request in asked), "a request was never answered"
        return asked

    def _at(self, when: float, happen: object) -> None:
        heapq.heappush(self._events, (when, next(self._count), happen))

    def _arrive(self, request: Asked) -> None:
        def enter() -> None:
            assert request.model in self.serving.values(), "a request entered an engine that has another model"
            request.entered = self.now
            self.inside.append(request)
            self._at(self.now + request.takes_s, lambda: self._leave(request))

        request.ticket = self.turns.ask(request.model, self.now, enter)

    def _leave(self, request: Asked) -> None:
        request.ended = self.now
        self.inside.remove(request)
        assert request.ticket is not None
        self.turns.leave(request.ticket)

    def _displaced_by(self, model: str) -> frozenset[str]:
        other = self.serving.get(self.groups[model])
        return frozenset({other} - {None, model})  # type: ignore[arg-type]

    def _step(self) -> None:
        while isinstance(step := self.turns.next_step(self.now), Ask):
            self.turns.displaces(step.model, self._displaced_by(step.model))
        if not isinstance(step, Bring):
            return
        cut = [request for request in self.inside if request.model in self._displaced_by(step.model)]
        assert not cut, "a generation under way was cut"
        self.turns.begin(step.model, self.now)
        self.serving.pop(self.groups[step.model], None)
        self.brought.append(step.model)

        def done(model: str = step.model) -> None:
            self.serving[self.groups[model]] = model
            self.turns.serving(dict.fromkeys(self.serving.values()), self.now)
            self.turns.brought(self.now)

        self._at(self.now + self.bring_s, done)


ONE_ENGINE = {"a": "1", "b": "1", "c": "1"}


def test_two_clients_that_alternate_both_get_on() -> None:
    """Each asks again as soon as it is answered: the worst for one engine, and fair all the same."""
    world = World(ONE_ENGINE)
    asked = world.run(Asked(i * 0.5, "ab"[i % 2], 0.3) for i in range(100))
    assert max(request.waited_s for request in asked) < 2 * (0.3 + world.bring_s)


def test_a_model_that_is_asked_all_the_time_does_not_starve_another() -> None:
    """Requests for a overlap without an end; its turn ends, and what it generates then is finished."""
    world = World(ONE_ENGINE)
    busy = [Asked(i * 0.1, "a", 1.0) for i in range(300)]
    lone = [Asked(10.05, "b", 0.2)]
    world.run(busy + lone)
    assert lone[0].waited_s <= TURN_S + 1.0 + 2 * world.bring_s


def test_requests_are_batched_by_model() -> None:
    """Twenty agents of two models make as few swaps as turns, not one for each request."""
    world = World(ONE_ENGINE)
    draw = random.Random(7)
    world.run(Asked(draw.uniform(0, 60), draw.choice("ab"), draw.uniform(0.2, 1.5)) for _ in range(1200))
    assert len(world.brought) <= 60 / TURN_S * 1.5


def test_zipf_bursts_for_a_hundred_models() -> None:
    models = [f"m{i}" for i in range(100)]
    world = World(dict.fromkeys(models, "1"))
    draw = random.Random(11)
    weights = [1 / (rank + 1) for rank in range(100)]
    starts = [draw.uniform(0, 300) for _ in range(60)]
    asked = world.run(
        Asked(start + draw.expovariate(1.0), model, draw.uniform(0.1, 0.8))
        for start in starts
        for model in draw.choices(models, weights, k=8)
    )
    assert mean(request.waited_s for request in asked) < 5
    assert len(world.brought) < len(asked)


def test_what_is_apart_does_not_wait() -> None:
    """An embedder in an engine of its own answers while two fine-tunes take turns."""
    world = World({"a": "1", "b": "1", "embedder": "2"})
    chats = [Asked(i * 0.2, "ab"[i % 2], 1.0) for i in range(100)]
    embeddings = [Asked(5 + i * 0.1, "embedder", 0.01) for i in range(100)]
    world.run(chats + embeddings)
    assert world.brought.count("embedder") == 1
    assert max(request.waited_s for request in embeddings[5:]) == 0


def test_a_turn_is_worth_its_swap() -> None:
    """Where a swap takes ten seconds, at most about half of the time goes into swaps."""
    world = World(ONE_ENGINE, bring_s=10.0)
    asked = world.run(Asked(i * 0.25, "ab"[i % 2], 1.0) for i in range(800))
    assert len(world.brought) * world.bring_s < 0.6 * max(request.ended for request in asked)


def test_a_full_line_is_refused_and_forgets_nobody() -> None:
    turns = Turns(turn_s=TURN_S, max_waiting=2)
    tickets = [turns.ask("a", 0.0, lambda: None) for _ in range(2)]
    with pytest.raises(LimitExceeded, match="2 requests wait for a already"):
        turns.ask("a", 0.0, lambda: None)
    turns.leave(tickets[0])
    turns.ask("a", 0.0, lambda: None)
    assert turns.waiting("a") == 2


def test_who_leaves_the_line_holds_nobody_up() -> None:
    turns = Turns(turn_s=TURN_S, max_waiting=9)
    turns.serving({"a": None}, 0.0)
    inside = turns.ask("a", 0.0, lambda: None)
    gone = turns.ask("b", 0.0, lambda: None)
    assert turns.next_step(0.0) == Ask("b")
    turns.displaces("b", frozenset({"a"}))
    assert turns.next_step(5.0) is None and not turns.ask("a", 5.0, lambda: None).is_inside
    turns.leave(gone)
    assert turns.next_step(5.0) is None and turns.waiting("a") == 0 and turns.inside("a") == 2
    assert inside.is_inside


def test_what_became_idle_may_make_way_instead_of_what_is_busy() -> None:
    turns = Turns(turn_s=TURN_S, max_waiting=9)
    turns.serving({"a": None, "c": None}, 0.0)
    of_a, of_c = (turns.ask(model, 0.0, lambda: None) for model in "ac")
    turns.ask("b", 0.0, lambda: None)
    assert turns.next_step(0.0) == Ask("b")
    turns.displaces("b", frozenset({"c"}))
    assert turns.next_step(1.0) is None
    turns.leave(of_a)
    assert turns.next_step(1.0) == Ask("b")
    turns.displaces("b", frozenset({"a"}))
    assert turns.next_step(1.0) == Bring("b") and of_c.is_inside


def test_a_request_that_comes_back_keeps_its_place() -> None:
    turns = Turns(turn_s=TURN_S, max_waiting=9)
    turns.ask("b", 2.0, lambda: None)
    turns.ask("a", 3.0, lambda: None, arrived=1.0)
    assert turns.next_step(3.0) == Ask("a")


def test_those_who_waited_for_what_failed_are_named_and_others_go_on() -> None:
    turns = Turns(turn_s=TURN_S, max_waiting=9)
    waited = [turns.ask("a", 0.0, lambda: None), turns.ask("a", 0.1, lambda: None)]
    turns.ask("b", 0.2, lambda: None)
    assert turns.next_step(1.0) == Ask("a")
    turns.displaces("a", frozenset())
    assert turns.next_step(1.0) == Bring("a")
    turns.begin("a", 1.0)
    assert turns.next_step(1.5) is None
    assert turns.failed("a") == waited
    assert turns.next_step(2.0) == Ask("b")


@given(
    groups=st.lists(st.sampled_from("123"), min_size=1, max_size=6),
    requests=st.lists(st.tuples(st.floats(0, 30), st.integers(0, 5), st.floats(0.001, 5)), min_size=1, max_size=60),
    bring_s=st.floats(0.001, 5),
)
def test_whatever_comes_is_answered_once_by_its_own_model(
    groups: list[str], requests: list[tuple[float, int, float]], bring_s: float
) -> None:
    models = {f"m{number}": group for number, group in enumerate(groups)}
    world = World(models, bring_s=bring_s)
    asked = world.run(Asked(at, f"m{model % len(groups)}", takes_s) for at, model, takes_s in requests)
    longest_s = max(takes_s for _, _, takes_s in requests)
    turn_s = max(TURN_S, bring_s) + longest_s + 2 * bring_s
    assert max(request.waited_s for request in asked) <= (len(groups) * 2 + 1) * turn_s + len(asked) * bring_s


def test_what_makes_way_is_asked_once_as_long_as_nothing_could_be_cut() -> None:
    turns = Turns(turn_s=TURN_S, max_waiting=9)

    def bring(model: str, now: float, displaced: str) -> list[Ask]:
        """Asks for a model and has it brought; returns what had to be found out for it."""
        ticket = turns.ask(model, now, lambda: None)
        asked = []
        while isinstance(step := turns.next_step(now), Ask):
            asked.append(step)
            turns.displaces(step.model, frozenset({displaced}))
        assert step == Bring(model)
        turns.begin(model, now)
        turns.serving({model: ""}, now)
        turns.brought(now)
        turns.next_step(now)
        assert ticket.is_inside
        turns.leave(ticket)
        return asked

    assert [bool(bring(model, now, other)) for now, model, other in ((1, "a", ""), (2, "b", "a"), (3, "a", "b"))] == [
        True, True, True,
    ]  # fmt: skip
    assert bring("b", 4.0, "a") == [] and bring("a", 5.0, "b") == []
    inside = turns.ask("a", 6.0, lambda: None)
    turns.ask("b", 6.0, lambda: None)
    assert inside.is_inside and turns.next_step(6.0) == Ask("b"), "memory may have filled, and something could be cut"
