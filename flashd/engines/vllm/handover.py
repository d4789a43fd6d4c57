# SPDX-License-Identifier: Apache-2.0
"""How does memory reach vLLM's own processes, and come from them? Each rank asks on a socket, and gets what the engine
was given: a descriptor with its layout; or hands over the image that it has made of that.

vLLM starts a process a rank, by fork or otherwise; whichever way, its working directory is ours, where the socket lies.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashd.engines.control import KIND, Channel, Frame, close_all

SOCKET = "weights"


def ask(path: Path, rank: int) -> Frame:
    """What the engine around us was last told to hold, and this rank is to have of it; the descriptor is the
    caller's."""
    return _said(path, {"op": "ask", "rank": rank})


def tell_made(path: Path, rank: int, content: dict[str, Any], fd: int) -> None:
    """What a rank has made of it; the descriptor stays the caller's."""
    _said(path, {"op": "made", "rank": rank, **content}, (fd,))


def _said(path: Path, content: dict[str, Any], fds: Sequence[int] = ()) -> Frame:
    with socket.socket(socket.AF_UNIX, KIND) as end:
        end.connect(str(path))
        channel = Channel(end)
        channel.send(content, fds)
        return channel.receive()


class Handover:
    """Hands what is `held` to whoever connects, from a thread of its own."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._held: Sequence[Frame] = ()
        self._made: dict[int, Frame] = {}
        self._listener = socket.socket(socket.AF_UNIX, KIND)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._serve, daemon=True, name="handover").start()

    def hold(self, ranks: Sequence[Frame]) -> None:
        """From now on this is what is handed out, a frame a rank, or one that all of them get; the descriptors stay the
        caller's."""
        self._hold([Frame(rank.content, tuple(os.dup(fd) for fd in rank.fds)) for rank in ranks])

    def drop(self) -> None:
        """Nothing is handed out any more, and no memory is kept by us."""
        self._hold(())

    def take_made(self) -> Sequence[Frame]:
        """The images that were made since this was last asked, by rank; the descriptors are the caller's."""
        with self._lock:
            made, self._made = self._made, {}
        return [made[rank] for rank in sorted(made)]

    def forsake(self) -> None:
        """For a forked child, which has inherited the descriptors and not the thread: it keeps none of them. What it
        forks in turn must not close them again: the numbers are of other files by then."""
        self._listener.close()
        held, self._held = self._held, ()
        _close(held)

    def _hold(self, ranks: Sequence[Frame]) -> None:
        with self._lock:
            old, self._held = self._held, ranks
        _close(old)

    def _serve(self) -> None:
        while True:
            end, _ = self._listener.accept()
            with end, self._lock, contextlib.suppress(OSError, EOFError):  # whoever asked may be gone
                channel = Channel(end)
                said = channel.receive()
                op, rank = said.content.pop("op"), said.content.pop("rank")
                if op == "made":
                    self._made[rank] = said
                    channel.send({})
                elif self._held:
                    held = self._held[rank if len(self._held) > 1 else 0]
                    channel.send(held.content, held.fds)


def _close(frames: Sequence[Frame]) -> None:
    for frame in frames:
        close_all(frame.fds)
