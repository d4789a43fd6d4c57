# SPDX-License-Identifier: Apache-2.0
"""Functions of an engine's process about itself: its socket, its memory, its children."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from pathlib import Path

_MEASURED_EVERY_S = 10.0

_OF_MEMORY = re.compile(
    r"(?i)out of memory|OutOfMemory|MemoryError|no available memory|(?:cannot|can't) allocate memory"
    r"|memory\b.* is less than (?:requested|desired)"
)


def listen(path: Path, mode: int) -> socket.socket:
    """Opens a listening socket that only this user, or its group too, can ever connect to; the umask ensures that from
    the first moment.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(mode)
    listener.listen(128)
    return listener


def read_all(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def own_memory_bytes(pid: int) -> int:
    """Returns the own resident memory of a process and its children.

    Shared arenas do not count, and pages that forks still share count proportionally (proc(5), Pss_Anon).
    """
    total = 0
    for member in family(pid):
        with contextlib.suppress(OSError):  # it has just ended
            memory = Path(f"/proc/{member}/smaps_rollup").read_text()
            found = [line for line in memory.splitlines() if line.startswith("Pss_Anon:")]
            total += sum(int(line.split()[1]) * 1024 for line in found)
    return total


class OwnMemory:
    """This process's `own_memory_bytes`, measured in a thread from time to time.

    Walking the page tables takes tens of milliseconds for vLLM's processes, for which no swap or token should wait.
    """

    def __init__(self, every_s: float = _MEASURED_EVERY_S) -> None:
        self._every_s = every_s
        self._own_bytes = 0
        self._measured_at = -every_s
        self._measuring = threading.Thread()

    def last_bytes(self) -> int:
        """Returns the last measurement; 0 on the first call."""
        known_bytes = self._own_bytes
        if not self._measuring.is_alive() and time.monotonic() - self._measured_at >= self._every_s:
            self._measuring = threading.Thread(target=self._measure, daemon=True, name="own memory")
            self._measuring.start()
        return known_bytes

    def _measure(self) -> None:
        self._own_bytes = own_memory_bytes(os.getpid())
        self._measured_at = time.monotonic()


def lacks_memory(said: str) -> bool:
    """Tells whether an error is about memory. Allocators and vLLM use different words, and some raise RuntimeError."""
    return _OF_MEMORY.search(said) is not None


def family(pid: int) -> list[int]:
    """Returns a process and all its descendants."""
    found = [pid]
    for known in found:
        with contextlib.suppress(OSError):
            for children in Path(f"/proc/{known}").glob("task/*/children"):
                found += [int(child) for child in children.read_text().split()]
    return found
