# SPDX-License-Identifier: Apache-2.0
"""Reports of benchmarks: one schema, so that results can be compared, tabled and plotted.

`value` and `limit` are medians of one and the same run; `ratio` is the better-is-larger quotient of the two, null where
there is no limit to compare with.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from flashd.io.cuda import Gpu


@dataclass(frozen=True, slots=True)
class Row:
    """A figure. `runs` are the values of which it is the median."""

    name: str
    value: float
    unit: str
    limit: float | None
    ratio: float | None
    runs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Report:
    benchmark: str
    device: str
    driver: str
    date: str
    command: str
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def to_text(self) -> str:
        """Formats a line for each figure, with its limit."""
        return "\n".join(map(_line, self.rows))


def _line(row: Row) -> str:
    limit = f"  (limit {row.limit:.6g} {row.unit})" if row.limit else ""
    return f"{row.name:32} {row.value:12.6g} {row.unit}{limit}"


def report(
    benchmark: str, command: str, rows: Sequence[Row], *, driver: str = "host", gpu: Gpu | None = None
) -> Report:
    """Makes a report with this machine and the current time."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    device = device_name() + (f", {gpu.model}" if gpu else "")
    return Report(benchmark, device, driver, date, command, tuple(rows))


def rate_row(name: str, runs: Sequence[float], unit: str, limits: Sequence[float] = ()) -> Row:
    """Makes a row of a figure for which more is better, with the limits of the same rounds."""
    value, limit = median(runs), median(limits) if limits else None
    return Row(name, value, unit, limit, value / limit if limit else None, tuple(runs))


def cost_row(name: str, runs: Sequence[float], unit: str, limit: float | None = None) -> Row:
    """Makes a row of a figure for which less is better."""
    value = median(runs)
    return Row(name, value, unit, limit, limit / value if limit and value else None, tuple(runs))


def device_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Describes the machine: model and number of processors, and the kernel."""
    fields = [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line]
    models = [value.strip() for name, value in fields if name.strip() == "model name"]
    count = sum(name.strip() == "processor" for name, _ in fields)
    kernel = platform.release().split("-")[0]
    return f"{count} x {models[0] if models else platform.machine()}, Linux {kernel}"
