# SPDX-License-Identifier: Apache-2.0
"""The processor time of `flash` commands, beside that of an interpreter that does nothing.

    python tests/bench/cli.py [--json] [--runs N]

User and system time of the command's own process, interleaved, medians. The daemon has a hundred models, and is asked
over a bus of its own. The limits are our own: 0.10 s for `flash --version`, 0.20 s for the others.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from daemon import daemon, fill_store

from flashd.bench.report import Row, cost_row, report
from flashd.dbus.private_bus import PrivateBus

FLASH = str(Path(sys.executable).with_name("flash"))
MODELS = 100
COMMANDS: list[tuple[str, list[str], float | None]] = [
    ("python", [sys.executable, "-c", "pass"], None),
    ("version", [FLASH, "--version"], 0.10),
    ("list", [FLASH, "list"], 0.20),
    ("list_json", [FLASH, "list", "--json"], 0.20),
    ("status", [FLASH, "status"], 0.20),
]


def processor_s(command: list[str], environment: dict[str, str]) -> float:
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    pid = os.posix_spawn(command[0], command, environment, file_actions=quiet)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime


def measure(runs: int) -> list[Row]:
    taken: dict[str, list[float]] = {name: [] for name, _, _ in COMMANDS}
    with tempfile.TemporaryDirectory(prefix="fd-") as folder, PrivateBus(Path(folder)) as bus:
        fill_store(Path(folder), MODELS)
        environment = {**os.environ, "FLASHD_BUS_ADDRESS": bus.address}
        with daemon(Path(folder), bus.address):
            for number in range(runs + 1):
                for name, command, _ in COMMANDS:
                    took_s = processor_s(command, environment)
                    if number:  # the first one may write byte code
                        taken[name].append(took_s)
    return [cost_row(f"cli.{name}", taken[name], "s", limit) for name, _, limit in COMMANDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the report in its schema")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    rows = measure(options.runs)
    if options.json:
        print(report("cli", "python tests/bench/cli.py", rows).to_json())
        return
    for row in rows:
        limit = f"  (limit {row.limit:.6g} {row.unit})" if row.limit else ""
        print(f"{row.name:32} {row.value:12.6g} {row.unit}{limit}")


if __name__ == "__main__":
    main()
