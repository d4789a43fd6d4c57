# SPDX-License-Identifier: Apache-2.0
"""Jobs: their states and ends, and how long they are remembered."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable

import pytest
from dbus_next import Variant

from flashd.daemon import jobs as module
from flashd.daemon.events import Events
from flashd.daemon.job import TRANSITIONS, Job, JobState, Owner, Result
from flashd.daemon.jobs import Jobs
from flashd.errors import Busy, Cancelled, Internal, NotFound
from flashd.tasks import in_thread

OWNER = Owner(":1.1", 1000)


class Heard:
    def __init__(self) -> None:
        self.states: list[str] = []
        self.forgotten: list[int] = []
        self.now = time.time()
        events = Events()
        events.job_changed.subscribe(lambda job: self.states.append(job.state.value))
        events.job_forgotten.subscribe(lambda job: self.forgotten.append(job.number))
        self.jobs = Jobs(events, clock=lambda: self.now)

    def distinct(self) -> list[str]:
        return [state for state, _ in itertools.groupby(self.states)]


async def succeed(job: Job) -> Result:
    job.begin("working")
    job.report(done_bytes=1, total_bytes=4)
    return {"answer": Variant("u", 42)}


async def test_a_job_that_succeeds() -> None:
    heard = Heard()
    job = heard.jobs.run("load", "x", OWNER, succeed)
    await job.wait()
    assert heard.distinct() == ["queued", "running", "done"]
    assert (job.done_bytes, job.total_bytes, job.error) == (4, 4, None)
    assert job.result == {"answer": Variant("u", 42)}
    assert job.finished_at >= job.created_at


async def test_a_job_that_fails_keeps_the_error() -> None:
    async def fail(job: Job) -> Result:
        job.begin()
        raise Busy("not now", hint="later")

    job = Heard().jobs.run("load", "x", OWNER, fail)
    await job.wait()
    assert (job.state, str(job.error), job.result) == (JobState.FAILED, "not now\nlater", {})


async def test_a_job_that_cannot_be_announced_does_not_stay() -> None:
    def refuse(job: Job) -> None:
        raise ZeroDivisionError

    events = Events()
    events.job_changed.subscribe(refuse)
    jobs = Jobs(events)
    with pytest.raises(ZeroDivisionError):
        jobs.run("import", "tune", OWNER, succeed)
    assert not list(jobs)


async def test_a_defect_is_internal_and_its_traceback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def defect(job: Job) -> Result:
        raise ZeroDivisionError("secret")

    with caplog.at_level(logging.ERROR):
        job = Heard().jobs.run("load", "x", OWNER, defect)
        await job.wait()
    assert isinstance(job.error, Internal)
    assert "secret" not in str(job.error)
    assert "secret" in caplog.text


async def sleep(job: Job) -> Result:
    job.begin()
    await asyncio.sleep(3600)
    return {}


@pytest.mark.parametrize("steps", [0, 3], ids=["before its first step", "while it runs"])
async def test_cancelling(steps: int) -> None:
    job = Heard().jobs.run("load", "x", OWNER, sleep)
    for _ in range(steps):
        await asyncio.sleep(0)
    job.cancel()
    await job.wait()
    assert job.state is JobState.CANCELLED
    assert isinstance(job.error, Cancelled)
    job.cancel()
    assert job.state is JobState.CANCELLED


async def test_cancelling_what_collects_and_what_is_done() -> None:
    heard = Heard()
    job = heard.jobs.create("import", "x", OWNER, collecting=True)
    job.cancel()
    assert heard.distinct() == ["collecting", "cancelled"]
    done = heard.jobs.run("load", "x", OWNER, succeed)
    await done.wait()
    done.cancel()
    await asyncio.sleep(0)
    assert done.state is JobState.DONE


async def test_no_transition_but_those_of_the_table() -> None:
    for start in JobState:
        for end in JobState:
            job = Job(1, "load", "x", OWNER, start, lambda job: None)
            if end in TRANSITIONS[start]:
                job._enter(end)
            else:
                with pytest.raises(Busy):
                    job._enter(end)


async def test_finished_jobs_are_forgotten_by_age_and_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_FINISHED", 3)
    heard = Heard()
    running = heard.jobs.run("load", "x", OWNER, sleep)
    for _ in range(5):
        await heard.jobs.run("load", "x", OWNER, succeed).wait()
    heard.jobs.forget_old()
    assert heard.forgotten == [2, 3]
    heard.now += module.KEEP_FINISHED_S + 60
    heard.jobs.forget_old()
    assert heard.forgotten == [2, 3, 4, 5, 6]
    assert list(heard.jobs) == [running]
    with pytest.raises(NotFound):
        heard.jobs.get(2)
    await heard.jobs.close()
    assert running.state is JobState.CANCELLED


async def test_work_in_a_thread_ends_before_its_cancelled_task_does() -> None:
    ended = threading.Event()

    def work(cancelled: Callable[[], bool]) -> None:
        while not cancelled():
            time.sleep(0.001)
        time.sleep(0.05)
        ended.set()
        raise Cancelled("asked to")

    task = asyncio.create_task(in_thread(work))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_work_that_finished_all_the_same_has_finished() -> None:
    def work(cancelled: Callable[[], bool]) -> str:
        while not cancelled():
            time.sleep(0.001)
        return "published"

    task = asyncio.create_task(in_thread(work))
    await asyncio.sleep(0.02)
    task.cancel()
    assert await task == "published"


async def test_what_a_thread_reports_too_late_is_ignored() -> None:
    heard = Heard()
    job = heard.jobs.run("load", "x", OWNER, succeed)
    tell = job.progress_from_thread()
    await job.wait()
    await asyncio.to_thread(tell, 1, 2)
    await asyncio.sleep(0.01)
    assert (job.done_bytes, job.total_bytes) == (4, 4)
