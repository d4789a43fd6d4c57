# SPDX-License-Identifier: Apache-2.0
"""What does an engine's process need of the system it runs on? Its socket, what it was handed, what it takes up."""

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
    """A socket that only this user can connect to, by the umask from the first moment on, or its group as well."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(mode)
    listener.listen(128)
    return listener


def read_all(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def own_memory_bytes(pid: int) -> int:
    """Resident memory that is a process's and its children's own: shared arenas are not, and of pages that forks still
    share, each counts for its part (proc(5), Pss_Anon)."""
    total = 0
    for member in family(pid):
        with contextlib.suppress(OSError):  # it has just ended
            memory = Path(f"/proc/{member}/smaps_rollup").read_text()
            found = [line for line in memory.splitlines() if line.startswith("Pss_Anon:")]
            total += sum(int(line.split()[1]) * 1024 for line in found)
    return total


class OwnMemory:
    """This process's `own_memory_bytes`, now and then. To measure them is to walk page tables, tens of milliseconds for
    vLLM's processes, and no swap or token is to wait for it: a thread does."""

    def __init__(self, every_s: float = _MEASURED_EVERY_S) -> None:
        self._every_s = every_s
        self._own_bytes = 0
        self._measured_at = -every_s
        self._measuring = threading.Thread()

    def last_bytes(self) -> int:
        """As measured last; 0 the first time."""
        known_bytes = self._own_bytes
        if not self._measuring.is_alive() and time.monotonic() - self._measured_at >= self._every_s:
            self._measuring = threading.Thread(target=self._measure, daemon=True, name="own memory")
            self._measuring.start()
        return known_bytes

    def _measure(self) -> None:
        self._own_bytes = own_memory_bytes(os.getpid())
        self._measured_at = time.monotonic()


def lacks_memory(said: str) -> bool:
    """Whether an error is about memory: each allocator, and vLLM, has its own words, and some raise RuntimeError."""
    return _OF_MEMORY.search(said) is not None


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for known in found:
        with contextlib.suppress(OSError):
            for children in Path(f"/proc/{known}").glob("task/*/children"):
                found += [int(child) for child in children.read_text().split()]
    return found
