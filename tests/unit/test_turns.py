# SPDX-License-Identifier: Apache-2.0
"""Conversions of one owner run in turn, do not delay those of others, and do not wait for a stalled one."""

from __future__ import annotations

import asyncio

import pytest
from waiting import PATIENCE_S

from flashd.daemon.ingest import turns
from flashd.daemon.ingest.turns import AT_ONCE, MOST_STALLED, Turn, Turns

ANN, BEN, CID = 1, 2, 3


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_LOOK_S", 0.01)


class Takers:
    """Tasks that ask for turns, and the turns they got, in order."""

    def __init__(self, made: Turns) -> None:
        self.turns = made
        self.got: list[str] = []
        self.held: dict[str, Turn] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, owner: int) -> None:
        async def take() -> None:
            self.held[name] = await self.turns.take(owner)
            self.got.append(name)

        self.tasks[name] = asyncio.create_task(take())
        await settled()

    async def end(self, name: str) -> None:
        self.turns.end(self.held[name])
        await settled()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_owners_do_not_wait_for_each_other_and_take_turns_in_rotation() -> None:
    takers = Takers(Turns())
    for number in range(3):
        await takers.ask(f"ann{number}", ANN)
    await takers.ask("ben0", BEN)
    assert takers.got == ["ann0", "ben0"], "one of each, however many one has"
    await takers.ask("cid0", CID)
    assert len(takers.got) == AT_ONCE
    await takers.end("ann0")
    assert takers.got[2:] == ["cid0"], "it never had one"
    await takers.end("ben0")
    await takers.end("cid0")
    assert takers.got[3:] == ["ann1"]


async def test_who_stalls_gives_the_turn_away_and_may_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def look() -> None:
        nonlocal asked
        asked += 1

    monkeypatch.setattr(turns, "STILL_S", 3600.0)
    said: list[bool] = []
    made = Turns(look)
    takers = Takers(made)
    first = await made.take(ANN, said.append)
    await takers.ask("next", ANN)
    await asyncio.sleep(0.05)
    assert takers.got == [] and asked == 0
    monkeypatch.setattr(turns, "STILL_S", 0.0)
    async with asyncio.timeout(PATIENCE_S):
        await takers.tasks["next"]
        while asked < 2:
            await asyncio.sleep(0.01)
    monkeypatch.setattr(turns, "STILL_S", 3600.0)
    first.moved()
    await asyncio.sleep(0.05)
    assert said == [True, False]


async def test_one_owner_keeps_no_more_than_some_threads_that_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "STILL_S", 0.0)
    takers = Takers(Turns())
    for number in range(MOST_STALLED + 1):
        await takers.ask(f"ann{number}", ANN)
    async with asyncio.timeout(PATIENCE_S):
        while len(takers.got) < MOST_STALLED:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert len(takers.got) == MOST_STALLED
    await takers.ask("ben", BEN)
    async with asyncio.timeout(PATIENCE_S):
        await takers.tasks["ben"]
    await takers.end("ann0")
    async with asyncio.timeout(PATIENCE_S):
        await takers.tasks[f"ann{MOST_STALLED}"]


async def test_who_no_longer_waits_takes_nobodys_turn() -> None:
    takers = Takers(Turns())
    await takers.ask("first", ANN)
    await takers.ask("gone", ANN)
    await takers.ask("last", ANN)
    takers.tasks["gone"].cancel()
    takers.turns.end(takers.held["first"])
    await settled()
    assert takers.got == ["first", "last"]


async def test_who_is_cancelled_as_the_turn_comes_gives_it_back() -> None:
    takers = Takers(Turns())
    await takers.ask("first", ANN)
    await takers.ask("gone", ANN)
    await takers.ask("last", ANN)
    takers.turns.end(takers.held["first"])
    takers.tasks["gone"].cancel()  # before it ran again
    await settled()
    assert takers.got == ["first", "last"]
