# SPDX-License-Identifier: Apache-2.0
"""Memory use of all processes on each device, from its driver. A driver may be slow or hang, so a thread asks it.

No caller waits for the answer: the property has the last answer, and a new one is announced.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping

from flashd.daemon.events import Events
from flashd.io import cuda
from flashd.memory.device import Device, Kind
from flashd.memory.residency import Residency
from flashd.tasks import Background

_FRESH_S = 1.0


class DriverUsage:
    """The last answers of the drivers."""

    def __init__(self, background: Background, events: Events) -> None:
        self._background = background
        self._events = events
        self._known: dict[str, int] = {}
        self._asked_at: dict[str, float] = {}
        self._asking: set[str] = set()

    def of(self, device: Device) -> int:
        if device.kind is not Kind.CUDA:
            return device.used_bytes()  # the kernel's own accounting, which is read directly
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
            self._events.device_changed(device.name)


def process_bytes(residency: Residency) -> Mapping[int, int]:
    """Returns the GPU memory of each process on all GPUs, by process id."""
    found: Counter[int] = Counter()
    for cache in residency.distinct():
        if cache.device.gpu is not None:
            found.update(cuda.process_bytes(cache.device.gpu))
    return found
