# SPDX-License-Identifier: Apache-2.0
"""`flashd-inbox`: passes models in a home directory to the machine's daemon, which cannot read home directories.

It runs as the user (systemd/flashd-inbox.service), watches the user's models folder with the daemon's own inbox code,
and passes settled sources to the daemon as file descriptors. Fingerprints of imported sources are saved in the user's
state directory, so that they are not imported again at each login. A source that the daemon has refused is not offered
again until it changes; one that could not be imported temporarily (no daemon, no permission yet, store full) is.
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
from collections.abc import Callable, Sequence
from pathlib import Path

from flashd._version import __version__
from flashd.client import client
from flashd.client.client import Client
from flashd.config import loading
from flashd.config.paths import Scope, default_paths
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
from flashd.legible_log import LegibleFormatter
from flashd.store.inbox import Inbox, Item
from flashd.store.known_sources import KnownSources
from flashd.units import format_bytes

log = logging.getLogger(__name__)

# Errors that are not the source's fault: the same files may be accepted later.
_LATER = (Unavailable, NotAuthorized, Busy, StoreFull, OutOfMemory, Cancelled, BaseMissing)


class Handover:
    """The handler of the inbox, which imports one source at a time, in the order in which they settled."""

    def __init__(
        self,
        known: KnownSources,
        connect: Callable[[], Client],
        *,
        retry_s: float,
        private: bool = False,
        on_remove: str = "keep",
    ) -> None:
        self._known = known
        self._connect = connect
        self._retry_s = retry_s
        self._private = private
        self._on_remove = on_remove
        self._queue: dict[str, Item] = {}
        self._told: dict[str, str] = {}
        self._waiting: Sequence[str] = ()
        self._wake = asyncio.Event()

    def is_known(self, item: Item) -> bool:
        return self._known.holds(str(item.path), item.fingerprint)

    async def settled(self, item: Item) -> None:
        self._queue[str(item.path)] = item
        self._wake.set()

    async def removed(self, item: Item) -> None:
        self._queue.pop(str(item.path), None)
        self._known.drop(str(item.path))
        if self._on_remove == "remove":
            try:
                await asyncio.to_thread(self._remove, item.name)
            except FlashdError as error:
                log.warning("%s is kept as a model: %s", item.name, error)

    def displaced(self, item: Item) -> None:
        self._queue.pop(str(item.path), None)
        self._known.drop(str(item.path))

    def waiting(self, items: Sequence[Item]) -> None:
        lines = [f"{item.name}: {item.state}{f', {item.detail}' if item.detail else ''}" for item in items]
        for line in lines:
            if line not in self._waiting:
                log.info("%s", line)
        self._waiting = lines

    async def run(self) -> None:
        """Imports settled sources until cancelled."""
        while True:
            self._wake.clear()
            for path, item in list(self._queue.items()):
                if self._queue.get(path) == item and await self._hand_over(item) and self._queue.get(path) == item:
                    del self._queue[path]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._retry_s if self._queue else None)

    async def _hand_over(self, item: Item) -> bool:
        """Imports an item. Returns True if it is handled, in success or failure."""
        try:
            await asyncio.to_thread(self._import, item)
        except _LATER as error:
            if self._told.get(item.name) != str(error):  # logged once, not at every attempt
                self._told[item.name] = str(error)
                log.warning("%s has to wait: %s", item.name, error)
            return False
        except (InvalidSource, InvalidArgument, AlreadyExists) as error:
            log.error("%s does not become a model: %s", item.name, error)
        except FlashdError as error:
            log.error("%s could not be handed over: %s", item.name, error)
        self._told.pop(item.name, None)
        self._known.add(str(item.path), item.fingerprint)
        return True

    def _import(self, item: Item) -> None:
        with self._connect() as connected:
            is_ours = _is_ours(connected, item.name)
            private = True if self._private and not is_ours else None  # later versions follow `flash private`
            model = connected.import_(item.path, item.name, replace=is_ours, private=private)
        log.info("%s is a model: %s", model.name, format_bytes(model.size_bytes))

    def _remove(self, name: str) -> None:
        with self._connect() as connected:
            if _is_ours(connected, name):
                connected.remove(name)


def _is_ours(connected: Client, name: str) -> bool:
    """Tells whether this user made the model, because an inbox must not replace another user's model."""
    try:
        model = connected.model(name)
    except NotFound:
        return False
    uid = os.getuid()
    return model.name == name and (model.owner_uid, model.source) == (uid, f"imported by user {uid}")


async def run(handover: Handover, inbox: Inbox, stop: asyncio.Event) -> None:
    """Watches the folder and imports sources until `stop`."""
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
        prog="flashd-inbox", description="Imports sources from your models folder into the machine's flashd."
    )
    described.add_argument("--bus", metavar="session|system|ADDRESS", default="system", help="the bus of flashd")
    described.add_argument("--models-dir", type=Path, metavar="FOLDER", help="the folder to watch, by default ~/models")
    described.add_argument("--state-dir", type=Path, metavar="FOLDER", help="folder for the list of imported sources")
    described.add_argument(
        "--retry-s", type=float, default=30.0, metavar="SECONDS", help="interval of retries in seconds"
    )
    described.add_argument("--version", action="version", version=f"flashd-inbox {__version__}")
    return described


async def _until_signalled(options: argparse.Namespace) -> None:
    paths = default_paths(Scope.USER)
    given = {"state": options.state_dir, "models": options.models_dir}
    paths = dataclasses.replace(paths, **{name: path.absolute() for name, path in given.items() if path is not None})
    settings = loading.load(paths).inbox
    folders = (paths.models,) if options.models_dir is not None else settings.folders
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    handover = Handover(
        KnownSources(paths.state / "handed-over.toml", "sources may be handed over again"),
        lambda: client.connect(options.bus, interactive=False),
        retry_s=options.retry_s,
        private=settings.private,
        on_remove=settings.on_remove,
    )
    inbox = Inbox(folders, handover, settle_s=settings.settle_s, rescan_s=settings.rescan_s)
    await run(handover, inbox, stop)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(LegibleFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        asyncio.run(_until_signalled(options))
    except FlashdError as error:
        print(f"flashd-inbox: {error}".replace("\n", "\n              "), file=sys.stderr)
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":
    main()
