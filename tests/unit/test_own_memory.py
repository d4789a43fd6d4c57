# SPDX-License-Identifier: Apache-2.0
"""What an engine's process says of its own memory: without whoever asks waiting, and again when it has changed."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest

from flashd.engines import surroundings
from flashd.engines.surroundings import OwnMemory
from flashd.units import MiB

LARGE = 200 * MiB
FORKS = """
import os, signal
from flashd.engines.surroundings import OwnMemory
before = bytearray(os.urandom(1 << 20) * 200)  # which the child shares
ready, told = os.pipe()
child = os.fork()
if child == 0:
    own = bytearray(os.urandom(1 << 20) * 100)
    os.write(told, b"1")
    signal.pause()
os.read(ready, 1)
memory = OwnMemory()
memory.last_bytes()
memory._look.join()
print(memory.last_bytes())
os.kill(child, signal.SIGKILL)
"""


def settled(memory: OwnMemory) -> int:
    memory.last_bytes()
    memory._look.join()
    return memory.last_bytes()


def test_it_is_measured_for_the_next_time_and_again_when_it_has_changed() -> None:
    memory = OwnMemory()
    assert memory.last_bytes() == 0, "nobody waits"
    before = settled(memory)
    with mmap.mmap(-1, LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as more:
        more.write(b"x" * LARGE)
        memory._look.join()
        assert settled(memory) - before > 0.9 * LARGE
        memory._look.join()
    assert abs(settled(memory) - before) < 0.1 * LARGE


def test_of_what_forks_share_each_page_counts_once() -> None:
    said = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True).stdout
    assert 300 * MiB < int(said) < 350 * MiB


def test_what_has_not_changed_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, read = OwnMemory(), list[str]()
    line_bytes = surroundings._line_bytes

    def counted(pid: int, file: str, name: str) -> int:
        read.append(file)
        return line_bytes(pid, file, name)

    monkeypatch.setattr(surroundings, "_line_bytes", counted)
    for _ in range(5):
        settled(memory)
        memory._look.join()
    assert read.count("smaps_rollup") == 1 and read.count("status") >= 5


def test_a_process_that_has_ended_has_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert surroundings._line_bytes(ended.pid, "smaps_rollup", "Pss_Anon:") == 0
    assert surroundings._line_bytes(os.getpid(), "smaps_rollup", "Pss_Anon:") > 0
