# SPDX-License-Identifier: Apache-2.0
"""How does memory reach vLLM's own processes, and come from them? Each asks on a socket, and gets what the engine was
given: a descriptor with its layout; or hands over the image that it has made of that.

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

from flashd.engines.control import Channel, Frame, close_all

SOCKET = "weights"


def ask(path: Path) -> Frame:
    """What the engine around us was last told to hold; the descriptor is the caller's."""
    return _said(path, {"op": "ask"})


def tell_made(path: Path, content: dict[str, Any], fd: int) -> None:
    """What was made of it; the descriptor stays the caller's."""
    _said(path, {"op": "made", **content}, (fd,))


def _said(path: Path, content: dict[str, Any], fds: Sequence[int] = ()) -> Frame:
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(str(path))
        channel = Channel(end)
        channel.send(content, fds)
        return channel.receive()


class Handover:
    """Hands what is `held` to whoever connects, from a thread of its own."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._held: Frame | None = None
        self._made: Frame | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._serve, daemon=True, name="handover").start()

    def hold(self, binding: dict[str, Any], arena_fd: int) -> None:
        """From now on this is what is handed out; the descriptor stays the caller's."""
        held = Frame(binding, (os.dup(arena_fd),))
        with self._lock:
            old, self._held = self._held, held
        if old is not None:
            close_all(old.fds)

    def drop(self) -> None:
        """Nothing is handed out any more, and no memory is kept by us."""
        with self._lock:
            old, self._held = self._held, None
        if old is not None:
            close_all(old.fds)

    def take_made(self) -> Frame | None:
        """The image that was made since this was last asked; the descriptor is the caller's."""
        with self._lock:
            made, self._made = self._made, None
        return made

    def forsake(self) -> None:
        """For a forked child, which has inherited the descriptors and not the thread: it keeps none of them."""
        self._listener.close()
        if self._held is not None:
            close_all(self._held.fds)

    def _serve(self) -> None:
        while True:
            end, _ = self._listener.accept()
            with end, self._lock, contextlib.suppress(OSError, EOFError):  # whoever asked may be gone
                channel = Channel(end)
                said = channel.receive()
                if said.content.pop("op") == "made":
                    self._made = said
                    channel.send({})
                elif self._held is not None:
                    channel.send(self._held.content, self._held.fds)
