# SPDX-License-Identifier: Apache-2.0
"""What has been dropped into the models folders, and has it settled?

The state of the disk decides; file system events only say when to look again. A folder is looked at after an event,
and every `rescan_s` anyway, because events are lost on overflow, name only `created` for what is moved or linked in,
and end without a word when the folder itself is deleted (watchdog; inotify(7)). An item is settled when size and time
of all its files have not changed for `settle_s`, nothing in it looks like an unfinished download, and no shard is
missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver, ObservedWatch

from flashd.checkpoint import trainers
from flashd.checkpoint.source import has_weights, missing_shards
from flashd.errors import FlashdError

log = logging.getLogger(__name__)

UNFINISHED = (".part", ".partial", ".incomplete", ".tmp", ".crdownload", ".download", ".aria2", ".filepart", ".!qb")
MAX_FILES = 10_000
_EVENT_DELAY_S = 0.05  # a burst of events costs one look


class ItemState(StrEnum):
    SETTLING = "settling"
    INCOMPLETE = "incomplete"
    SETTLED = "settled"


@dataclass(frozen=True, slots=True)
class Item:
    """A source in the inbox. `name` is its path within the folder, as a model's name, or that of the training whose
    last checkpoint it is; `fingerprint` changes with any of its files."""

    name: str
    path: Path
    fingerprint: str
    state: ItemState
    detail: str = ""


class Handler(Protocol):
    """Whoever makes models of what is dropped. Calls come one at a time, on the event loop."""

    def is_known(self, item: Item) -> bool:
        """Whether this very source was handled already, in this run of the daemon or an earlier one."""

    async def settled(self, item: Item) -> None: ...

    async def removed(self, item: Item) -> None: ...

    def waiting(self, items: Sequence[Item]) -> None:
        """The items that are not settled yet, whenever they change."""


class Inbox:
    """Watches folders until `close`. Those that do not exist are made, and waited for if they go away later."""

    def __init__(self, folders: Sequence[Path], handler: Handler, *, settle_s: float, rescan_s: float) -> None:
        self._folders = folders
        self._handler = handler
        self._settle_s = settle_s
        self._rescan_s = rescan_s
        self._items: dict[Path, Item] = {}
        self._since: dict[Path, float] = {}
        self._handled: dict[Path, str] = {}
        self._wake = asyncio.Event()
        self._observer: BaseObserver | None = None
        self._watches: dict[Path, tuple[ObservedWatch, int]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        for folder in self._folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                log.warning("cannot make the models folder %s: %s", folder, error.strerror)
        self._task = asyncio.create_task(self._run(), name="inbox")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._observer is not None:
            self._observer.stop()
            await asyncio.to_thread(self._observer.join)

    def look(self) -> None:
        """Looks at the folders now."""
        self._wake.set()

    async def _run(self) -> None:
        self._observer = Observer()
        self._observer.start()
        while True:
            self._wake.clear()
            try:
                self._rearm()
                found = await asyncio.to_thread(_scan, self._folders)
                await self._compare(found)
            except OSError as error:
                log.warning("cannot look into the inbox: %s", error)
            is_soon = self._unsettled() or len(self._watches) < len(self._folders)
            waits = self._settle_s / 2 if is_soon else self._rescan_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), waits)
                await asyncio.sleep(_EVENT_DELAY_S)

    def _unsettled(self) -> list[Item]:
        return [item for item in self._items.values() if item.state is not ItemState.SETTLED]

    def _rearm(self) -> None:
        """Watches every folder that exists, anew where it is not the one that was watched."""
        assert self._observer is not None
        for folder in self._folders:
            try:
                inode = folder.stat().st_ino
            except OSError:
                inode = 0
            watch, watched = self._watches.get(folder, (None, 0))
            if inode == watched:
                continue
            if watch is not None:
                with contextlib.suppress(KeyError, OSError):
                    self._observer.unschedule(watch)
                del self._watches[folder]
            if inode:
                poke = _Poke(asyncio.get_running_loop(), self._wake)
                self._watches[folder] = (self._observer.schedule(poke, str(folder), recursive=True), inode)

    async def _compare(self, found: Sequence[Item]) -> None:
        now = asyncio.get_running_loop().time()
        before = self._unsettled()
        seen = {item.path: item for item in found}
        names = {item.name for item in found}
        for path in self._items.keys() - seen.keys():
            gone = self._items.pop(path)
            self._since.pop(path, None)
            if gone.name in names:  # a training went on: its next checkpoint is the same model
                self._handled.pop(path, None)
            elif self._handled.pop(path, None) is not None and any(
                path.is_relative_to(f) and f.exists() for f in self._folders
            ):
                await self._handler.removed(gone)
        for path, item in seen.items():
            known = self._items.get(path)
            if known is None or known.fingerprint != item.fingerprint:
                self._since[path] = now
            self._items[path] = self._judged(item, now)
        if self._unsettled() != before:
            self._handler.waiting(self._unsettled())
        for item in list(self._items.values()):
            if item.state is ItemState.SETTLED and self._handled.get(item.path) != item.fingerprint:
                self._handled[item.path] = item.fingerprint
                if not self._handler.is_known(item):
                    await self._hand_on(item)

    async def _hand_on(self, item: Item) -> None:
        try:
            await self._handler.settled(item)
        except Exception:  # the boundary of an item: a defect met in one must not keep the others out
            log.exception("defect while %s was handed on", item.name)

    def _judged(self, item: Item, now: float) -> Item:
        if item.state is ItemState.INCOMPLETE:
            return item
        if now - self._since[item.path] >= self._settle_s or self._handler.is_known(item):
            return replace(item, state=ItemState.SETTLED)
        return item


class _Poke(FileSystemEventHandler):
    """Wakes the inbox from watchdog's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: asyncio.Event) -> None:
        self._loop = loop
        self._wake = wake

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type not in {"opened", "closed_no_write"}:  # our own looking is no news
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._wake.set)


def _scan(folders: Sequence[Path]) -> list[Item]:
    items = []
    for folder in folders:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path, source in _candidates(folder):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # gone while we looked
                    items.append(_examined(folder, path, source))
    return items


def _candidates(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Folders and files of weights, and those one level down: Qwen/Qwen3-0.6B. Hidden ones are nobody's model.

    Each with the folder that its source is in: of a training under way, that of the latest checkpoint.
    """
    for entry in _visible(folder):
        path = Path(entry.path)
        source = _source_of(path)
        if source is not None:
            yield path, source
        if source != path and entry.is_dir(follow_symlinks=False):
            for inner in _visible(path):
                is_trainers = trainers.step_of(inner.name) is not None or trainers.is_being_saved(inner.name)
                if not is_trainers and (found := _source_of(Path(inner.path))) is not None:
                    yield Path(inner.path), found


def _source_of(path: Path) -> Path | None:
    """Where the weights of a model are that is called as this path: here, or in the last checkpoint of a training."""
    if _is_source(path):
        return path
    if not path.is_dir() or path.is_symlink():
        return None
    steps = {step: Path(e.path) for e in _visible(path) if (step := trainers.step_of(e.name)) is not None}
    return next((steps[step] for step in sorted(steps, reverse=True) if _is_source(steps[step])), None)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)[:MAX_FILES]


def _is_source(path: Path) -> bool:
    try:
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            return has_weights(path) or any(e.name.lower().endswith(UNFINISHED) for e in _visible(path))
        return (stat.S_ISREG(mode) or stat.S_ISLNK(mode)) and has_weights(path)
    except OSError:
        return False


def _examined(folder: Path, named: Path, path: Path) -> Item:
    files = list(_files(path))
    lines = [f"{name} {status.st_size} {status.st_mtime_ns} {status.st_ino}" for name, status in files]
    fingerprint = hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()
    name = str(named.relative_to(folder))
    if not path.is_dir():
        name = name.rsplit(".", 1)[0]
    unfinished = [file for file, _ in files if file.lower().endswith(UNFINISHED)]
    if unfinished:
        return Item(name, path, fingerprint, ItemState.INCOMPLETE, f"{unfinished[0]} is still being downloaded")
    try:
        missing = missing_shards(path)
    except FlashdError:  # a broken index: the conversion says so, in its own words
        missing = []
    if missing:
        return Item(
            name, path, fingerprint, ItemState.INCOMPLETE, f"waits for {len(missing)} files, the first is {missing[0]}"
        )
    return Item(name, path, fingerprint, ItemState.SETTLING)


def _files(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    if not path.is_dir() or path.is_symlink():
        yield path.name, path.lstat()
        return
    with os.scandir(path) as entries:
        for count, entry in enumerate(entries):
            if count > MAX_FILES:
                return
            if not entry.is_dir(follow_symlinks=False):
                yield entry.name, entry.stat(follow_symlinks=False)
