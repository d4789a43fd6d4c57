# SPDX-License-Identifier: Apache-2.0
"""Runs flashd for a test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from imported import TORCH_PYTHON
from waiting import PATIENCE_S

# Settling is quick, new models stay where they are, and tests without engines do not pay for importing torch. Engines
# have one thread: several tests run at once, and threads of one engine that wait for each other do so by spinning.
CONFIG = """
[inbox]
settle_s = 0.2
rescan_s = 1.0
[engines]
warm_up = false
warm_new = false
torch.threads = 1
"""


@dataclass(slots=True)
class Daemon:
    """A running flashd and its folders."""

    address: str
    root: Path
    runtime: Path
    process: subprocess.Popen[bytes] | None = None
    arguments: Sequence[str | Path] = ()

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def config(self) -> Path:
        return self.root / "flashd.toml"

    @property
    def log(self) -> Path:
        return self.root / "flashd.log"

    def start(self) -> None:
        """Returns when it says that it is ready."""
        self.prepare()
        address = self.runtime / "notify"
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.log.open("ab") as output:
            notify.bind(str(address))
            notify.settimeout(PATIENCE_S)
            self.process = subprocess.Popen(
                self.command(), env={**os.environ, "NOTIFY_SOCKET": str(address)}, stdout=output, stderr=output
            )
            try:
                assert notify.recv(100) == b"READY=1"
            except TimeoutError:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"not ready:\n{self.log.read_text()}") from None

    def prepare(self) -> None:
        """Makes its folder and its settings."""
        self.models.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            self.config.write_text(CONFIG)
        own = tomllib.loads(self.config.read_text()).get("engines", {}).get("torch", {})
        further = self.config.with_name(self.config.name + ".d") / "torch.toml"
        further.unlink(missing_ok=True)
        if "python" not in own and (python := os.environ.get(TORCH_PYTHON)):
            further.parent.mkdir(exist_ok=True)
            further.write_text(f"engines.torch.python = '{python}'\n")

    def command(self) -> list[str | Path]:
        return [
            *(sys.executable, "-m", "flashd.daemon.main", "--bus", self.address, "--config", self.config),
            *("--state-dir", self.state, "--models-dir", self.models, "--runtime-dir", self.runtime / "run"),
        ]

    def share_compiled(self, folder: Path) -> None:
        """Has vLLM compile into this folder, where it finds what it compiled for other daemons."""
        self.state.mkdir(parents=True, exist_ok=True)
        (self.state / "compiled").symlink_to(folder)

    def open_files(self) -> Counter[str]:
        """Counts its descriptors by what they are of. How many there are in all says little: it opens some of its own
        (its watches of folders) when it has time to."""
        assert self.process is not None
        found: Counter[str] = Counter()
        for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed in the meantime
                found[str(fd.readlink())] += 1
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=PATIENCE_S)
