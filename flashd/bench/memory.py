# SPDX-License-Identifier: Apache-2.0
"""`flash bench memory`: measures the time until weights in memory can be used.

`resident_lease`: from the D-Bus call to tensors, for a model on the device. `resident_map`: the part of that for
mapping the arena. `host_to_device`: from the host tier's arena to the device's, compared with a plain copy of
registered memory.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable

from flashd.bench.copying import Link, device_of, host_arena
from flashd.bench.report import Report, cost_row, rate_row, report
from flashd.client.client import Client
from flashd.errors import InvalidArgument
from flashd.io.streamer import upload
from flashd.units import GiB

LEASE_MS = 20.0
MAP_MS = 3.0
_LARGEST_COPY = 8 * GiB


def run(
    client: Client, model: str, *, runs: int, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Measures with a model of a running daemon, which is loaded to its first device. Needs torch."""
    name = next((device.name for device in client.devices() if device.name != "host"), None)
    device = device_of(name) if name else None
    if name is None or device is None:
        hint = "simulate one: flash config memory.simulated_device 8GB, then flash restart"
        raise InvalidArgument("there is no GPU", hint=hint)
    client.load(model, "device")
    size_bytes = client.model(model).size_bytes
    figures: defaultdict[str, list[float]] = defaultdict(list)

    def lease() -> None:
        started = time.perf_counter()
        with client.lease(model, device=name) as held:
            found = held.tensors()
            figures["lease"].append((time.perf_counter() - started) * 1e3)
            del found

    def mapping() -> None:
        with client.lease(model, device=name) as held:
            started = time.perf_counter()
            base = held.bytes_tensor()
            figures["map"].append((time.perf_counter() - started) * 1e3)
            del base

    copied_bytes = min(size_bytes, _LARGEST_COPY)
    with Link(device, copied_bytes) as link, host_arena(device, copied_bytes) as arena, arena.viewed() as view:

        def plain_copy() -> None:
            figures["copy"].append(copied_bytes / link.copy(view.address, copied_bytes) / 1e9)

        def streamed() -> None:
            with upload(
                address=view.address,
                size_bytes=copied_bytes,
                target=link.arena.address,
                is_registered=view.is_registered or device.gpu is None,
                staging=link.staging,
            ) as transfer:
                figures["upload"].append(transfer.wait().gb_per_s)

        steps = [lease, mapping, plain_copy, streamed]
        for step in steps:
            step()  # contexts are made, memory is touched
        figures.clear()
        for done in range(runs):
            on_progress(done, runs)
            random.shuffle(steps)
            for step in steps:
                step()
        on_progress(runs, runs)
    rows = [
        cost_row("resident_lease", figures["lease"], "ms", LEASE_MS),
        cost_row("resident_map", figures["map"], "ms", MAP_MS),
        rate_row("host_to_device", figures["upload"], "GB/s", figures["copy"]),
    ]
    command = f"flash bench memory {model} --runs {runs}"
    return report("memory", f"{command} ({size_bytes / 1e9:.1f} GB)", rows, driver=device.kind.value, gpu=device.gpu)
