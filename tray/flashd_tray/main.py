# SPDX-License-Identifier: Apache-2.0
"""How is the tray started? `flashd-tray`: builds every part once, and joins them."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import flashd
from flashd.errors import FlashdError
from flashd_tray import menu, shell
from flashd_tray.icon import Theme
from flashd_tray.preferences import PreferencesFile, config_home, system_autostart
from flashd_tray.snapshot import Snapshot
from flashd_tray.watcher import Watcher
from flashd_tray.words import Words


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="flashd-tray", description="Which model answers, and another at a click.")
    described.add_argument("--bus", metavar="BUS", help="where flashd is: session, system or a D-Bus address")
    described.add_argument("--version", action="version", version=f"flashd-tray {flashd.__version__}")
    return described


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    try:
        run(options)
    except FlashdError as error:
        print(f"flashd-tray: {error}".replace("\n", "\n             "), file=sys.stderr)
        raise SystemExit(error.exit_status) from None


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="flashd-tray-") as folder:
        theme, words = Theme(Path(folder)), Words()
        preferences = PreferencesFile(config_home(), system_autostart(), [sys.argv[0]])
        tray = shell.make("flashd", theme.folder, lambda action: print(action, flush=True), lambda: None)

        def show(snapshot: Snapshot) -> None:
            described = menu.describe(snapshot, preferences.read(), words)
            tray.show(theme.icon(snapshot.state, snapshot.progress), menu.tooltip(snapshot, words), described)

        watcher = Watcher(show, connect=lambda: flashd.connect(options.bus))
        watcher.start()
        tray.run()
        watcher.stop()
