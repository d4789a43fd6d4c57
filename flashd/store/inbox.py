# SPDX-License-Identifier: Apache-2.0
"""Watches the models folders for new sources, and detects when they have settled.

The state of the disk decides; file system events only trigger scans. A folder is scanned after an event, and in any
case every `rescan_s`, because other programs may use up inotify's watches, and remote file systems report no events. An
item is settled when size and time of all its files have not changed for `settle_s`, nothing in or beside it looks like
an unfinished download, and no shard is missing.

If two sources have the name of one model, flashd/store/claims.py decides which of them is used.

Folders may be on file systems that do not answer, so each scan runs in a separate thread (flashd/store/looks.py). A
place where a scan hangs is skipped, and keeps its last known state, until that thread returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from flashd.checkpoint.source import trainers
from flashd.checkpoint.source.debris import is_debris
from flashd.checkpoint.source.downloads import is_unfinished, unfinished_twin
from flashd.checkpoint.source.reader import has_name_of_all, has_weights, is_foreign, is_one_thing, missing_shards
from flashd.checkpoint.source.shards import is_one_of_several
from flashd.errors import FlashdError
from flashd.legible import legible
from flashd.store.claims import Item, ItemState, claimed
from flashd.store.folder_watch import Changes
from flashd.store.looks import At, Look
from flashd.store.strays import Stray, stray

__all__ = ["Inbox", "Item", "ItemState"]

log = logging.getLogger(__name__)

MAX_FILES = 10_000
_EVENT_DELAY_S = 0.05  # a burst of events costs one scan
_PATIENCE_S = 5.0  # a place that takes longer counts as not answering
_MOST_STUCK = 16  # hanging threads; beyond that, scans pause until one returns
_SILENT = "its file system does not answer"
_MISSING, _NO_FOLDER = "it does not exist", "it is not a folder"
_NAMELESS = "many models have a file of this name\nput it into a folder with the model's name"
_WITH_REST = ", together with its config.json and tokenizer"


@dataclass(frozen=True, slots=True)
class _Seen:
    """The result of one scan: the sources, the folders that exist, and what is in them besides sources."""

    items: list[Item]
    folders: frozenset[Path]
    strays: Sequence[Stray] = ()


@dataclass(frozen=True, slots=True)
class Watched:
    """The way the daemon notices changes in a folder: `how` is "events", or "every 30 s" without events.

    `why_not` says why there are no events, with a remedy. `looked_at` is the time of the last scan, in seconds since
    the epoch; 0 for never.
    """

    folder: Path
    how: str
    why_not: str
    looked_at: float


class Handler(Protocol):
    """Receives settled sources. Calls come one at a time, on the event loop."""

    def is_known(self, item: Item) -> bool:
        """Tells whether this very source was already handled, in this run of the daemon or an earlier one."""

    async def settled(self, item: Item) -> None: ...

    async def removed(self, item: Item) -> None: ...

    def displaced(self, item: Item) -> None:
        """Reports that another source now has the name of this one, or, for an unused item, had it before."""

    def waiting(self, items: Sequence[Item]) -> None:
        """Receives the list of items that are not handed on (yet), whenever it changes."""


class Inbox:
    """Watches folders until `close`.

    Missing folders are created at first. If they vanish later, it waits for them: their disk may have been unmounted,
    or another folder may be about to take their place.
    """

    def __init__(self, folders: Sequence[Path], handler: Handler, *, settle_s: float, rescan_s: float) -> None:
        self._folders = folders
        self._handler = handler
        self._settle_s = settle_s
        self._rescan_s = rescan_s
        self._items: dict[Path, Item] = {}
        self._since: dict[Path, float] = {}
        self._handled: dict[Path, str] = {}
        self._wake = asyncio.Event()
        self._changes: Changes | None = None
        self._made: set[Path] = set()
        self._why_unwatched = dict.fromkeys(folders, "")
        self._warned: dict[Path, set[str]] = {folder: set() for folder in folders}
        self._looked_at = dict.fromkeys(folders, 0.0)
        self._strays: Sequence[Stray] = ()
        self._stuck: dict[Path, Look[_Seen]] = {}  # places that do not answer, and the scans that hang there
        self._arming: dict[Path, Look[str]] = {}  # the same for folders that were to be watched
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False

    def start(self) -> None:
        self._changes = Changes(self._wake.set)
        self._task = asyncio.create_task(self._run(), name="inbox")

    async def close(self) -> None:
        self._is_closing = True  # Python 3.11 loses a cancellation if wait_for ends at the same moment
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._changes is not None:
            self._changes.close()

    def has(self, path: Path) -> bool:
        """Tells whether the last scan found a source at this path."""
        return path in self._items

    def watched(self) -> list[Watched]:
        """Describes how each folder is watched."""
        every = f"every {self._rescan_s:g} s"
        return [
            Watched(folder, every if why_not else "events", why_not, self._looked_at[folder])
            for folder, why_not in self._why_unwatched.items()
        ]

    def missing(self) -> dict[Path, str]:
        """Returns the folders that the last scan did not find, each with the reason."""
        return {folder: why for folder, why in self._why_unwatched.items() if why in {_MISSING, _NO_FOLDER}}

    def strays(self) -> Sequence[Stray]:
        """Returns the entries that the last scan found besides sources."""
        return self._strays

    def look(self) -> None:
        """Begins a scan of the folders now."""
        self._wake.set()

    async def _run(self) -> None:
        while not self._is_closing:
            self._wake.clear()
            try:
                await self._arm()
                await self._compare(await self._seen())
            except OSError as error:
                log.warning("cannot scan the inbox: %s", error)
            except Exception:  # the boundary of a scan: a bug in one must not end them all
                log.exception("bug while scanning the inbox")
            is_soon = self._is_settling() or bool(self.missing())
            waits = self._settle_s / 2 if is_soon else self._rescan_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), waits)
                await asyncio.sleep(_EVENT_DELAY_S)

    async def _seen(self) -> _Seen:
        """Scans the folders. Places that do not answer keep their last state, or are shown as not answering."""
        self._stuck = {place: look for place, look in self._stuck.items() if not look.has_ended}
        while len(self._stuck) < _MOST_STUCK:
            look = Look(lambda at: _scan(self._folders, at), self._stuck)
            try:
                seen = await look.result(_PATIENCE_S)
            except TimeoutError:
                log.warning("%s is skipped for now: %s", look.place, _SILENT)
                self._stuck[look.place] = look
            else:
                self._looked_at |= dict.fromkeys(seen.folders, time.time())
                self._strays = seen.strays
                return replace(seen, items=[*seen.items, *self._silent()])
        return _Seen(list(self._items.values()), frozenset())

    async def _arm(self) -> None:
        """Creates and watches all folders, except those that do not answer, which are only scanned."""
        self._arming = {folder: look for folder, look in self._arming.items() if not look.has_ended}
        for folder in self._folders:
            if folder in self._arming:
                continue
            look = Look(functools.partial(self._watch, folder), ())
            try:
                self._note_watched(folder, await look.result(_PATIENCE_S))
            except TimeoutError:
                self._note_watched(folder, _SILENT)
                self._arming[folder] = look

    def _note_watched(self, folder: Path, why_not: str) -> None:
        """Logs once for each reason that a folder is not watched by events, and when it is watched again."""
        before, self._why_unwatched[folder] = self._why_unwatched[folder], why_not
        if why_not in {_MISSING, _NO_FOLDER}:
            if why_not != before:
                log.warning("%s: %s, so no model can be dropped there", folder, why_not)
        elif why_not and why_not not in self._warned[folder]:
            self._warned[folder].add(why_not)
            log.warning("%s is only scanned every %g s: %s", folder, self._rescan_s, why_not)
        elif not why_not and before in {_MISSING, _NO_FOLDER, *self._warned[folder]}:
            log.info("%s is watched again", folder)

    def _silent(self) -> Iterator[Item]:
        """Yields the last known state of places that do not answer, or an item that says so."""
        for place in self._stuck:
            known = [item for path, item in self._items.items() if path.is_relative_to(place)]
            yield from known
            folder = next((folder for folder in self._folders if folder in place.parents), None)
            if not known and folder is not None:
                yield Item("", place, "", ItemState.INCOMPLETE, _SILENT, folder, place)

    def _unsettled(self) -> list[Item]:
        return [item for item in self._items.values() if item.state is not ItemState.SETTLED]

    def _is_settling(self) -> bool:
        return any(item.state in {ItemState.SETTLING, ItemState.INCOMPLETE} for item in self._items.values())

    def _watch(self, folder: Path, _: At) -> str:
        """Watches a folder and everything in it, after creating it at first. Returns the reason if that fails."""
        assert self._changes is not None
        if folder not in self._made:
            self._made.add(folder)
            _make(folder)
        try:
            self._changes.watch(folder)
        except FileNotFoundError:
            return _MISSING
        except NotADirectoryError:
            return _NO_FOLDER
        except OSError as error:
            return str(error.strerror)
        return ""

    async def _compare(self, found: _Seen) -> None:
        now = asyncio.get_running_loop().time()
        before = self._unsettled()
        items = claimed(found.items, self._folders)
        seen = {item.path: item for item in items}
        names = {item.name for item in items if item.is_used}
        for path in self._items.keys() - seen.keys():
            gone = self._items.pop(path)
            self._since.pop(path, None)
            if gone.name in names:  # a training has continued: its next checkpoint is the same model
                self._handled.pop(path, None)
            elif self._handled.pop(path, None) is not None and any(map(path.is_relative_to, found.folders)):
                await self._handler.removed(gone)
        for path, item in seen.items():
            known = self._items.get(path)
            if known is None or known.fingerprint != item.fingerprint:
                self._since[path] = now
            self._items[path] = self._judged(item, now)
            if item.state is ItemState.UNUSED and (known is None or known.is_used):
                self._handled.pop(path, None)
                self._handler.displaced(known or item)
        if self._unsettled() != before:
            self._handler.waiting(self._unsettled())
        for item in list(self._items.values()):
            if item.state is ItemState.SETTLED and self._handled.get(item.path) != item.fingerprint:
                self._handled[item.path] = item.fingerprint
                if not self._handler.is_known(item):
                    await self._hand_on(item)
                    await asyncio.sleep(0)  # yields to other work between thousands that settle at once

    async def _hand_on(self, item: Item) -> None:
        try:
            await self._handler.settled(item)
        except Exception:  # the boundary of an item: a bug with one must not affect the others
            log.exception("bug while %s was handed on", item.name)

    def _judged(self, item: Item, now: float) -> Item:
        if item.state not in {ItemState.SETTLING, ItemState.SETTLED}:
            return item
        if now - self._since[item.path] >= self._settle_s or self._handler.is_known(item):
            return replace(item, state=ItemState.SETTLED)
        return item


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("cannot make the models folder %s: %s", folder, error.strerror)


def _scan(folders: Sequence[Path], at: At) -> _Seen:
    items: list[Item] = []
    strays: list[Stray] = []
    there = []
    for folder in folders:
        if not at(folder):
            continue
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            entries = _visible(folder)
            there.append(folder)
            for entry in entries:
                if at(Path(entry.path)):
                    found = _items(folder, entry, _unfinished(entries))
                    items += found
                    strays += [] if found else _strays(entry)
    return _Seen(items, frozenset(there), strays)


def _strays(entry: os.DirEntry[str]) -> Iterator[Stray]:
    with contextlib.suppress(OSError):  # removed during the scan
        yield stray(entry)


def _items(folder: Path, entry: os.DirEntry[str], unfinished: Sequence[str]) -> list[Item]:
    items: list[Item] = []
    try:
        for path, source, beside in _candidates(entry, unfinished):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # removed during the scan
                items.append(_examined(folder, path, source, beside))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # an unreadable one must not affect the others
        path = Path(error.filename or entry.path)
        detail = f"{path} cannot be read: {error.strerror}"
        items.append(Item("", path, "", ItemState.REFUSED, detail, folder, path))
    return items


def _candidates(entry: os.DirEntry[str], unfinished: Sequence[str]) -> Iterator[tuple[Path, Path, Sequence[str]]]:
    """Yields folders and files of weights at this entry and one level below (Qwen/Qwen3-0.6B).

    Each comes with the path of its source, which for a running training is that of the latest checkpoint, and with the
    names of unfinished downloads beside it. Hidden files and debris are skipped. Models in unsupported formats are
    included, so that their owner gets an error.
    """
    path = Path(entry.path)
    source = _source_of(path)
    is_refused = source is None and _is_foreign(path)
    if source is not None or is_refused:
        yield path, source or path, unfinished
    if source != path and entry.is_dir(follow_symlinks=False) and not is_one_thing(path):
        entries = _visible(path)
        for inner in entries:
            is_trainers = trainers.step_of(inner.name) is not None or trainers.is_being_saved(inner.name)
            if is_trainers:
                continue
            if (found := _source_of(Path(inner.path))) is not None:
                yield Path(inner.path), found, _unfinished(entries)
            elif source is None and not is_refused and _is_foreign(Path(inner.path)):
                yield Path(inner.path), Path(inner.path), ()


def _source_of(path: Path) -> Path | None:
    """Returns the path of the weights for this path: itself, or the last checkpoint of a training."""
    if _is_source(path):
        return path
    if not path.is_dir() or path.is_symlink():
        return None
    steps = {step: Path(e.path) for e in _visible(path) if (step := trainers.step_of(e.name)) is not None}
    return next((steps[step] for step in sorted(steps, reverse=True) if _is_source(steps[step])), None)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not is_debris(e.name)), key=lambda e: e.name)[:MAX_FILES]


def _unfinished(entries: Sequence[os.DirEntry[str]]) -> list[str]:
    return [e.name for e in entries if is_unfinished(e.name, is_folder=e.is_dir(follow_symlinks=False))]


def _is_source(path: Path) -> bool:
    try:
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            return has_weights(path) or bool(_unfinished(_visible(path)))
        return (stat.S_ISREG(mode) or stat.S_ISLNK(mode)) and has_weights(path)
    except OSError:
        return False


def _is_foreign(path: Path) -> bool:
    try:
        return not path.is_symlink() and is_foreign(path)
    except OSError:
        return False


def _examined(folder: Path, named: Path, path: Path, beside: Sequence[str]) -> Item:
    files = list(_files(path))
    lines = [f"{name} {status.st_size} {status.st_mtime_ns} {status.st_ino}" for name, status in files]
    fingerprint = hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()
    is_folder = path.is_dir()
    within = _unfinished(_visible(path)) if is_folder else []
    unfinished = within[0] if within else unfinished_twin(named.name, beside)
    state, detail = ItemState.SETTLING, ""
    if unfinished is not None:
        state, detail = ItemState.INCOMPLETE, f"{legible(unfinished)} is still being downloaded"
    elif not is_folder and is_one_of_several(path.name):
        state, detail = ItemState.REFUSED, "it is only one of several files of a model\nput all of them into one folder"
    elif not is_folder and has_name_of_all(path.name):
        state, detail = ItemState.REFUSED, _NAMELESS + ("" if path.suffix == ".gguf" else _WITH_REST)
    elif missing := _missing(path):
        state = ItemState.INCOMPLETE
        detail = f"{len(missing)} files are missing, the first is {legible(missing[0])}"
    return Item("", path, fingerprint, state, detail, folder, named, is_folder=is_folder)


def _missing(path: Path) -> list[str]:
    try:
        return missing_shards(path)
    except FlashdError:  # a broken index, which the conversion reports
        return []


def _files(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    if not path.is_dir() or path.is_symlink():
        yield path.name, path.lstat()
        return
    with os.scandir(path) as entries:
        for count, entry in enumerate(entries):
            if count > MAX_FILES:
                return
            if not is_debris(entry.name) and not entry.is_dir(follow_symlinks=False):
                yield entry.name, entry.stat(follow_symlinks=False)
