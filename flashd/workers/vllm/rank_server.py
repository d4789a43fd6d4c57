# SPDX-License-Identifier: Apache-2.0
"""Passes memory to the processes of vLLM's ranks, and takes images from them.

Each rank connects to a socket, and gets its part of the engine's weights as a descriptor with a layout, or passes the
image that it has made. vLLM starts one process for each rank, by fork or spawn; in both cases its working directory is
ours, where the socket is.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from flashd.engines import messages
from flashd.engines.control import KIND, Channel, Parcel
from flashd.engines.messages import AskShare, Done, Message, Order, RankImage, RankShare, Refusal, TellMade
from flashd.errors import EngineFailed
from flashd.tasks import close_all

SOCKET = "weights"

A = TypeVar("A", bound=Message)


def ask(path: Path, rank: int) -> Parcel[RankShare]:
    """Returns this rank's share of the engine's current weights. The caller closes the descriptor."""
    return _answered(path, AskShare(rank))


def tell_made(path: Path, rank: int, image: RankImage, fd: int) -> None:
    """Passes the image of a rank to the engine's process. The caller closes `fd`."""
    close_all(_answered(path, TellMade(rank, image), (fd,)).fds)


def _answered(path: Path, order: Order[A], fds: Sequence[int] = ()) -> Parcel[A]:
    with socket.socket(socket.AF_UNIX, KIND) as end:
        end.connect(str(path))
        channel = Channel(end)
        channel.send(order, fds)
        frame = channel.receive()
    return Parcel(messages.answer_from_json(order, frame.content), frame.fds)


class Handover:
    """The server, which answers ranks in a separate thread."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._held: Sequence[Parcel[RankShare]] = ()
        self._made: dict[int, Parcel[RankImage]] = {}
        self._listener = socket.socket(socket.AF_UNIX, KIND)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._serve, daemon=True, name="handover").start()

    def hold(self, ranks: Sequence[Parcel[RankShare]]) -> None:
        """Sets the shares for the ranks: one for each, or a single one for all. The caller closes the descriptors."""
        self._hold([Parcel(rank.message, tuple(os.dup(fd) for fd in rank.fds)) for rank in ranks])

    def drop(self) -> None:
        """Removes the shares and releases their memory."""
        self._hold(())

    def take_made(self) -> Sequence[Parcel[RankImage]]:
        """Returns the images made since the last call, by rank. The caller closes the descriptors."""
        with self._lock:
            made, self._made = self._made, {}
        return [made[rank] for rank in sorted(made)]

    def forsake(self) -> None:
        """Closes the descriptors in a forked child, which has inherited them without the thread.

        The child's own forks must not close them again, because the numbers may belong to other files by then.
        """
        self._listener.close()
        held, self._held = self._held, ()
        _close(held)

    def _hold(self, ranks: Sequence[Parcel[RankShare]]) -> None:
        with self._lock:
            old, self._held = self._held, ranks
        _close(old)

    def _serve(self) -> None:
        while True:
            end, _ = self._listener.accept()
            with end, self._lock, contextlib.suppress(OSError, EOFError):  # the rank may have ended
                self._obey(Channel(end))

    def _obey(self, channel: Channel) -> None:
        frame = channel.receive()
        try:
            order = messages.order_from_json(messages.RANK_ORDERS, frame.content, "an engine")
        except EngineFailed as error:
            close_all(frame.fds)
            channel.send(Refusal.of(error))
            return
        match order:
            case TellMade(rank, image):
                self._made[rank] = Parcel(image, frame.fds)
                channel.send(Done())
            case AskShare(rank) if rank < len(self._held) or len(self._held) == 1:
                held = self._held[rank if len(self._held) > 1 else 0]
                channel.send(held.message, held.fds)


def _close(parcels: Sequence[Parcel[RankShare]]) -> None:
    for parcel in parcels:
        close_all(parcel.fds)
