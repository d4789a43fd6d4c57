# SPDX-License-Identifier: Apache-2.0
"""A daemon on a machine with a GPU, under a service manager."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from manager import Manager, start
from running import Daemon
from safetensors.torch import save_file

import flashd
from flashd.io import cuda
from flashd.units import MiB


def used_bytes(card: int = 0) -> int:
    """What the whole card has in use, other processes' memory included."""
    free, total = cuda.memory_info(card)
    return total - free


def check_freed(before: int) -> None:
    """The card has no more in use than before; the driver takes a moment to clear up after who was killed."""
    deadline = time.monotonic() + 10
    while used_bytes() > before + 16 * MiB:
        assert time.monotonic() < deadline, f"{(used_bytes() - before) / MiB:.1f} MiB of the card are still in use"
        time.sleep(0.05)


@dataclass(slots=True)
class Machine:
    """A daemon under a service manager, and a folder for sources."""

    daemon: Daemon
    manager: Manager
    folder: Path

    def start(self) -> None:
        start(self.daemon, self.manager)

    def connect(self) -> flashd.Client:
        return flashd.connect(self.daemon.address)

    def add(self, client: flashd.Client, name: str, size_bytes: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.randint(0, 255, (size_bytes,), dtype=torch.uint8, generator=generator)
        (self.folder / name).mkdir()
        save_file({"w": tensor}, self.folder / name / "model.safetensors")
        client.import_(self.folder / name, name)
        return tensor
