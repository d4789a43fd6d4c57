# SPDX-License-Identifier: Apache-2.0
"""Checks that descriptors from a caller are readable regular files, before they are used.

The caller chooses the file system behind a descriptor, which may never answer, so each check runs in a thread.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

from flashd.errors import Busy, InvalidArgument, InvalidSource, LimitExceeded, TransferFailed
from flashd.tasks import close_all

_ANSWER_S = 10.0
_MOST_UNANSWERED = 8
_ANSWER_HINT = "check its server, or copy the source to a local disk and send it from there"
_HINT = "open every file of the source separately, for reading"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class OpenedFiles:
    """Checks the files that callers send. All calls are made on one event loop.

    An unanswered check leaves its thread behind until the file system answers, so the number per user is limited.
    """

    def __init__(self) -> None:
        self._unanswered: Counter[int] = Counter()  # abandoned checks that have not ended, by user

    async def check(self, uid: int, files: Mapping[str, int]) -> None:
        """Checks that each descriptor is a regular file opened for reading.

        Raises InvalidSource, which names the file, if one is not; InvalidArgument if two files have one descriptor;
        TransferFailed if the file system does not answer; LimitExceeded after several such checks of this user.
        """
        names: dict[int, str] = {}
        for name, fd in files.items():
            if fd in names:
                raise InvalidArgument(f"{name!r} and {names[fd]!r} have the same descriptor", hint=_HINT)
            names[fd] = name
            _check_flags(name, fcntl.fcntl(fd, fcntl.F_GETFL))  # which the kernel answers without the file system
        if not files:
            return
        if self._unanswered[uid] >= _MOST_UNANSWERED:
            raise LimitExceeded(f"{_MOST_UNANSWERED} of your imports are waiting for a file system", hint=_ANSWER_HINT)
        look = _Look(files)
        try:
            await asyncio.wait_for(look.ended.wait(), _ANSWER_S)
        except TimeoutError:
            self._unanswered[uid] += 1
            look.on_end = lambda: self._unanswered.subtract({uid: 1})
            raise TransferFailed(f"the file system of {look.asked!r} does not answer", hint=_ANSWER_HINT) from None
        if isinstance(look.error, OSError):
            raise TransferFailed(f"cannot check {look.asked!r}: {look.error.strerror}") from None
        if look.error is not None:
            raise look.error


class _Look:
    """A check of files in a thread. `asked` is the file being checked, or the last one; `on_end` is called on the event
    loop.
    """

    def __init__(self, files: Mapping[str, int]) -> None:
        self.ended = asyncio.Event()
        self.asked = ""
        self.error: InvalidSource | OSError | None = None
        self.on_end: Callable[[], None] = lambda: None
        self._loop = asyncio.get_running_loop()
        with ExitStack() as on_error:
            ours = {}  # duplicated, because the caller's are closed if we give up
            for name, fd in files.items():
                ours[name] = os.dup(fd)
                on_error.callback(os.close, ours[name])
            try:
                threading.Thread(target=self._look, args=(ours,), name="look at opened files", daemon=True).start()
            except RuntimeError:
                raise Busy("the machine has no threads left", hint="try again later") from None
            on_error.pop_all()

    def _look(self, files: Mapping[str, int]) -> None:
        try:
            for name, fd in files.items():
                self.asked = name
                _check_kind(name, os.fstat(fd).st_mode)
        except (InvalidSource, OSError) as error:
            self.error = error
        finally:
            close_all(files.values())
            with suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self.ended.set()
        self.on_end()


def _check_flags(name: str, flags: int) -> None:
    if flags & os.O_PATH:
        raise InvalidSource(f"{name!r} was opened with O_PATH, which does not permit reading", hint=_HINT)
    if flags & os.O_ACCMODE == os.O_WRONLY:
        raise InvalidSource(f"{name!r} was opened for writing only", hint=_HINT)


def _check_kind(name: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((noun for is_kind, noun in _KINDS if is_kind(mode)), "something else")
        raise InvalidSource(f"{name!r} is {kind}, not a regular file", hint=_HINT)
