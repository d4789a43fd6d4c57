# SPDX-License-Identifier: Apache-2.0
"""Months in a minute: the tray does not grow with events, and is idle when there are none."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

from box import Daemon, Desktop, Panel, make_unsupported, until

import flashd

WARM_UP = 120  # pools fill, and the daemon remembers a hundred jobs
CHANGES = 60
GROWTH_BYTES = 3_000_000  # a menu that is not given back is 100 kB at least, each time
IDLE_S = 5.0
IDLE_CPU_S = 0.05


def own_bytes(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Private_"))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_it_does_not_grow_and_rests_when_nothing_happens(
    desktop: Desktop, daemon: Daemon, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    make_unsupported(daemon.models / "small")
    await until(lambda: panel.has("small · "))
    open_files = len(os.listdir(f"/proc/{tray.pid}/fd"))
    with flashd.connect(desktop.address) as client:

        async def change(times: int) -> None:
            """Each time the menu loses items and gains them, and says that the model is pinned."""
            for _ in range(times):
                client.unpin("small")
                client.evict("small")
                await until(lambda: panel.has("small · 12 kB · on disk"))
                client.load("small")
                client.pin("small")
                await until(lambda: panel.has("small · 12 kB · warm · pinned"))

        await change(WARM_UP)
        before = own_bytes(tray.pid)
        await change(CHANGES)
        grown = own_bytes(tray.pid) - before
    print(f"grown by {grown / 1e3:.0f} kB")
    assert grown < GROWTH_BYTES
    assert len(os.listdir(f"/proc/{tray.pid}/fd")) <= open_files + 1

    async def rests() -> bool:
        began = cpu_s(tray.pid)
        await asyncio.sleep(IDLE_S)
        return cpu_s(tray.pid) - began < IDLE_CPU_S

    await until(rests, what="a tray that does nothing where nothing happens")
