# SPDX-License-Identifier: Apache-2.0
"""`flash bench stream` measures what it claims, in the schema of all benchmarks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flashd.bench import copying, stream
from flashd.bench.report import cost_row, rate_row, report
from flashd.checkpoint.convert import convert
from flashd.checkpoint.source.reader import SourceFiles
from flashd.errors import InvalidArgument
from flashd.units import MiB


def source(folder: Path, size_bytes: int) -> Path:
    header = json.dumps({"w": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + os.urandom(size_bytes))
    return path


def test_a_checkpoint_is_measured_beside_the_bare_read(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "stored").mkdir()
    source(tmp_path / "source", 64 * MiB + 100)
    with SourceFiles.from_folder(tmp_path / "source") as files:
        convert(files, tmp_path / "stored", python="python3")
    seen = []
    found = stream.run(tmp_path / "stored", runs=2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]
    told = json.loads(found.to_json())
    assert set(told) == {"benchmark", "device", "driver", "date", "command", "rows"}
    rows = {row.pop("name"): row for row in told["rows"]}
    assert {"nvme_to_host", "nvme_to_host.verified", "cpu_s_per_gb", "peak_bytes"} <= set(rows)
    for row in rows.values():
        assert set(row) == {"value", "unit", "limit", "ratio", "runs"}
        assert row["value"] > 0
    load = rows["nvme_to_host"]
    assert len(load["runs"]) == 2
    assert load["ratio"] == pytest.approx(load["value"] / load["limit"])
    assert rows["peak_bytes"]["value"] > rows["peak_bytes"]["limit"] == 64 * MiB + 100


def test_loads_to_a_device_are_measured_beside_the_copy_that_limits_them(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "stored").mkdir()
    source(tmp_path / "source", 64 * MiB + 100)
    with SourceFiles.from_folder(tmp_path / "source") as files:
        convert(files, tmp_path / "stored", python="python3")
    found = stream.run(tmp_path / "stored", runs=1, device=copying.device_of("sim:0"))
    rows = {row.name: row for row in found.rows}
    assert {"nvme_to_device", "nvme_to_device.verified", "ram_file_to_device", "cpu_s_per_gb.device"} <= set(rows)
    assert rows["nvme_to_device"].limit == rows["nvme_to_host"].limit
    assert rows["ram_file_to_device"].limit != rows["nvme_to_host"].limit
    assert 0 < rows["staging_bytes"].value <= copying.STAGING_BYTES
    assert found.driver == "simulated"


def test_what_cannot_be_measured_says_why(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="not aligned"):
        stream.run(source(tmp_path, 70 * MiB), runs=1)
    with pytest.raises(InvalidArgument, match="not the folder of a checkpoint"):
        stream.run(tmp_path, runs=1)


def test_ratios_are_larger_when_better() -> None:
    rate = rate_row("fast", [3.0, 1.0, 2.0], "GB/s", [4.0, 4.0, 5.0])
    assert (rate.value, rate.limit, rate.ratio, rate.runs) == (2.0, 4.0, 0.5, (3.0, 1.0, 2.0))
    cost = cost_row("cpu", [0.02], "s/GB", 0.03)
    assert cost.ratio == pytest.approx(1.5)
    assert cost_row("cpu", [0.02], "s/GB").ratio is None
    made = report("stream", "flash bench stream x", [rate, cost])
    assert made.driver == "host"
    assert "Linux" in made.device
