# SPDX-License-Identifier: Apache-2.0
"""Is the streamer stuck? It is if a transfer is under way and nothing of it has moved for longer than any disk takes.

A thread that hangs in the kernel or in a driver cannot be ended from here, nor can what it holds be given back: whoever
asks whether we are well is told no, and the service manager starts the daemon anew, which takes over what is warm.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from flashd.units import format_bytes


class Moving(Protocol):
    """A transfer of the streamer."""

    @property
    def done_bytes(self) -> int: ...

    @property
    def total_bytes(self) -> int: ...

    @property
    def finished(self) -> bool: ...


@dataclass(slots=True)
class _Watched:
    transfer: Moving
    done_bytes: int
    since: float


class Stalls:
    """Watches all transfers of the daemon. Any thread may call it."""

    def __init__(self, patience_s: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        """Without patience (0) nothing is ever found."""
        self._patience_s = patience_s
        self._clock = clock
        self._lock = threading.Lock()
        self._watched: list[_Watched] = []

    def started(self, transfer: Moving) -> None:
        with self._lock:  # those that ended are forgotten here as well: it may be that nobody ever asks
            self._watched = [watched for watched in self._watched if not watched.transfer.finished]
            self._watched.append(_Watched(transfer, 0, self._clock()))

    def found(self) -> str:
        """What is stuck, in words; empty if all is well. To be asked often: what moved between two asks is moving."""
        now, worst = self._clock(), ""
        with self._lock:
            self._watched = [watched for watched in self._watched if not watched.transfer.finished]
            watching = list(self._watched)
        for watched in watching:
            done_bytes, total_bytes = watched.transfer.done_bytes, watched.transfer.total_bytes
            # All moved and not finished: what was written is being flushed, and that has no progress to tell.
            if done_bytes != watched.done_bytes or done_bytes == total_bytes:
                watched.done_bytes, watched.since = done_bytes, now
            elif (patience_s := self._patience_s()) and now - watched.since > patience_s:
                worst = f"a transfer is stuck at {format_bytes(done_bytes)} of {format_bytes(total_bytes)}"
        return worst
