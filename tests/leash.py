# SPDX-License-Identifier: Apache-2.0
"""Runs commands that end when the test run does, however that ends, with all that they have started.

As a program it is what holds the leash:

    python tests/leash.py DESCRIPTOR COMMAND...

It runs COMMAND, and once DESCRIPTOR, the end of a pipe, says that its other end is closed, it ends COMMAND and every
descendant, also those in sessions of their own: as a subreaper (prctl(2)) it inherits them. A kill of pytest closes the
pipe as well as the end of a fixture does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_SET_CHILD_SUBREAPER = 36
_GRACE_S = 5.0
_POLL_MS = 50


class Leashed:
    """A command that runs until `end`, or until this process ends."""

    def __init__(self, command: Sequence[str | Path], **options: Any) -> None:
        reading, self._writing = os.pipe()
        try:
            held = [sys.executable, __file__, str(reading), *command]
            # A session of its own: an interrupt from the terminal reaches pytest, and this through the pipe.
            self.process = subprocess.Popen(held, pass_fds=(reading,), start_new_session=True, **options)
        except BaseException:
            os.close(self._writing)
            raise
        finally:
            os.close(reading)

    def end(self) -> None:
        """Ends what still runs of it, and waits until all of that has ended."""
        os.close(self._writing)
        self.process.wait()


def run(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with its output captured."""
    leashed = Leashed(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    try:
        out, err = leashed.process.communicate()
    finally:
        leashed.end()
    return subprocess.CompletedProcess(command, leashed.process.returncode, out, err)


def _hold(descriptor: int, command: Sequence[str]) -> int:
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.set_inheritable(descriptor, False)
    child = subprocess.Popen(command, start_new_session=True)
    poll = select.poll()
    poll.register(descriptor, 0)  # POLLHUP comes without being asked for
    while child.poll() is None and not poll.poll(_POLL_MS):
        pass
    _end_descendants()
    return 1 if child.returncode is None else child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end_descendants() -> None:
    """Politely at first, so that mounts can be undone. What loses its parent becomes our child, and has its turn."""
    deadline = time.monotonic() + _GRACE_S
    told: set[int] = set()
    while children := list(_children()):
        is_late = time.monotonic() > deadline
        for pid in children:
            if is_late or pid not in told:
                told.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if is_late else signal.SIGTERM)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(_POLL_MS / 1000)


def _children() -> Iterator[int]:
    for task in Path("/proc/self/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


if __name__ == "__main__":
    sys.exit(_hold(int(sys.argv[1]), sys.argv[2:]))
