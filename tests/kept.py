# SPDX-License-Identifier: Apache-2.0
"""Costly artefacts of tests, kept outside the checkout under the digest of everything they are made from.

The folder is ${XDG_CACHE_HOME:-~/.cache}/flashd, with a subfolder for each kind. Several processes, checkouts and runs
share it, so artefacts are only read. Those that no test has used for some days are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

KEPT_DAYS = 7


def folder(kind: str, *parts: str | bytes | Path, make: Callable[[Path], object]) -> Path:
    """Returns the folder of an artefact, which `make` fills if there is none yet.

    `parts` determine the contents; of a path, its files do.
    """
    place = cache() / kind
    wanted = place / digest(*parts)
    with alone(wanted):
        if not wanted.exists():
            partial = wanted.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(wanted)
        os.utime(wanted)
    forget_old(place, KEPT_DAYS)
    return wanted


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashd"


def digest(*parts: str | bytes | Path) -> str:
    """Returns a name that changes with each part, and with the name and contents of each file of a path."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = sorted(path for path in part.rglob("*") if path.is_file()) if part.is_dir() else [part]
            for file in files:
                found.update(f"{file.relative_to(part)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
        else:
            found.update(part.encode() if isinstance(part, str) else part)
        found.update(b"\0")
    return found.hexdigest()[:16]


@contextlib.contextmanager
def alone(made: Path) -> Iterator[None]:
    """Holds the lock of an artefact, so that others who want it wait until it is complete."""
    made.parent.mkdir(parents=True, exist_ok=True)
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def forget_old(place: Path, days: float) -> None:
    """Removes the artefacts that have not been used for so many days."""
    for old in place.iterdir():
        with contextlib.suppress(FileNotFoundError):  # removed by another run
            if old.is_dir() and time.time() - old.stat().st_mtime > days * 86_400:
                shutil.rmtree(old)
