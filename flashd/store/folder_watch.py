# SPDX-License-Identifier: Apache-2.0
"""File system events as hints that something has changed in a folder, without saying what.

The events are watchdog's, from inotify(7). They may end silently: if the folder is deleted, moved or mounted over, if a
thread of the observer dies, or if no watch is left for a new directory. So `watch` has to be called again before each
scan of a folder, and replaces a watch that is no longer intact.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

# Not FileModifiedEvent, because copying a file causes millions; creating and closing it cause events too. Nor events
# of our own scans.
_EVENTS: list[type[FileSystemEvent]] = [
    *(DirCreatedEvent, DirDeletedEvent, DirMovedEvent),
    *(FileClosedEvent, FileCreatedEvent, FileDeletedEvent, FileMovedEvent),
]

_WHY = {
    errno.EMFILE: "other programs use all inotify instances: raise fs.inotify.max_user_instances (sysctl)",
    errno.ENOSPC: "other programs use all inotify watches: raise fs.inotify.max_user_watches (sysctl)",
    errno.ENOSYS: "the kernel has no inotify",
}


@dataclass(slots=True)
class _Watch:
    """A separate observer for each folder, so that one whose file system hangs does not delay the others."""

    observer: BaseObserver
    directory: tuple[int, int]  # device and inode, because another folder may replace the watched one
    was_short: bool = False  # watches have run out at some time, so directories in it may be unwatched

    def is_whole(self, directory: tuple[int, int]) -> bool:
        """Tells whether this very directory is watched, and all threads of the observer are alive."""
        owners = [self.observer, *self.observer.emitters]
        threads = [each for owner in owners for each in (owner, *vars(owner).values())]
        return (
            self.directory == directory
            and bool(self.observer.emitters)
            and all(thread.is_alive() for thread in threads if isinstance(thread, threading.Thread))
        )

    def check_room(self) -> None:
        """Checks that a watch is available, because watchdog silently skips directories without one. Raises OSError."""
        try:
            watch = self.observer.schedule(FileSystemEventHandler(), "/", event_filter=[])
        except OSError:
            self.was_short = True
            raise
        with contextlib.suppress(KeyError):  # the observer was stopped meanwhile, which ends all its watches
            self.observer.unschedule(watch)


class Changes(FileSystemEventHandler):
    """Calls `on_change` on the event loop after changes in watched folders. Must be created on the event loop."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        # watchdog warns when it is told of a new directory twice, by the kernel and by its own walk, which is harmless.
        warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning)
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._mutex = threading.Lock()
        self._watches: dict[Path, _Watch] = {}
        self._is_closed = False

    def watch(self, folder: Path) -> None:
        """Watches a folder and everything in it, unless it is watched. One thread at a time may call it for a folder.

        Raises OSError. For EMFILE, ENOSPC and ENOSYS the message says why events do not cover all changes.
        """
        try:
            with os.scandir(folder):  # watchdog does not report an unreadable folder
                status = folder.stat()
        except OSError:
            self._end(folder)
            raise
        try:
            self._watch(folder, (status.st_dev, status.st_ino))
        except OSError as error:
            raise OSError(error.errno, _WHY.get(error.errno or 0, error.strerror), str(folder)) from error

    def close(self) -> None:
        """Ends all watches, in threads that are not awaited, because a hanging file system may block them."""
        with self._mutex:
            self._is_closed = True
            watches = list(self._watches.values())
            self._watches.clear()
        for watch in watches:
            threading.Thread(target=watch.observer.stop, name="end of a watch", daemon=True).start()

    def on_any_event(self, event: FileSystemEvent) -> None:  # noqa: ARG002 -- the scan finds the change
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._on_change)

    def _watch(self, folder: Path, directory: tuple[int, int]) -> None:
        watch = self._watches.get(folder)
        if watch is None or not watch.is_whole(directory):
            watch = self._begin(folder, directory)
        watch.check_room()
        if watch.was_short:
            self._begin(folder, directory).check_room()

    def _begin(self, folder: Path, directory: tuple[int, int]) -> _Watch:
        self._end(folder)
        watch = _Watch(Observer(), directory)
        try:
            watch.observer.start()
            watch.observer.schedule(self, os.path.realpath(folder), recursive=True, event_filter=_EVENTS)
        except OSError:
            watch.observer.stop()
            raise
        with self._mutex:
            self._watches[folder] = watch
            is_late = self._is_closed
        if is_late:
            self._end(folder)
        return watch

    def _end(self, folder: Path) -> None:
        with self._mutex:
            watch = self._watches.pop(folder, None)
        if watch is not None:
            watch.observer.stop()
