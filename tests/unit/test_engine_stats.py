# SPDX-License-Identifier: Apache-2.0
"""An engine's GPU memory is the sum over its processes, and a hanging driver delays no caller."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
from waiting import PATIENCE_S

from flashd.daemon.events import Events
from flashd.daemon.serving import engine_stats
from flashd.daemon.serving.engine_stats import EngineStatsBook
from flashd.engines import engine
from flashd.engines.engine import EngineState, EngineStats
from flashd.swap.slots import EngineSlot, Slots
from flashd.swap.swapper import Swapper


@dataclass
class Engine:
    pid: int
    number: int = 1
    state: EngineState = EngineState.PARKED

    async def stats(self) -> EngineStats:
        return EngineStats(0, 5, 0)


class Engines:
    """What a swapper says of its engines."""

    def __init__(self, pid: int) -> None:
        self.slots = Slots(MagicMock(), lambda: None, lambda target: False, lambda engine: None)
        self.slots.parked.append(EngineSlot(cast(engine.Engine, Engine(pid)), MagicMock(), None))


def book(pid: int, device_bytes: Any, told: asyncio.Event) -> EngineStatsBook:
    events = Events()
    events.engine_changed.subscribe(lambda number: told.set())
    return EngineStatsBook(
        cast(Swapper, Engines(pid)), events, idle_timeout_s=lambda target: 0.0, device_bytes=device_bytes
    )


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_stats, "_ASK_EVERY_S", 0.01)


async def test_all_processes_of_an_engine_count_and_no_others() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    told = asyncio.Event()
    stats = book(os.getpid(), lambda: {os.getpid(): 100, child.pid: 20, 1: 3}, told)
    stats.start()
    async with asyncio.timeout(PATIENCE_S):
        while stats.device_bytes(1) != 120:
            await asyncio.sleep(0.01)
    assert told.is_set() and stats.of(1).memory_bytes == 5
    await stats.close()
    child.communicate(b"\n")


async def test_a_driver_that_hangs_keeps_nobody_waiting() -> None:
    may_answer, told = threading.Event(), asyncio.Event()

    def hang() -> Mapping[int, int]:
        assert may_answer.wait(PATIENCE_S)
        return {}

    stats = book(os.getpid(), hang, told)
    stats.start()
    await asyncio.wait_for(told.wait(), 10)
    assert (stats.of(1).memory_bytes, stats.device_bytes(1)) == (5, 0)
    may_answer.set()
    await stats.close()
