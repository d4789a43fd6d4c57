# SPDX-License-Identifier: Apache-2.0
"""What does an engine's process need of the system it runs on? Its socket, what it was handed, what it takes up."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

_OF_MEMORY = re.compile(
    r"(?i)out of memory|OutOfMemory|MemoryError|no available memory|(?:cannot|can't) allocate memory"
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


def own_memory_bytes() -> int:
    """Resident memory that is this process's and its children's own: shared arenas are not, and of pages that forks
    still share, each counts for its part (proc(5), Pss_Anon)."""
    pending, total = [os.getpid()], 0
    while pending:
        process = Path(f"/proc/{pending.pop()}")
        try:
            memory = (process / "smaps_rollup").read_text()
            children = [child.read_text() for child in process.glob("task/*/children")]
        except OSError:  # it has just ended
            continue
        found = [line for line in memory.splitlines() if line.startswith("Pss_Anon:")]
        total += sum(int(line.split()[1]) * 1024 for line in found)
        pending += [int(pid) for text in children for pid in text.split()]
    return total


def lacks_memory(said: str) -> bool:
    """Whether an error is about memory: each allocator, and vLLM, has its own words, and some raise RuntimeError."""
    return _OF_MEMORY.search(said) is not None
