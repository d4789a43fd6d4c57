# SPDX-License-Identifier: Apache-2.0
"""What does everybody use of each device, by its driver? Asked in a thread: a driver may take its time, or hang.

Nobody waits for the answer: a property shows the last one, and a new one is announced.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from flashd.daemon.threads import Background
from flashd.memory.device import Device, Kind

_FRESH_S = 1.0


class DriverUsage:
    """What drivers said last; `on_change` hears of a device's name."""

    def __init__(self, background: Background, on_change: Callable[[str], None]) -> None:
        self._background = background
        self._on_change = on_change
        self._known: dict[str, int] = {}
        self._asked_at: dict[str, float] = {}
        self._asking: set[str] = set()

    def of(self, device: Device) -> int:
        if device.kind is not Kind.CUDA:
            return device.used_bytes()  # the kernel's own books, which are open
        name, now = device.name, time.monotonic()
        if name not in self._asking and now - self._asked_at.get(name, -_FRESH_S) >= _FRESH_S:
            self._asking.add(name)
            self._asked_at[name] = now
            self._background.start(self._ask(device))
        return self._known.get(name, 0)

    async def _ask(self, device: Device) -> None:
        try:
            used_bytes = await asyncio.to_thread(device.used_bytes)
        finally:
            self._asking.discard(device.name)
        if used_bytes != self._known.get(device.name):
            self._known[device.name] = used_bytes
            self._on_change(device.name)
