# SPDX-License-Identifier: Apache-2.0
"""Parked engines are stopped one at a time, and only while the machine is short of memory."""

from __future__ import annotations

import asyncio
import contextlib

from waiting import PATIENCE_S

from flashd.daemon.serving.memory_pressure import MemoryPressure
from flashd.units import GiB


class Machine:
    """A machine whose memory is a number, and a swapper with engines of a GiB each."""

    def __init__(self, parked: int, available_bytes: int) -> None:
        self.parked = parked
        self.available_bytes = available_bytes
        self.looks = 0

    @property
    def has_parked(self) -> bool:
        return self.parked > 0

    async def stop_parked(self, *, at_most: int) -> int:
        stopped = min(at_most, self.parked)
        self.parked -= stopped
        self.available_bytes += stopped * GiB
        return stopped

    def memory(self) -> dict[str, int]:
        self.looks += 1
        return {"MemTotal": 64 * GiB, "MemAvailable": self.available_bytes}

    async def watched(self, spare_bytes: int = 0) -> None:
        """Returns when there was nothing to do a few times."""
        pressure = MemoryPressure(self, spare_bytes=lambda: spare_bytes, memory=self.memory, look_s=0.001)  # type: ignore[arg-type]
        pressure.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while self.parked and self.looks < 10:
                    await asyncio.sleep(0.001)
        await pressure.close()


async def test_no_more_is_given_up_than_is_missing() -> None:
    machine = Machine(parked=3, available_bytes=GiB // 2)
    await machine.watched()
    assert (machine.parked, machine.available_bytes) == (2, 3 * GiB // 2), "a 64th is a GiB here"


async def test_what_is_configured_counts() -> None:
    machine = Machine(parked=2, available_bytes=8 * GiB)
    await machine.watched()
    assert machine.parked == 2
    machine.looks = 0
    await machine.watched(spare_bytes=100 * GiB)
    assert machine.parked == 0
