# SPDX-License-Identifier: Apache-2.0
"""A slow GPU driver delays no other caller."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

from waiting import PATIENCE_S

from flashd.daemon.events import Events
from flashd.daemon.serving.driver_usage import DriverUsage
from flashd.memory.device import Device, Kind
from flashd.tasks import Background


class Slow:
    """A card whose driver answers when it is let."""

    name = "cuda:0"
    kind = Kind.CUDA

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.asked = 0

    def used_bytes(self) -> int:
        self.asked += 1
        assert self.may_answer.wait(PATIENCE_S)
        return 7


async def test_a_slow_driver_is_asked_once_beside_the_loop_and_its_answer_announced() -> None:
    background, told = Background(), asyncio.Event()
    events = Events()
    events.device_changed.subscribe(lambda name: told.set())
    usage = DriverUsage(background, events)
    card = Slow()
    for _ in range(5):
        assert usage.of(cast(Device, card)) == 0
        await asyncio.sleep(0.01)
    assert card.asked == 1
    card.may_answer.set()
    await asyncio.wait_for(told.wait(), 10)
    assert usage.of(cast(Device, card)) == 7
    await background.close()


async def test_what_the_kernel_knows_is_read_at_once() -> None:
    class Host:
        name, kind = "host", Kind.HOST

        def used_bytes(self) -> int:
            return 9

    host: Any = Host()
    assert DriverUsage(Background(), Events()).of(host) == 9
