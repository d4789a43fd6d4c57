# SPDX-License-Identifier: Apache-2.0
"""Background tasks: a defect is logged, and does not end a periodic one."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest
from waiting import PATIENCE_S

from flashd import tasks
from flashd.dbus import messages
from flashd.errors import Cancelled
from flashd.tasks import Routine, Stop, in_thread, tell_defect


async def test_a_routine_goes_on_after_a_defect_and_tells_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "_AFTER_DEFECT_S", 0)
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
    async with asyncio.timeout(PATIENCE_S):
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
            return  # the current run is complete

    routine = Routine("a round", one_round)
    routine.start()
    async with asyncio.timeout(PATIENCE_S):
        await begun.wait()
        await routine.close()


async def test_a_thread_that_hangs_is_left_and_told_of_when_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_LAST_PATIENCE_S", 0.01)
    answers, published = threading.Event(), False

    def work(stop: Stop) -> str:
        nonlocal published
        answers.wait()
        stop.commit()
        published = True
        return "done"

    ended = asyncio.Event()
    task = asyncio.create_task(in_thread(work, ended.set))
    await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not ended.is_set()
        answers.set()
        await ended.wait()
    assert not published, "it was said to be cancelled"


async def test_what_has_begun_to_be_published_is_no_longer_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_LAST_PATIENCE_S", 0.01)
    committed, goes_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def work(stop: Stop) -> str:
        stop.commit()
        loop.call_soon_threadsafe(committed.set)
        goes_on.wait()
        return "done"

    task = asyncio.create_task(in_thread(work))
    async with asyncio.timeout(PATIENCE_S):
        await committed.wait()
        task.cancel()
        await asyncio.sleep(0.1)
        assert not task.done()
        goes_on.set()
        assert await task == "done"


async def test_a_thread_that_heeds_the_cancel_ends_as_cancelled_and_its_errors_arrive_otherwise() -> None:
    def heeds(stop: Stop) -> None:
        while not stop():
            pass
        raise Cancelled("as it was told")

    def fails(stop: Stop) -> None:
        raise KeyError("a defect")

    task = asyncio.create_task(in_thread(heeds))
    await asyncio.sleep(0.05)
    task.cancel()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(KeyError):
            await in_thread(fails)


def test_what_is_closed_aside_needs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    end, other = os.pipe()
    try:
        messages.close_aside([end])  # an error here would end the connection to the bus
        tasks.aside(lambda: None)
    finally:
        tasks.close_all([end, other])
