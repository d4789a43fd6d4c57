# SPDX-License-Identifier: Apache-2.0
"""How does an arena reach vLLM's own processes? Each asks on a socket, and gets the descriptor with its layout.

vLLM starts a process a rank, by fork or otherwise; whichever way, its working directory is ours, where the socket lies.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Any

from flashd.engines.control import Channel, Frame, close_all

SOCKET = "weights"


class Handover:
    """Hands what is `held` to whoever connects, from a thread of its own."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._held: Frame | None = None
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

    def forsake(self) -> None:
        """For a forked child, which has inherited the descriptors and not the thread: it keeps none of them."""
        self._listener.close()
        if self._held is not None:
            close_all(self._held.fds)

    def _serve(self) -> None:
        while True:
            end, _ = self._listener.accept()
            with end, self._lock, contextlib.suppress(OSError):  # whoever asked may be gone
                if self._held is not None:
                    Channel(end).send(self._held.content, self._held.fds)
