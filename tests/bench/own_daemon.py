# SPDX-License-Identifier: Apache-2.0
"""A flashd for one benchmark, on a bus of its own, with its store where the benchmark's disk is."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import flashd
from flashd.dbus.private_bus import PrivateBus
from flashd.errors import Unavailable


@contextlib.contextmanager
def own_daemon(folder: Path, settings: str) -> Iterator[flashd.Client]:
    """Yields a connection to it, with the parameters of `own_bus`."""
    with own_bus(folder, settings) as address, _connected(address) as client:
        yield client


@contextlib.contextmanager
def own_bus(folder: Path, settings: str) -> Iterator[str]:
    """Yields the address of the daemon's bus. `settings` is the text of its flashd.toml; its log is `folder`/log."""
    with tempfile.TemporaryDirectory(prefix="fd-") as short, PrivateBus(Path(short)) as bus:
        config = folder / "flashd.toml"
        config.write_text(settings)
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "flashd.daemon.main", "--bus", bus.address, "--config", str(config)),
                    *("--state-dir", str(folder / "state"), "--models-dir", str(folder / "models")),
                    *("--runtime-dir", f"{short}/run"),
                ],
                stdout=log, stderr=log,
            )  # fmt: skip
        try:
            with _connected(bus.address):
                yield bus.address
        finally:
            process.terminate()
            process.wait(60)


def _connected(address: str) -> flashd.Client:
    for _ in range(200):
        with contextlib.suppress(Unavailable):
            return flashd.connect(address)
        time.sleep(0.05)
    raise SystemExit("the daemon did not come")
