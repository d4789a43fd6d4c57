# SPDX-License-Identifier: Apache-2.0
"""Prepares resources for transfers to GPUs before they are needed."""

from __future__ import annotations

from collections.abc import Iterator

from flashd.daemon.events import Events
from flashd.memory.arena import Arena, HostArena
from flashd.memory.device import Kind
from flashd.memory.device_cache import DeviceCache
from flashd.memory.residency import Residency
from flashd.memory.transfers import StreamMover
from flashd.tasks import Background, logged


class GpuPreparation:
    """Allocates staging memory for each GPU, and registers host arenas with GPUs when they are filled."""

    def __init__(self, residency: Residency, mover: StreamMover, background: Background, events: Events) -> None:
        self._residency = residency
        self._mover = mover
        self._background = background
        events.host_resident.subscribe(self._register)

    async def run(self) -> None:
        for cache in self._caches(Kind.CUDA, Kind.SIMULATED):
            with logged(f"staging memory of {cache.name}"):
                await self._mover.prepare(cache.device)

    def _register(self, arena: Arena) -> None:
        if isinstance(arena, HostArena):
            for cache in self._caches(Kind.CUDA):
                self._background.start(self._mover.register(arena, cache.device))

    def _caches(self, *kinds: Kind) -> Iterator[DeviceCache]:
        return (cache for cache in self._residency.distinct() if cache.device.kind in kinds)
