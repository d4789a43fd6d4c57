# SPDX-License-Identifier: Apache-2.0
"""Files that one caller sends over several messages, because one message takes few descriptors."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping

from flashd.dbus.object_tree import Caller
from flashd.errors import InvalidArgument, NotAuthorized
from flashd.tasks import close_all

MAX_FILES = 1024  # of one collection: a client cannot use up our descriptors


class CollectedFiles:
    """Duplicates of a caller's descriptors, by name. They are closed by `close`, unless `take` has handed them on.

    A thread may take them while another closes them: each descriptor goes to one of the two.
    """

    def __init__(self, purpose: str, sender: str = "") -> None:
        """`purpose` is a noun, such as "import"; `sender` the unique name of the only connection that may add files,
        empty while there is none."""
        self.sender = sender
        self.is_complete = False
        self._purpose = purpose
        self._mutex = threading.Lock()
        self._fds: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._fds)

    def check_sender(self, caller: Caller, job: int) -> None:
        """Raises NotAuthorized for any caller but the one who sends the files."""
        if caller.peer != self.sender:
            raise NotAuthorized(f"job {job} is another caller's {self._purpose}")

    def add(self, files: Mapping[str, int], *, more: bool) -> None:
        """Duplicates the files of one message; the last message says that there are no more. Raises InvalidArgument."""
        if self.is_complete:
            raise InvalidArgument(f"all files of this {self._purpose} were sent")
        if clash := self._fds.keys() & files.keys():
            raise InvalidArgument(f"{min(clash)!r} was sent twice")
        if len(self._fds) + len(files) > MAX_FILES:
            hint = "send only the files that belong to it"
            raise InvalidArgument(f"more than {MAX_FILES} files in one {self._purpose}", hint=hint)
        for name, fd in files.items():  # one by one: those duplicated before one fails are closed too
            self._fds[name] = os.dup(fd)
        self.is_complete = not more

    def is_cut_short(self, peer: str) -> bool:
        """Tells whether files are still to come from this connection, which has left the bus."""
        return peer == self.sender and not self.is_complete

    def take(self) -> dict[str, int]:
        """Hands the descriptors on to the caller of this, who closes them."""
        with self._mutex:
            fds, self._fds = self._fds, {}
        return fds

    @contextlib.contextmanager
    def taken(self) -> Iterator[Mapping[str, int]]:
        """Takes the descriptors, and closes them at the end of the block."""
        fds = self.take()
        try:
            yield fds
        finally:
            close_all(fds.values())

    def close(self) -> None:
        close_all(self.take().values())
