# SPDX-License-Identifier: Apache-2.0
"""What does an engine's process need of the system it runs on? Its socket, what it was handed, what it takes up."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from pathlib import Path

from flashd.units import MiB

_NOTED_BYTES = 16 * MiB  # the counters of a machine with many processors are not more exact

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


class OwnMemory:
    """Resident memory that is this process's and its children's own: shared arenas are not, and of pages that forks
    still share, each counts for its part (proc(5), Pss_Anon).

    To measure that is to walk page tables, 40 ms for vLLM's processes, and no swap or token is to wait for it. So it is
    done in a thread, and only when counters that cost nothing have changed.
    """

    def __init__(self) -> None:
        self._own_bytes = 0
        self._counted_bytes = -_NOTED_BYTES
        self._look = threading.Thread()

    def last_bytes(self) -> int:
        """As it was when last asked; 0 the first time."""
        if not self._look.is_alive():
            self._look = threading.Thread(target=self._measure, daemon=True, name="own memory")
            self._look.start()
        return self._own_bytes

    def _measure(self) -> None:
        pids = family(os.getpid())
        counted_bytes = sum(_line_bytes(pid, "status", "RssAnon:") for pid in pids)
        if abs(counted_bytes - self._counted_bytes) >= _NOTED_BYTES:
            self._own_bytes = sum(_line_bytes(pid, "smaps_rollup", "Pss_Anon:") for pid in pids)
            self._counted_bytes = counted_bytes


def _line_bytes(pid: int, file: str, name: str) -> int:
    """What one line says of a process, which may just have ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0


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
