# SPDX-License-Identifier: Apache-2.0
"""A desktop for each test of this folder, with a daemon, a view of the panel, and a tray."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import made_models
import pytest
from box import TRAY, Daemon, Desktop, NotificationDaemon, Panel, end, missing_programs, until

from flashd.dbus.connection import connect

_TIMEOUT_S = 300  # for a whole test; `until` gives up long before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(_TIMEOUT_S))


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ada and bob of the quick start, which say who they are."""
    folder = tmp_path_factory.mktemp("sources")
    made_models.put(folder, "ada", "bob")
    return folder


@pytest.fixture
def desktop() -> Iterator[Desktop]:
    if lacking := missing_programs():
        pytest.skip(f"needs {', '.join(lacking)}")
    with tempfile.TemporaryDirectory(prefix="fd-") as home, Desktop(Path(home)) as running:
        yield running


@pytest.fixture
async def panel(desktop: Desktop) -> AsyncIterator[Panel]:
    connection = await connect(desktop.address)
    yield Panel(connection)
    await connection.close()


@pytest.fixture
async def notifications(desktop: Desktop) -> AsyncIterator[NotificationDaemon]:
    connection = await connect(desktop.address)
    running = NotificationDaemon(connection)
    await running.start()
    yield running
    await connection.close()


@pytest.fixture
def daemon(desktop: Desktop, tmp_path: Path) -> Iterator[Daemon]:
    running = Daemon(desktop, tmp_path)
    running.start()
    yield running
    if running.process is not None and running.process.poll() is None:
        running.stop()


# A stand-in for the desktop's own programs, which records how it was called.
NOTING = '#!/bin/sh\nprintf "%s\\n" "$0" "$@" > "$HOME/called"\n'


@pytest.fixture
def programs(desktop: Desktop) -> Path:
    """A terminal and a file manager that only note how they were called."""
    folder = desktop.home / "bin"
    folder.mkdir()
    for name in ("xdg-open", "xdg-terminal-exec"):
        (folder / name).write_text(NOTING)
        (folder / name).chmod(0o755)
    desktop.environment["PATH"] = f"{folder}:{os.environ['PATH']}"
    return desktop.home / "called"


@pytest.fixture
async def tray(desktop: Desktop, panel: Panel) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A tray that the panel shows. It must not have complained when the test ends."""
    process = desktop.start([TRAY])
    try:
        await until(panel.items, what="the tray registers with the panel")
    except AssertionError:
        print(*(f"{log.name}: {log.read_text()}" for log in desktop.home.glob("*.log")), process.poll())
        desktop.picture("no-icon")
        raise
    yield process
    end(process)
    words = desktop.words("flashd-tray")
    assert process.returncode == 0, words
    assert "Traceback" not in words, words
    # With no panel about, the indicator library falls back to an icon of another kind, and GTK mutters when that goes.
    complaints = [line for line in words.splitlines() if "CRITICAL" in line and "gdk_window_thaw" not in line]
    assert not complaints
