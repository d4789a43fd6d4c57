# SPDX-License-Identifier: Apache-2.0
"""The daemon's time to readiness, idle memory and time for a listing, with no model and with 1,000.

    python tests/bench/daemon.py [--json] [--runs N]

The limits are those of the project's own promises: ready in 0.5 s (1 s with 1,000 models), 80 MB idle, a listing in
50 ms. A listing is measured twice: until the first reader in C has all of it (busctl, its own start included), and
until the Python client has made objects of it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import flashd
from flashd.bench.report import Row, cost_row, report
from flashd.checkpoint.convert import convert
from flashd.checkpoint.source.reader import SourceFiles
from flashd.dbus import wire
from flashd.dbus.private_bus import PrivateBus
from flashd.store.catalog import Catalog, Origin

MANY = 1000
LISTING = (wire.MANAGER, "ListModels")


def fill_store(root: Path, count: int) -> None:
    """A store with one small checkpoint under many names, as hand-made records: only their number matters here."""
    source = root / "source"
    source.mkdir()
    header = json.dumps({"weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with (
        Catalog(root / "state" / "store") as catalog,
        SourceFiles.from_path(source) as files,
        catalog.draft(4096) as draft,
    ):
        manifest = convert(files, draft.directory, python=sys.executable)
        draft.publish("model-0", manifest, Origin("import", "bench"))
    records = root / "state" / "store" / "models"
    record = (records / "model-0.toml").read_text()
    for number in range(1, count):
        (records / f"model-{number}.toml").write_text(record.replace('"model-0"', f'"model-{number}"'))


@contextmanager
def daemon(root: Path, address: str) -> Iterator[tuple[float, int]]:
    """A running daemon; yields the seconds until it was ready, and its process id."""
    (root / "flashd.toml").write_text("[engines]\nwarm_up = false\nwarm_new = false\n")
    command = [
        *(sys.executable, "-m", "flashd.daemon.main", "--bus", address, "--config", root / "flashd.toml"),
        *("--state-dir", root / "state", "--models-dir", root / "models", "--runtime-dir", root / "run"),
    ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, (root / "log").open("ab") as log:
        (root / "notify").unlink(missing_ok=True)
        notify.bind(str(root / "notify"))
        environment = {**os.environ, "NOTIFY_SOCKET": str(root / "notify")}
        started = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        notify.recv(100)
        ready_s = time.monotonic() - started
        try:
            yield ready_s, process.pid
        finally:
            process.terminate()
            process.wait()


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


def seconds(address: str, in_python: bool) -> float:
    started = time.monotonic()
    if in_python:
        with flashd.connect(address) as client:
            started = time.monotonic()
            client.models()
            return time.monotonic() - started
    command = ["busctl", f"--address={address}", "call", wire.BUS_NAME, wire.ROOT_PATH, *LISTING]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - started


def measure(count: int, runs: int, *, ready_limit_s: float) -> list[Row]:
    ready_s, idle_bytes, listed_s, objects_s = [], [], [], []
    with tempfile.TemporaryDirectory(prefix="fd-") as folder, PrivateBus(Path(folder)) as bus:
        root = Path(folder)
        if count:
            fill_store(root, count)
        for _ in range(runs):
            with daemon(root, bus.address) as (took_s, pid):
                ready_s.append(took_s)
                time.sleep(0.5)
                listed_s.append(seconds(bus.address, in_python=False))
                objects_s.append(seconds(bus.address, in_python=True))
                idle_bytes.append(resident_bytes(pid))
    return [
        cost_row(f"ready.{count}_models", ready_s, "s", ready_limit_s),
        cost_row(f"idle.{count}_models", idle_bytes, "B", 80_000_000),
        cost_row(f"listing.{count}_models", listed_s, "s", 0.05),
        cost_row(f"listing_in_python.{count}_models", objects_s, "s", 0.05),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the report in its schema")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    rows = [
        *measure(0, options.runs, ready_limit_s=0.5),
        *measure(MANY, options.runs, ready_limit_s=1.0),
    ]
    result = report("daemon", "python tests/bench/daemon.py", rows)
    print(result.to_json() if options.json else result.to_text())


if __name__ == "__main__":
    main()
