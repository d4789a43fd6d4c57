# SPDX-License-Identifier: Apache-2.0
"""The gate before an engine's model: a drain waits for every admitted request, in any order of events."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

from flashd.engines.messages import GateState
from flashd.errors import EngineFailed
from flashd.workers import gate
from flashd.workers.gate import Gate, NotServing


class Engine:
    """A gate, and the model behind it, which an exchange leaves in pieces for a moment."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.gate.open()
        self.model = 0
        self.answered: list[tuple[int, int]] = []  # by which model each began and ended

    async def exchange(self, model: int) -> None:
        await self.gate.drain(5)
        self.model = -1
        await asyncio.sleep(0)
        self.model = model
        self.gate.open()

    async def ask(self) -> None:
        async with self.gate.passage():
            began = self.model
            for _ in range(3):
                await asyncio.sleep(0)
            self.answered.append((began, self.model))


async def test_a_request_that_waited_is_inside_before_the_next_drain() -> None:
    engine = Engine()
    await engine.gate.drain(1)
    waiting = [asyncio.create_task(engine.ask()) for _ in range(3)]
    await asyncio.sleep(0)
    engine.gate.open()
    await engine.gate.drain(5)
    assert engine.answered == [(0, 0)] * 3, "they were let in, so the drain waited for them"
    assert engine.gate.active == 0 and all(task.done() for task in waiting)


@pytest.mark.parametrize("seed", range(20))
async def test_every_answer_is_of_one_model_whenever_it_came(seed: int) -> None:
    chance, engine = random.Random(seed), Engine()

    async def client() -> None:
        for _ in range(20):
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(0)
            asking = asyncio.create_task(engine.ask())
            if chance.random() < 0.3:  # the client leaves, at any step
                for _ in range(chance.randrange(6)):
                    await asyncio.sleep(0)
                asking.cancel()
            await asyncio.wait({asking})

    async def swaps() -> None:
        for model in range(1, 60):
            await engine.exchange(model)
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)

    async with asyncio.timeout(30):
        await asyncio.gather(swaps(), *(client() for _ in range(8)))
    assert len(engine.answered) > 50
    assert [pair for pair in engine.answered if pair[0] != pair[1] or pair[0] < 0] == []
    assert engine.gate.active == 0 and not engine.gate._waiting


async def test_one_that_leaves_as_it_is_let_in_holds_up_nobody() -> None:
    engine = Engine()
    await engine.gate.drain(1)
    waiting = asyncio.create_task(engine.ask())
    await asyncio.sleep(0)
    engine.gate.open()
    waiting.cancel()
    async with asyncio.timeout(30):
        await engine.gate.drain(4)
    assert waiting.cancelled() and engine.gate.active == 0


async def test_a_client_that_does_not_read_is_waited_for_until_it_is_cut() -> None:
    engine, cut = Engine(), threading.Event()
    sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    engine.gate.track(sent, cut, until_cut=True)
    draining = asyncio.create_task(engine.gate.drain(10))
    await asyncio.sleep(0)
    assert engine.gate.active == 1 and not draining.done()
    draining.cancel()
    await engine.gate.drain(0.01)
    assert cut.is_set() and engine.gate.active == 0
    sent.set_result(None)


async def test_parking_refuses_those_who_wait_and_those_who_come() -> None:
    engine = Engine()
    await engine.gate.drain(1)
    waiting = asyncio.create_task(engine.ask())
    await asyncio.sleep(0)
    engine.gate.park()
    for asking in (waiting, asyncio.create_task(engine.ask())):
        with pytest.raises(NotServing, match="parked"):
            await asking
    assert engine.gate.state is GateState.PARKED


async def test_who_waits_for_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "HELD_AT_MOST_S", 0.01)
    engine = Engine()
    await engine.gate.drain(1)
    with pytest.raises(NotServing, match="busy with a swap"):
        await engine.ask()
    assert not engine.gate._waiting


async def test_one_that_does_not_end_when_told_fails_the_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "CUT_S", 0.01)
    engine, cut = Engine(), threading.Event()
    async with engine.gate.passage(cut):
        with pytest.raises(EngineFailed, match="1 requests still run"):
            await engine.gate.drain(0.01)
        assert cut.is_set()
