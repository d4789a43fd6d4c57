# SPDX-License-Identifier: Apache-2.0
"""The engines and what each is for: the active model, one beside it, or none; and where clients are led."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from flashd.engines.engine import Engine, EngineState
from flashd.swap.weights import Supply, Target

_TURNS, _TURNS_S = 4, 30.0  # models that change so often in so short a time are worth another engine


class Endpoint(Protocol):
    """The one address of whichever model is active, and the engines' own."""

    def point_to(self, socket_path: Path | None, *, is_private: bool = False) -> None: ...

    def open(self, socket_path: Path, *, is_private: bool) -> None:
        """Lets clients connect to an engine that serves beside the active one."""

    def shut(self, socket_path: Path) -> None:
        """Notes that it does not serve there any more. Raises nothing."""


@dataclass(slots=True, eq=False)
class EngineSlot:
    """An engine, the model it has or had last, and what it was given for it: nothing while it is parked.

    It `is_shut` from drain until it takes weights or resumes, and while it is parked: requests are held back, or passed
    on if it `is_leaving`, that is, about to be parked or ended.
    """

    engine: Engine
    target: Target
    supply: Supply | None
    is_shut: bool = False
    is_leaving: bool = False
    was_active: bool = False  # the endpoint led to it when it served last
    used_at: float = 0.0  # when a request was last seen, or it began to serve; of time.monotonic()
    stays_shared: bool = False  # no other engine could be started beside it
    _turns: deque[float] = field(default_factory=lambda: deque(maxlen=_TURNS))  # times of its last rebinds

    @property
    def answers(self) -> bool:
        """True if a request that comes now is answered, even if it must wait for the end of a rebind."""
        return self.engine.state is EngineState.SERVING and not self.is_leaving

    @property
    def is_contended(self) -> bool:
        """True if models take turns in it at short intervals, and another engine may help."""
        return not self.stays_shared and len(self._turns) == _TURNS and time.monotonic() - self._turns[0] < _TURNS_S

    def note_turn(self) -> None:
        """Notes that the engine serves another model from now on."""
        self._turns.append(time.monotonic())

    def takes(self, target: Target, supply: Supply) -> None:
        self.supply, self.target, self.is_shut, self.is_leaving = supply, target, False, False

    def release(self) -> None:
        """Gives up what the engine was given."""
        if self.supply is not None:
            self.supply.release()
            self.supply = None

    @property
    def takes_others(self) -> bool:
        """False on a GPU whose weights could not be saved as an image: the engine may hold state from those weights
        that a rebind would not replace."""
        return self.supply is None or self.supply.plan is None or self.supply.is_image


class Slots:
    """All engines. Each change moves the endpoint, and is told of."""

    def __init__(
        self,
        endpoint: Endpoint,
        on_change: Callable[[], None],
        on_displaced: Callable[[Target], bool],
        on_ended: Callable[[Engine], None],
    ) -> None:
        """`on_displaced` is told of the active model when another one takes its engine to serve in it; it returns
        whether it made the endpoint lead elsewhere. `on_ended` is told of engines that have ended.
        """
        self._endpoint = endpoint
        self._on_change = on_change
        self._on_displaced = on_displaced
        self._on_ended = on_ended
        self.active: EngineSlot | None = None
        self.beside: list[EngineSlot] = []  # serving too; the one that began longest ago first
        self.parked: list[EngineSlot] = []  # parked, or about to be; longest ago first
        self.dispensable: list[Supply] = []  # given to engines that are started before anybody needs them

    def __iter__(self) -> Iterator[EngineSlot]:
        """All engines: the active one first, then others that serve, then those that are parked."""
        return iter([*self.serving, *reversed(self.parked)])

    def __len__(self) -> int:
        return len(self.serving) + len(self.parked)

    @property
    def serving(self) -> list[EngineSlot]:
        """Lists the engines that answer requests, the active one first, then the one that began last."""
        return ([self.active] if self.active else []) + list(reversed(self.beside))

    def leads_to_endpoint(self, number: int) -> bool:
        """Tells whether connections to an engine are for whichever model is active: it served as the active one."""
        return any(slot.engine.number == number and slot.was_active for slot in self)

    def of(self, model_name: str) -> EngineSlot | None:
        """The engine in which a model serves."""
        return next((slot for slot in self.serving if slot.target.model_name == model_name), None)

    def place(self, slot: EngineSlot, *, is_active: bool) -> None:
        """Notes that an engine serves, as the active one or beside it."""
        if is_active:
            self.activate(slot)
            return
        self._endpoint.open(slot.engine.socket_path, is_private=slot.target.private_to is not None)
        slot.was_active, slot.used_at = False, time.monotonic()
        if slot in self.parked:
            self.parked.remove(slot)
        if slot not in self.beside:
            self.beside.append(slot)
        self._on_change()

    def displace_active(self) -> None:
        """Makes no model the active one, since its engine is needed for another that serves beside."""
        if self.active is not None:
            slot, self.active = self.active, None
            self.parked.append(slot)
            if not self._on_displaced(slot.target):
                self._endpoint.point_to(None)
            self._on_change()

    def retire(self, slot: EngineSlot) -> None:
        """Has an engine that serves beside the active one join the parked ones; it soon is parked."""
        self.beside.remove(slot)
        self.parked.append(slot)
        self._endpoint.shut(slot.engine.socket_path)
        self._on_change()

    def retire_other_versions(self, target: Target, engine: Engine) -> None:
        """Has what serves beside under the name of a model that was just brought make way for it."""
        for slot in list(self.beside):
            if slot.target.model_name == target.model_name and slot.engine is not engine:
                self.retire(slot)

    def activate(self, slot: EngineSlot | None, move_endpoint: Callable[[], None] | None = None) -> None:
        """Moves the endpoint. The previous engine joins the parked ones, and is parked soon."""
        if move_endpoint is not None:
            move_endpoint()
        elif slot is None:
            self._endpoint.point_to(None)
        else:
            self._endpoint.point_to(slot.engine.socket_path, is_private=slot.target.private_to is not None)
        old, self.active = self.active, slot
        if slot is not None:
            slot.was_active, slot.used_at = True, time.monotonic()
            self._endpoint.shut(slot.engine.socket_path)
        if slot in self.parked:
            self.parked.remove(slot)
        if slot is not None and slot in self.beside:
            self.beside.remove(slot)
        if old is not None and old is not slot:
            self.parked.append(old)
        self._on_change()

    def forget(self, slot: EngineSlot) -> None:
        slot.release()
        for others in (self.parked, self.beside):
            if slot in others:
                others.remove(slot)
        self._on_ended(slot.engine)
        self._endpoint.shut(slot.engine.socket_path)
        if slot is self.active:
            self.active = None
            self._endpoint.point_to(None)
        self._on_change()
