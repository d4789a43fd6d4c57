# SPDX-License-Identifier: Apache-2.0
"""The program `flashd-tray`: builds all parts once, and connects them."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashd._version import __version__
from flashd.client import client as clients
from flashd.client.client import Client
from flashd.errors import FlashdError
from flashd.legible_log import LegibleFormatter
from flashd_tray import menu, programs, shell, windows
from flashd_tray.actions import Actions
from flashd_tray.desktop_bus import DesktopBus
from flashd_tray.icon import Theme
from flashd_tray.notices import Notice, Notices
from flashd_tray.plain import line, paragraph
from flashd_tray.preferences import PreferencesFile, Topic, config_home, system_autostart
from flashd_tray.snapshot import Snapshot, State
from flashd_tray.watcher import Watcher
from flashd_tray.words import Words


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
        prog="flashd-tray",
        description="Shows the active model in the desktop's panel, and switches to another one at a click.",
    )
    described.add_argument("--bus", metavar="BUS", help="bus of flashd: session, system or a D-Bus address")
    described.add_argument("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
    described.add_argument("--version", action="version", version=f"flashd-tray {__version__}")
    described.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="files or folders to make models from")
    return described


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(LegibleFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=options.log_level.upper(), handlers=[handler])
    words = Words()
    try:
        with DesktopBus() as desktop_bus, tempfile.TemporaryDirectory(prefix="flashd-tray-") as folder:
            tray = Tray(options.bus, desktop_bus, Path(folder), words)
            if desktop_bus.claim(tray.raise_, tray.startup_id):
                tray.run(options.paths)
            elif options.paths:
                tray.actions.import_paths(options.paths)
    except FlashdError as error:
        print(f"flashd-tray: {error}".replace("\n", "\n             "), file=sys.stderr)
        raise SystemExit(error.exit_status) from None


class Tray:
    """The parts of one run. Snapshots come from the watcher's thread, clicks from the main loop."""

    def __init__(self, bus: str | None, desktop_bus: DesktopBus, folder: Path, words: Words) -> None:
        self._words = words
        self._desktop_bus = desktop_bus
        self._theme = Theme(folder)
        self._preferences = PreferencesFile(config_home(), system_autostart(), [own_command()])
        self._lock = threading.Lock()  # the parts below are changed by several threads
        self._snapshot = Snapshot()
        self._dismissed: frozenset[int] = frozenset()
        self._notices = Notices(words)
        self._icon: Any = None
        self.startup_id = shell.startup_id()  # before GTK takes it from the environment

        def connect() -> Client:
            return clients.connect(bus)

        # Checking for the daemon must not start one that the user has stopped; clicks may.
        self._watcher = Watcher(self._changed, connect=lambda: clients.connect(bus, activate=False))
        self.actions = Actions(
            bus=bus,
            connect=connect,
            desktop=self,
            choices=self._preferences,
            snapshot=lambda: self._snapshot,
            on_dismissed=self._dismiss,
            on_chosen=self._show,
            on_started=self._watcher.knock,
            words=words,
        )
        self._finder = windows.Finder(self.actions.do, words)

    def run(self, paths: Sequence[Path]) -> None:
        """Runs until the user quits, or the session ends."""
        self._icon = shell.load().Indicator("flashd", self._theme.folder, self.actions.do, self._no_panel)
        self._later(lambda: windows.begin(self._theme.file(State.SERVING)))
        self._watcher.start()
        if paths:
            threading.Thread(target=self.actions.import_paths, args=(paths,), daemon=True).start()
        try:
            self._icon.run()
        finally:
            self._watcher.stop()

    def raise_(self, startup_id: str) -> None:
        """Shows a window because a second tray was started. Programs cannot open a panel's menu."""
        self._later(lambda: self._finder.show(self._snapshot, startup_id))

    def _no_panel(self) -> None:
        """Shows a window if a person has just started us by a click, but not at login."""
        if self.startup_id:
            self._finder.show(self._snapshot, self.startup_id)

    # -- what actions need of the desktop ------------------------------------------------------------------------------

    def copy(self, text: str) -> None:
        self._later(lambda: windows.copy(text))

    def open_folder(self, folder: Path) -> None:
        programs.start([shutil.which("xdg-open") or "xdg-open", str(folder)])

    def show_error(self, title: str, text: str) -> None:
        if self._icon is None:  # a second instance, which has no main loop
            print(f"flashd-tray: {line(title)}: {paragraph(text)}", file=sys.stderr)
            self._desktop_bus.notify(title, text)
            return
        self._later(lambda: windows.show_error(title, text, self._words))

    def show_about(self, daemon_version: str) -> None:
        icon = self._theme.file(State.SERVING)
        self._later(lambda: windows.show_about(daemon_version, icon, self._words))

    def find(self) -> None:
        self._later(lambda: self._finder.show(self._snapshot))

    def quit(self) -> None:
        self._later(self._icon.stop)

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def _changed(self, snapshot: Snapshot) -> None:
        with self._lock:
            if snapshot.status is None:
                self._dismissed = frozenset()  # the next daemon counts its jobs from one again
            self._snapshot = dataclasses.replace(snapshot, dismissed=self._dismissed)
            notices = self._notices.of(self._snapshot, self._preferences.read())
        self._show()
        for notice in notices:
            self._tell(notice)

    def _dismiss(self) -> None:
        with self._lock:
            self._dismissed |= {job.number for job in self._snapshot.failures}
            self._snapshot = dataclasses.replace(self._snapshot, dismissed=self._dismissed)
        self._show()

    def _show(self) -> None:
        with self._lock:
            snapshot = self._snapshot
        described = menu.describe(snapshot, self._preferences.read(), self._words)
        icon = self._theme.icon(snapshot.state, snapshot.progress)
        self._icon.show(icon, menu.tooltip(snapshot, self._words), described)
        self._later(lambda: self._finder.update(snapshot))

    def _tell(self, notice: Notice) -> None:
        actions = {}
        if notice.action is not None:
            action = notice.action
            actions = {str(action.verb): (notice.action_label, lambda: self.actions.do(action))}
        icon = self._theme.file(State.SERVING if notice.topic in {Topic.READY, Topic.SWAPPED} else State.FAILED)
        self._desktop_bus.notify(notice.title, notice.body, icon=str(icon), actions=actions, replaces=str(notice.topic))

    def _later(self, function: Callable[[], object]) -> None:
        if self._icon is not None:  # somebody who starts us twice at once may ask before there is one
            self._icon.later(function)


def own_command() -> str:
    """Returns the command with which the desktop starts us at login."""
    return str(Path(sys.argv[0]).absolute()) if Path(sys.argv[0]).exists() else "flashd-tray"


if __name__ == "__main__":
    main()
