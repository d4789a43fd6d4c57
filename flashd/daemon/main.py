# SPDX-License-Identifier: Apache-2.0
"""The program `flashd`, and the options that override its configuration."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashd._version import __version__
from flashd.config.environment import is_journal, notify_socket
from flashd.config.paths import Paths, Scope, default_paths
from flashd.daemon.lifecycle.journal import JournalHandler
from flashd.errors import FlashdError
from flashd.io import cuda
from flashd.legible_log import LegibleFormatter

if TYPE_CHECKING:
    from flashd.daemon.lifecycle.ending import Ending
    from flashd.daemon.lifecycle.settings import Settings

_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
PRIVATE = "private"  # a private bus in the runtime folder


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
        prog="flashd", description="Keeps models in memory and switches between them, controlled over D-Bus."
    )
    described.add_argument("--bus", metavar="session|system|private|ADDRESS", help="the bus to connect to")
    described.add_argument("--config", type=Path, metavar="FILE", help="flashd.toml; its drop-ins are in FILE.d/*.toml")
    described.add_argument("--state-dir", type=Path, metavar="FOLDER", help="folder of the store and the logs")
    described.add_argument("--models-dir", type=Path, metavar="FOLDER", help="the folder to watch for sources")
    described.add_argument("--runtime-dir", type=Path, metavar="FOLDER", help="folder of the sockets")
    described.add_argument(
        "--log-level",
        default="info",
        choices=["debug", "info", "warning", "error"],
        help="lowest level of messages to log",
    )
    described.add_argument("--version", action="version", version=f"flashd {__version__}")
    return described


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    _log(options.log_level.upper())
    _raise_descriptor_limit()
    # A GPU takes a third of a second to wake up, so it does that while other modules are imported.
    threading.Thread(target=cuda.wake_up, name="wake GPUs", daemon=True).start()
    from flashd.daemon.lifecycle.settings import Settings

    try:
        settings = Settings(_paths(options), _overrides(options))
        status = asyncio.run(_until_signalled(settings, _address(options, settings)))
    except FlashdError as error:
        print(f"flashd: {error}".replace("\n", "\n        "), file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    raise SystemExit(status)


async def _until_signalled(settings: Settings, address: str) -> int:
    """Runs the daemon and returns the exit status.

    Ctrl-C leaves nothing; SIGTERM leaves engines for the next daemon.
    """
    from flashd.daemon.lifecycle.ending import Ending, How
    from flashd.daemon.service import run

    ending = Ending()
    for number, how in ((signal.SIGTERM, How.LEAVING), (signal.SIGINT, How.FOR_GOOD)):
        asyncio.get_running_loop().add_signal_handler(number, ending.ask, how)
    if address == PRIVATE:
        await _with_bus(settings, ending)
    else:
        await run(settings, address, ending)
    return ending.how.exit_status


async def _with_bus(settings: Settings, ending: Ending) -> None:
    """Runs the daemon on a private bus.

    If a service manager may start the next daemon, the bus outlives this one, so that clients stay connected.
    """
    from flashd.daemon.lifecycle.ending import How
    from flashd.daemon.service import run
    from flashd.daemon.serving.endpoint import make_private, remove_empty
    from flashd.dbus.private_bus import PrivateBus, found

    folder = settings.paths.runtime
    make_private(folder)
    bus = found(folder) or PrivateBus(folder)
    try:
        await run(settings, bus.address, ending)
    except BaseException:
        if isinstance(bus, PrivateBus):
            bus.stop()
            remove_empty(folder)
        raise
    if ending.how is How.FOR_GOOD or notify_socket() is None:
        bus.stop()
        remove_empty(folder)


def _paths(options: argparse.Namespace) -> Paths:
    """Returns the locations of files: the machine's for root without --bus, else the user's own."""
    is_system = options.bus == "system" or (options.bus is None and os.getuid() == 0)
    paths = default_paths(Scope.SYSTEM if is_system else Scope.USER)
    given = {
        "config": options.config,
        "state": options.state_dir,
        "models": options.models_dir,
        "runtime": options.runtime_dir,
    }
    return dataclasses.replace(paths, **{name: path.absolute() for name, path in given.items() if path is not None})


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings from the command line, which override the files."""
    given: dict[str, Any] = {}
    if options.state_dir is not None:
        given["store.path"] = str(options.state_dir.absolute() / "store")
    if options.models_dir is not None:
        given["inbox.folders"] = [str(options.models_dir.absolute())]
    if options.bus is not None:
        given["bus.address"] = options.bus
    return given


def _address(options: argparse.Namespace, settings: Settings) -> str:
    default = "system" if options.bus is None and os.getuid() == 0 else "session"
    return settings.current.bus.address or default


def _log(level: str) -> None:
    """Sets up logging: to the journal with fields if standard error is the journal, else as lines with the time."""
    handler = JournalHandler() if is_journal(sys.stderr.fileno()) else logging.StreamHandler()
    if handler.formatter is None:
        handler.setFormatter(LegibleFormatter(_LINE))
    logging.basicConfig(level=level, handlers=[handler])


def _raise_descriptor_limit() -> None:
    """Raises the limit of descriptors, because imports send many, and each resident model needs one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
