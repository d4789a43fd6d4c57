# SPDX-License-Identifier: Apache-2.0
"""An engine's report of its own memory: callers do not wait for it, and it is renewed after changes."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest

from flashd.engines import process_info
from flashd.engines.process_info import OwnMemory, own_memory_bytes
from flashd.units import MiB

LARGE = 200 * MiB
FORKS = """
import os, signal, sys
from flashd.engines.process_info import own_memory_bytes
before = bytearray(os.urandom(1 << 20) * 200)  # shared with the child
ready, told = os.pipe()
child = os.fork()
if child == 0:
    sys.stdout.close()
    own = bytearray(os.urandom(1 << 20) * 100)
    os.write(told, b"1")
    signal.pause()
os.read(ready, 1)
print(own_memory_bytes(os.getpid()))
os.kill(child, signal.SIGKILL)
"""


def test_of_what_forks_share_each_page_counts_once() -> None:
    said = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True, timeout=60).stdout
    assert 300 * MiB < int(said) < 350 * MiB


def test_it_is_measured_for_the_next_time_and_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_info, "family", lambda pid: [pid])  # other tests' engines may be ours as well
    memory = OwnMemory(every_s=0.0)
    assert memory.last_bytes() == 0, "nobody waits"
    with mmap.mmap(-1, LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as more:
        memory._measuring.join()
        before = memory.last_bytes()
        memory._measuring.join()
        more.write(b"x" * LARGE)
        memory.last_bytes()
        memory._measuring.join()
        assert memory.last_bytes() - before > 0.9 * LARGE


def test_it_is_not_measured_all_the_time() -> None:
    memory = OwnMemory(every_s=100.0)
    memory.last_bytes()
    first = memory._measuring
    first.join()
    assert memory.last_bytes() > 0 and memory._measuring is first


def test_a_process_that_has_ended_has_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert own_memory_bytes(ended.pid) == 0 < own_memory_bytes(os.getpid())
