# SPDX-License-Identifier: Apache-2.0
"""The time until the panel shows the tray's icon, and the tray's memory, with a hundred models.

    python tests/bench/tray.py [--json] [--runs N]

In the desktop that tests/desktop uses (Xvfb, openbox, xfce4-panel), with the real daemon. The limits are the project's
own promises: an icon within a second of the command, 60 MB. Memory is the tray's share (Pss): what all programs of a
desktop have in common, GTK first of all, counts in parts. All that is mapped (Rss) is told beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "desktop"))

from box import TRAY, Daemon, Desktop, Panel, end, missing_programs, until
from daemon import fill_store

from flashd.bench.report import Row, cost_row, report
from flashd.dbus.connection import connect

MODELS = 100
LOOK_S = 0.005


def memory_bytes(pid: int, what: str) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith(f"{what}:"))


async def measure(runs: int) -> list[Row]:
    icon_s, share, resident = [], [], []
    with tempfile.TemporaryDirectory(prefix="fd-") as folder, Desktop(Path(folder)) as desktop:
        root = Path(folder) / "daemon"
        root.mkdir()
        fill_store(root, MODELS)
        Daemon(desktop, root).start()
        connection = await connect(desktop.address)
        panel = Panel(connection)
        await until(panel.is_ready)
        for _ in range(runs):
            began = time.monotonic()
            tray = desktop.start([TRAY])
            while not await panel.items():
                await asyncio.sleep(LOOK_S)
            icon_s.append(time.monotonic() - began)
            await until(lambda: panel.has(f"{MODELS - 12} more models"), "the whole menu")
            share.append(memory_bytes(tray.pid, "Pss"))
            resident.append(memory_bytes(tray.pid, "Rss"))
            end(tray)
            await until(panel.is_empty)
        await connection.close()
    return [
        cost_row("tray.icon", icon_s, "s", 1.0),
        cost_row("tray.memory", share, "B", 60_000_000),
        cost_row("tray.resident", resident, "B"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the report in its schema")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    if lacking := missing_programs():
        sys.exit(f"needs {', '.join(lacking)}")
    rows = asyncio.run(measure(options.runs))
    result = report("tray", "python tests/bench/tray.py", rows)
    print(result.to_json() if options.json else result.to_text())


if __name__ == "__main__":
    main()
