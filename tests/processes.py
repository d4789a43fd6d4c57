# SPDX-License-Identifier: Apache-2.0
"""Tells which processes still run, and which shared memory belongs to them."""

from __future__ import annotations

import os
from pathlib import Path

from listening import family

SHARED = Path("/dev/shm")


def is_alive(pid: int) -> bool:
    """Whether it runs; what nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends between opening and reading
        return False


def shared_memory() -> set[Path]:
    """What lies in /dev/shm, but for what processes use that are no descendants of this one.

    Those of tests that run beside ours come and go; what nobody uses has been left by somebody.
    """
    found = set(SHARED.iterdir())
    if found:
        ours = set(family(os.getpid()))
        for maps in Path("/proc").glob("[0-9]*/maps"):
            if int(maps.parent.name) not in ours:
                found -= _mapped(maps)
    return found


def _mapped(maps: Path) -> set[Path]:
    """The files of /dev/shm among the mappings of a process, by proc_pid_maps(5)."""
    try:
        lines = maps.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended, or owned by another user
        return set()
    return {Path(line.split(maxsplit=5)[5]) for line in lines if f" {SHARED}/" in line}
