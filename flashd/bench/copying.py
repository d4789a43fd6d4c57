# SPDX-License-Identifier: Apache-2.0
"""Measures plain copies between host memory and a device, which are the limit of transfers."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from flashd.io import cuda
from flashd.io.streamer import Staging
from flashd.memory.arena import Arena, HostArena, probe_huge_pages
from flashd.memory.device import CudaDevice, Device, HostDevice, Kind, simulated_device, usable
from flashd.units import MiB

STAGING_BYTES = 256 * MiB


def device_of(name: str) -> Device | None:
    """Returns a GPU by name; for `auto` the first, or None without a GPU; for `sim:0` one simulated in host memory."""
    if name == "none":
        return None
    if name == "sim:0":
        host = HostDevice.probe()
        return simulated_device(host.total_bytes, host)
    found = [CudaDevice(gpu, 0) for gpu in usable(cuda.gpus())]
    return next((device for device in found if name in {"auto", device.name}), None)


class Link:
    """A device, an arena on it to be filled again and again, and the staging memory."""

    def __init__(self, device: Device, size_bytes: int) -> None:
        self.device = device
        self.size_bytes = size_bytes
        self.arena: Arena = device.allocate(size_bytes, "bench")
        if isinstance(self.arena, HostArena):  # so that its first touch is not measured
            ctypes.memset(self.arena.address, 1, self.arena.mapped_bytes)
        self.staging = Staging(device.driver, device.context(), size_bytes=STAGING_BYTES)

    def copy(self, address: int, size_bytes: int) -> float:
        """Seconds of one plain copy of registered host memory to the device."""
        started = time.perf_counter()
        if self.device.kind is Kind.CUDA and self.device.gpu:
            cuda.copy_to_device(self.device.gpu.ordinal, self.arena.address, address, size_bytes)
        else:
            ctypes.memmove(self.arena.address, address, size_bytes)
        return time.perf_counter() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.arena.close()


@contextmanager
def host_arena(device: Device, size_bytes: int) -> Iterator[HostArena]:
    """Provides a full, sealed arena of the host tier, registered with the device."""
    with HostArena(size_bytes, "bench", probe_huge_pages()) as arena:
        ctypes.memset(arena.address, 1, arena.mapped_bytes)
        arena.seal()
        if device.gpu is not None:
            arena.register(device.gpu.ordinal)
        yield arena
