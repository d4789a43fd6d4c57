# SPDX-License-Identifier: Apache-2.0
"""How is the daemon started? `flashd`, with what overrides its configuration."""

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

import flashd
from flashd import config, cuda
from flashd.config import Paths, Scope
from flashd.daemon.journal import JournalHandler
from flashd.errors import FlashdError

if TYPE_CHECKING:
    from flashd.daemon.settings import Settings

_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
PRIVATE = "private"  # a bus of our own, in the runtime folder, where there is no other


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="flashd", description="Holds models and switches between them, on D-Bus.")
    described.add_argument("--bus", metavar="session|system|private|ADDRESS", help="the bus to be on")
    described.add_argument("--config", type=Path, metavar="FILE", help="flashd.toml; its drop-ins are in FILE.d/*.toml")
    described.add_argument("--state-dir", type=Path, metavar="FOLDER", help="where the store and the logs lie")
    described.add_argument("--models-dir", type=Path, metavar="FOLDER", help="the folder watched for sources")
    described.add_argument("--runtime-dir", type=Path, metavar="FOLDER", help="where sockets lie")
    described.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"], help="the least that is logged"
    )
    described.add_argument("--version", action="version", version=f"flashd {flashd.__version__}")
    return described


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    _log(options.log_level.upper())
    _raise_descriptor_limit()
    # A GPU takes a third of a second to wake up, which it may do while the rest of us is being imported.
    threading.Thread(target=cuda.wake_up, name="wake GPUs", daemon=True).start()
    from flashd.daemon.settings import Settings

    try:
        settings = Settings(_paths(options), _overrides(options))
        asyncio.run(_until_signalled(settings, _address(options, settings)))
    except FlashdError as error:
        print(f"flashd: {error}".replace("\n", "\n        "), file=sys.stderr)
        raise SystemExit(error.exit_status) from None


async def _until_signalled(settings: Settings, address: str) -> None:
    from flashd.daemon.service import run
    from flashd.private_bus import PrivateBus

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if address != PRIVATE:
        await run(settings, address, stop)
        return
    settings.paths.runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    with PrivateBus(settings.paths.runtime) as private_bus:
        await run(settings, private_bus.address, stop)


def _paths(options: argparse.Namespace) -> Paths:
    """Root without --bus is the machine's daemon; everybody else has their own."""
    is_system = options.bus == "system" or (options.bus is None and os.getuid() == 0)
    paths = config.default_paths(Scope.SYSTEM if is_system else Scope.USER)
    given = {
        "config": options.config,
        "state": options.state_dir,
        "models": options.models_dir,
        "runtime": options.runtime_dir,
    }
    return dataclasses.replace(paths, **{name: path.absolute() for name, path in given.items() if path is not None})


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """What is given here counts, whatever the files say."""
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
    """To the journal with its fields, where standard error is the journal's; else as lines, with the time."""
    is_journal = config.is_journal(sys.stderr.fileno())
    logging.basicConfig(
        level=level, format=_LINE, handlers=[JournalHandler() if is_journal else logging.StreamHandler()]
    )


def _raise_descriptor_limit() -> None:
    """Imports hand us many descriptors, and each resident model keeps one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
