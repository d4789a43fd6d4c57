# SPDX-License-Identifier: Apache-2.0
"""How do models in a home become the machine's, although its daemon cannot read homes? `flashd-inbox` hands them over.

It runs as the user (systemd/flashd-inbox.service), watches the user's models folder with the daemon's own inbox code,
and gives what has settled to the daemon as file descriptors. What was handed over is remembered by its fingerprint in
the user's state directory, so that a login converts nothing anew. What the daemon refused is not offered again until
the source changes; what it could not take now (not running, not permitted yet, store full) is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import tomli_w

import flashd
from flashd import client, config
from flashd.client import Client
from flashd.errors import (
    AlreadyExists,
    BaseMissing,
    Busy,
    Cancelled,
    FlashdError,
    InvalidArgument,
    InvalidSource,
    NotAuthorized,
    NotFound,
    OutOfMemory,
    StoreFull,
    Unavailable,
)
from flashd.store.inbox import Inbox, Item
from flashd.units import format_bytes

log = logging.getLogger(__name__)

# Not the source's fault: the same files may be welcome later.
_LATER = (Unavailable, NotAuthorized, Busy, StoreFull, OutOfMemory, Cancelled, BaseMissing)


class Book:
    """What was handed over, and how it went: path to fingerprint, in a file that survives the session."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fingerprints: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError, tomllib.TOMLDecodeError, UnicodeDecodeError):
            found = tomllib.loads(path.read_text(encoding="utf-8"))
            self._fingerprints = {key: value for key, value in found.items() if isinstance(value, str)}

    def holds(self, item: Item) -> bool:
        return self._fingerprints.get(str(item.path)) == item.fingerprint

    def add(self, item: Item) -> None:
        self._fingerprints[str(item.path)] = item.fingerprint
        self._write()

    def drop(self, item: Item) -> None:
        if self._fingerprints.pop(str(item.path), None) is not None:
            self._write()

    def _write(self) -> None:
        partial = self._path.with_suffix(".partial")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(tomli_w.dumps(self._fingerprints), encoding="utf-8")
        partial.rename(self._path)


class Handover:
    """The inbox's handler: one source at a time goes to the daemon, in the order in which they settled."""

    def __init__(
        self,
        book: Book,
        connect: Callable[[], Client],
        *,
        retry_s: float,
        private: bool = False,
        on_remove: str = "keep",
    ) -> None:
        self._book = book
        self._connect = connect
        self._retry_s = retry_s
        self._private = private
        self._on_remove = on_remove
        self._queue: dict[str, Item] = {}
        self._told: dict[str, str] = {}
        self._wake = asyncio.Event()

    def is_known(self, item: Item) -> bool:
        return self._book.holds(item)

    async def settled(self, item: Item) -> None:
        self._queue[str(item.path)] = item
        self._wake.set()

    async def removed(self, item: Item) -> None:
        self._queue.pop(str(item.path), None)
        self._book.drop(item)
        if self._on_remove == "remove":
            try:
                await asyncio.to_thread(self._remove, item.name)
            except FlashdError as error:
                log.warning("%s stays a model: %s", item.name, error)

    def waiting(self, items: Sequence[Item]) -> None:
        for item in items:
            log.info("%s: %s%s", item.name, item.state, f", {item.detail}" if item.detail else "")

    async def run(self) -> None:
        """Hands over what settles, until cancelled."""
        while True:
            self._wake.clear()
            for path, item in list(self._queue.items()):
                if self._queue.get(path) == item and await self._hand_over(item) and self._queue.get(path) == item:
                    del self._queue[path]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._retry_s if self._queue else None)

    async def _hand_over(self, item: Item) -> bool:
        """Whether the item is dealt with."""
        try:
            await asyncio.to_thread(self._import, item)
        except _LATER as error:
            if self._told.get(item.name) != str(error):  # once, and not at every attempt
                self._told[item.name] = str(error)
                log.warning("%s has to wait: %s", item.name, error)
            return False
        except (InvalidSource, InvalidArgument, AlreadyExists) as error:
            log.error("%s does not become a model: %s", item.name, error)
        except FlashdError as error:
            log.error("%s could not be handed over: %s", item.name, error)
        self._told.pop(item.name, None)
        self._book.add(item)
        return True

    def _import(self, item: Item) -> None:
        with self._connect() as connected:
            is_ours = _is_ours(connected, item.name)
            private = True if self._private and not is_ours else None  # later it is for `flash private` to say
            model = connected.import_(item.path, item.name, replace=is_ours, private=private)
        log.info("%s is a model: %s", model.name, format_bytes(model.size_bytes))

    def _remove(self, name: str) -> None:
        with self._connect() as connected:
            if _is_ours(connected, name):
                connected.remove(name)


def _is_ours(connected: Client, name: str) -> bool:
    """Whether the model was made by this user: nobody's inbox replaces what somebody else has made."""
    try:
        model = connected.model(name)
    except NotFound:
        return False
    uid = os.getuid()
    return model.name == name and (model.owner_uid, model.source) == (uid, f"imported by user {uid}")


async def run(handover: Handover, inbox: Inbox, stop: asyncio.Event) -> None:
    """Watches and hands over until `stop`."""
    inbox.start()
    work = asyncio.create_task(handover.run(), name="handover")
    asked = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({work, asked}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        asked.cancel()
        work.cancel()
        await asyncio.gather(work, asked, return_exceptions=True)
        await inbox.close()


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
        prog="flashd-inbox", description="Hands what is dropped into your models folder to the machine's flashd."
    )
    described.add_argument("--bus", metavar="session|system|ADDRESS", default="system", help="the bus flashd is on")
    described.add_argument("--models-dir", type=Path, metavar="FOLDER", help="the folder watched, default ~/models")
    described.add_argument("--state-dir", type=Path, metavar="FOLDER", help="where it remembers what it handed over")
    described.add_argument("--retry-s", type=float, default=30.0, metavar="SECONDS", help="how often it tries again")
    described.add_argument("--version", action="version", version=f"flashd-inbox {flashd.__version__}")
    return described


async def _until_signalled(options: argparse.Namespace) -> None:
    paths = config.default_paths(config.Scope.USER)
    given = {"state": options.state_dir, "models": options.models_dir}
    paths = dataclasses.replace(paths, **{name: path.absolute() for name, path in given.items() if path is not None})
    settings = config.load(paths).inbox
    folders = (paths.models,) if options.models_dir is not None else settings.folders
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    handover = Handover(
        Book(paths.state / "handed-over.toml"),
        lambda: client.connect(options.bus, interactive=False),
        retry_s=options.retry_s,
        private=settings.private,
        on_remove=settings.on_remove,
    )
    inbox = Inbox(folders, handover, settle_s=settings.settle_s, rescan_s=settings.rescan_s)
    await run(handover, inbox, stop)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    try:
        asyncio.run(_until_signalled(options))
    except FlashdError as error:
        print(f"flashd-inbox: {error}".replace("\n", "\n              "), file=sys.stderr)
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":
    main()
