# SPDX-License-Identifier: Apache-2.0
"""A defect in what runs beside everything else is told, and ends no routine."""

from __future__ import annotations

import asyncio

import pytest

from flashd.daemon import threads
from flashd.daemon.threads import Routine, tell_defect


async def test_a_routine_goes_on_after_a_defect_and_tells_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(threads, "_AFTER_DEFECT_S", 0)
    rounds, enough = 0, asyncio.Event()

    async def one_round() -> None:
        nonlocal rounds
        rounds += 1
        if rounds < 3:
            raise KeyError("a defect")
        enough.set()
        await asyncio.Event().wait()

    routine = Routine("looking around", one_round)
    await routine.close()  # before it was started
    routine.start()
    async with asyncio.timeout(10):
        await enough.wait()
    await routine.close()
    assert rounds == 3
    (told,) = caplog.records
    assert told.getMessage() == "defect in looking around" and told.exc_info is not None


async def test_a_task_that_nobody_waits_for_tells_its_defect_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise KeyError("a defect")

    for work in (fails(), asyncio.sleep(0), asyncio.sleep(60)):
        task = asyncio.create_task(work, name="this")
        task.add_done_callback(tell_defect)
        asyncio.get_running_loop().call_later(0.05, task.cancel)
        await asyncio.wait({task})
        await asyncio.sleep(0)
    assert [record.getMessage() for record in caplog.records] == ["defect in this"]


async def test_a_routine_ends_though_its_round_must_come_to_an_end_first() -> None:
    begun = asyncio.Event()

    async def one_round() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return  # what was under way is done

    routine = Routine("a round", one_round)
    routine.start()
    async with asyncio.timeout(10):
        await begun.wait()
        await routine.close()
