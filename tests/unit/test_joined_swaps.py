# SPDX-License-Identifier: Apache-2.0
"""Swaps requested by several callers, and swaps to models that become private meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from flashd.daemon.changing_models import Changes
from flashd.daemon.events import Events
from flashd.daemon.job import JobState, Owner
from flashd.daemon.jobs import Jobs
from flashd.daemon.serving.swaps import Swaps
from flashd.dbus.object_tree import EVERYBODY
from flashd.memory.device import Tier
from flashd.swap.slots import Slots
from flashd.swap.swapper import How, Outcome

ALICE, BOB = Owner(":1.1", 1000), Owner(":1.2", 1001)


class Slow:
    """A swapper whose swaps heed a cancel only when what is under way has ended."""

    def __init__(self) -> None:
        self.slots = Slots(MagicMock(), lambda: None, lambda target: False, lambda engine: None)
        self.goes_on = asyncio.Event()
        self.begun = 0

    async def swap(self, target: Any, *_: Any, **__: Any) -> Outcome:
        self.begun += 1
        try:
            await self.goes_on.wait()
        except asyncio.CancelledError:
            await self.goes_on.wait()
            raise
        self.slots.active = MagicMock(target=target)
        return Outcome("ada", 1, How.WAKE, Tier.HOST, 0.01)

    async def park(self, target: Any) -> None:
        self.slots.active = None


class Setup:
    """What serves, with doubles of all that it does not ask here; `models` are those in the store, by name."""

    def __init__(self) -> None:
        self.swapper = Slow()
        self.events = Events()
        self.jobs = Jobs(self.events)
        self.models: dict[str, Any] = {}
        catalog, ownership, targets = MagicMock(), MagicMock(), MagicMock()
        catalog.get.side_effect = self.models.get
        ownership.audience_of.return_value = EVERYBODY
        targets.of.side_effect = lambda model, kind="": MagicMock(model_name=model.name, private_to=None)
        self.swaps = Swaps(
            catalog, MagicMock(), self.swapper, targets, self.jobs, ownership, Changes(), MagicMock(), self.events,  # type: ignore[arg-type]
            endpoint=Path("/endpoint"), ourselves=Owner("", 0),
        )  # fmt: skip

    def model(self, name: str, *, private: bool) -> Any:
        self.models[name] = model = MagicMock(private=private, owner_uid=ALICE.uid)
        model.name = name
        return model


async def test_a_swap_that_is_being_cancelled_is_joined_by_nobody() -> None:
    made = Setup()
    swaps, swapper, model = made.swaps, made.swapper, made.model("ada", private=False)
    first = swaps.swap(model, ALICE)
    assert swaps.swap(model, BOB) is first
    while not swapper.begun:
        await asyncio.sleep(0)
    for asker in (ALICE, BOB):
        first.withdraw(asker)
    await asyncio.sleep(0)
    assert not first.finished, "it is told, and has not ended"
    second = swaps.swap(model, BOB)
    assert second is not first
    swapper.goes_on.set()
    await first.wait()
    await second.wait()
    assert (first.state, second.state) == (JobState.CANCELLED, JobState.DONE)


@pytest.mark.parametrize("becomes_private", [True, False])
async def test_a_version_that_becomes_private_during_the_swap_is_parked(becomes_private: bool) -> None:
    made = Setup()
    job = made.swaps.swap(made.model("ada", private=False), BOB)
    while not made.swapper.begun:
        await asyncio.sleep(0)
    made.model("ada", private=becomes_private)
    made.events.audience_changed("ada")
    made.swapper.goes_on.set()
    await job.wait()
    for each in made.jobs:
        await each.wait()
    assert job.state is JobState.DONE
    assert (made.swapper.slots.active is None) is becomes_private
