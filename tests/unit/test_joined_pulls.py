# SPDX-License-Identifier: Apache-2.0
"""Pulls that requests share. tests/bus/test_gateway_pulls.py has them with a daemon and a hub."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from flashd.client.client import Client, Job
from flashd.errors import LimitExceeded, NotFound, Unavailable
from flashd.gateway.kept_client import Progress
from flashd.gateway.pulls import Pulls, is_repository


class Daemon:
    """Stands in for a KeptClient. Its jobs end when they are told to, and take a moment to be cancelled."""

    def __init__(self) -> None:
        self.jobs: list[asyncio.Future[None]] = []
        self.cancelled = 0
        self.running = self.most_at_once = 0

    async def run_job(self, _: Callable[[Client], Job], on_progress: Callable[[Progress], None]) -> None:
        self.jobs.append(job := asyncio.get_running_loop().create_future())
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        on_progress(Progress("downloading", 1, 4))
        try:
            await job
        except asyncio.CancelledError:
            for _ in range(3):
                await asyncio.sleep(0)
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


async def at_once(_: str) -> None:
    pass


def made(daemon: Any, *, max_waiting: int = 9, until_listed: Callable[[str], Awaitable[None]] = at_once) -> Pulls:
    return Pulls(daemon, lambda: max_waiting, until_listed)


async def wait_for(pulls: Pulls, repository: str) -> list[Progress]:
    async with pulls.joined(repository) as pull:
        return [progress async for progress in pull.steps()]


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_all_wait_for_one_pull_and_hear_how_it_ends() -> None:
    daemon = Daemon()
    pulls = made(daemon)
    waiting = [asyncio.create_task(wait_for(pulls, "a/b")) for _ in range(3)]
    await settled()
    assert str(pulls.progress("a/b")) == "downloading, 25 % of 4 B" and pulls.progress("a/c") is None
    (job,) = daemon.jobs
    job.set_exception(NotFound("the hub shows you no model"))
    for each in waiting:
        with pytest.raises(NotFound):
            await each
    await settled()
    assert pulls.progress("a/b") is None
    again = asyncio.create_task(wait_for(pulls, "a/b"))
    await settled()
    daemon.jobs[1].set_result(None)
    assert (await again)[-1] == Progress("downloading", 1, 4)


async def test_it_is_cancelled_with_the_last_and_another_begins_after_its_end() -> None:
    daemon = Daemon()
    pulls = made(daemon)
    first, last = (asyncio.create_task(wait_for(pulls, "a/b")) for _ in range(2))
    await settled()
    first.cancel()
    await settled()
    assert not daemon.cancelled
    last.cancel()
    await asyncio.sleep(0)
    another = asyncio.create_task(wait_for(pulls, "a/b"))
    for _ in range(3):
        await settled()
    assert daemon.cancelled == 1 and len(daemon.jobs) == 2
    assert daemon.most_at_once == 1, "two would download the same files"
    daemon.jobs[1].set_result(None)
    await another


async def test_nothing_is_pulled_again_before_the_news_of_the_model_has_come() -> None:
    is_listed = asyncio.Event()

    async def until_listed(_: str) -> None:
        await is_listed.wait()

    daemon = Daemon()
    pulls = made(daemon, until_listed=until_listed)
    first = asyncio.create_task(wait_for(pulls, "a/b"))
    await settled()
    daemon.jobs[0].set_result(None)
    await settled()
    late = asyncio.create_task(wait_for(pulls, "a/b"))
    await settled()
    assert len(daemon.jobs) == 1 and not first.done() and not late.done()
    is_listed.set()
    await asyncio.gather(first, late)


async def test_neither_pulls_nor_those_who_wait_are_without_number() -> None:
    daemon = Daemon()
    pulls = made(daemon, max_waiting=2)
    waiting = [asyncio.create_task(wait_for(pulls, "a/b")) for _ in range(2)]
    await settled()
    with pytest.raises(LimitExceeded, match="2 requests wait for a/b already"):
        await wait_for(pulls, "a/b")
    waiting += [asyncio.create_task(wait_for(pulls, f"a/{number}")) for number in range(7)]
    await settled()
    with pytest.raises(LimitExceeded, match="8 pulls"):
        await wait_for(pulls, "a/c")
    await pulls.close(1.0)
    assert daemon.cancelled == 8
    for each in waiting:
        with pytest.raises(Unavailable, match="is stopping"):
            await each
    with pytest.raises(Unavailable, match="is stopping"):
        await wait_for(pulls, "a/d")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("a/b", True),
        ("a/b-GGUF:Q4_K_M", True),
        ("a/b:", False),
        ("a/b:c/d", False),
        ("a", False),
        ("a/b/c", False),
        ("/b", False),
        ("a b/c", False),
        ("ä/b", False),
    ],
)
def test_what_looks_like_a_repository(name: str, is_one: bool) -> None:
    assert is_repository(name) is is_one
