# SPDX-License-Identifier: Apache-2.0
"""New models are made ready one by one, the newest first, and only while the daemon is idle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from unittest.mock import MagicMock

import pytest
from waiting import PATIENCE_S

from flashd.daemon.events import Events
from flashd.daemon.job import Job, JobState, Owner, Result
from flashd.daemon.jobs import Jobs
from flashd.daemon.serving.loads import is_free
from flashd.daemon.serving.warmup import Warmup
from flashd.errors import NotFound
from flashd.memory.arena import HugePages
from flashd.memory.device import Device, HostDevice, simulated_device
from flashd.units import GiB


class House:
    """What warming up needs of the daemon. It lasts until `finish`."""

    def __init__(self) -> None:
        self.events = Events()
        self.jobs = Jobs(Events())
        self.warmup = Warmup(self.warm_up, self.events, is_idle=lambda: self.is_idle)
        self.is_idle = True
        self.room = True
        self.begun: list[str] = []
        self.finish = asyncio.Event()

    async def warm_up(self, name: str) -> Job | None:
        if name == "gone":
            raise NotFound("there is no model 'gone'")

        async def work(job: Job) -> Result:
            job.begin()
            await self.finish.wait()
            return {}

        self.begun.append(name)
        return self.jobs.run("warm-up", name, Owner("", 0), work) if self.room else None

    async def until_begun(self, *names: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.begun != list(names):
                await asyncio.sleep(0.01)

    def publish(self, name: str) -> None:
        model = MagicMock()
        model.name = name
        self.events.model_published(model)

    def states(self) -> list[JobState]:
        return [job.state for job in self.jobs]


@pytest.fixture
async def house() -> AsyncIterator[House]:
    made = House()
    made.warmup.start()
    yield made
    await made.warmup.close()
    await made.jobs.close()


async def test_the_newest_comes_first_and_each_once(house: House) -> None:
    house.publish("first")
    await house.until_begun("first")
    for name in ("ada", "bob", "gone", "ada", "eve"):
        house.publish(name)
    house.finish.set()
    await house.until_begun("first", "eve", "ada", "bob")


async def test_a_swap_to_another_interrupts_it_and_a_swap_to_itself_does_not(house: House) -> None:
    house.publish("ada")
    await house.until_begun("ada")
    house.events.model_asked("ada")
    await asyncio.sleep(0)
    assert house.states() == [JobState.RUNNING]
    house.is_idle = False
    house.events.model_asked("bob")
    await next(iter(house.jobs)).wait()
    assert house.states() == [JobState.CANCELLED]
    house.is_idle = True
    await house.until_begun("ada", "ada")


async def test_what_a_person_cancels_is_not_begun_again(house: House) -> None:
    house.publish("ada")
    await house.until_begun("ada")
    next(iter(house.jobs)).cancel()
    house.publish("bob")
    await house.until_begun("ada", "bob")


async def test_where_no_room_is_free_the_next_one_has_its_turn(house: House) -> None:
    house.room = False
    house.publish("bob")
    house.publish("ada")
    await house.until_begun("ada", "bob")
    assert house.states() == []


@pytest.mark.parametrize(
    ("is_card", "pool_bytes", "available_bytes", "expected"),
    [
        (False, 8 * GiB, 12 * GiB, True),
        (False, 8 * GiB, 7 * GiB, False),
        (False, 3 * GiB, 12 * GiB, False),
        (True, 8 * GiB, 1 * GiB, True),
        (True, 3 * GiB, 12 * GiB, False),
    ],
    ids=["room", "others need the machine's memory", "the pool is full", "a card has its own", "the card is full"],
)
def test_a_quarter_of_the_machine_is_left_to_others(
    is_card: bool, pool_bytes: int, available_bytes: int, expected: bool
) -> None:
    """4 GiB for a new model, of a machine of 16."""
    host = HostDevice("host", 16 * GiB, HugePages.NONE)
    device: Device = simulated_device(16 * GiB, host) if is_card else host
    memory = {"MemTotal": 16 * GiB, "MemAvailable": available_bytes}
    assert is_free(device, pool_bytes, 4 * GiB, memory) is expected
