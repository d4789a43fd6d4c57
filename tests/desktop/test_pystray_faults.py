# SPDX-License-Identifier: Apache-2.0
"""Workarounds for the faults of pystray 0.19.5 that users would notice; shell.py and indicator.py list them."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from box import PATIENCE_S, TRAY, Daemon, Desktop, Panel, make_unsupported, until

# Put before everything else by the interpreter itself (site): the machine as it is where a package is not installed.
WITHOUT_INDICATOR = """
import gi
real = gi.require_version
def require_version(namespace, version):
    if "AppIndicator" in namespace:
        raise ValueError(f"Namespace {namespace} not available")
    real(namespace, version)
gi.require_version = require_version
"""
WITHOUT_GTK = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name == "gi":
            raise ModuleNotFoundError("No module named 'gi'", name="gi")
sys.meta_path.insert(0, NotInstalled())
"""


def refusal(desktop: Desktop, *arguments: str, **environment: str) -> str:
    """What the tray says when it cannot start; it must say so at once, and without a traceback."""
    done = subprocess.run(
        [TRAY, *arguments],
        env=desktop.environment | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 13, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        pytest.param(WITHOUT_INDICATOR, "the desktop's indicator library is missing", id="indicator"),
        pytest.param(WITHOUT_GTK, "GTK's binding for Python is not installed", id="gtk"),
    ],
)
def test_says_what_is_missing_and_how_to_get_it(desktop: Desktop, tmp_path: Path, lacking: str, said: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(lacking)
    words = refusal(desktop, PYTHONPATH=str(tmp_path))
    assert said in words
    assert "apt install python3-gi gir1.2-gtk-3.0 gir1.2-ayatanaappindicator3-0.1" in words


def test_says_that_there_is_no_desktop(desktop: Desktop) -> None:
    assert "there is no desktop" in refusal(desktop, DISPLAY="", WAYLAND_DISPLAY="")
    assert "the desktop cannot be reached" in refusal(desktop, DISPLAY=":4711")


def test_says_that_there_is_no_session_bus(desktop: Desktop) -> None:
    words = refusal(desktop, DBUS_SESSION_BUS_ADDRESS=f"unix:path={desktop.home}/nowhere")
    assert "no D-Bus at 'session'" in words


async def test_never_takes_a_backend_without_a_menu(desktop: Desktop, panel: Panel) -> None:
    desktop.start([TRAY], PYSTRAY_BACKEND="xorg")
    await until(panel.items, what="an indicator, whatever the environment asks for")
    assert "Quit" in await panel.labels()


async def test_quits_without_a_notification_daemon(tray: subprocess.Popen[bytes], panel: Panel) -> None:
    """And leaves nothing in the panel; the fixture sees that nothing was complained about."""
    await until(lambda: panel.has("Quit"))
    await panel.choose("Quit")
    assert tray.wait(timeout=PATIENCE_S) == 0
    await until(panel.is_empty, what="the icon goes")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_signals_end_it_properly(tray: subprocess.Popen[bytes], panel: Panel, number: int) -> None:
    folder = Path(await panel.property("IconThemePath"))
    assert folder.exists()
    tray.send_signal(number)
    assert tray.wait(timeout=PATIENCE_S) == 0
    assert not folder.exists()
    await until(panel.is_empty, what="the icon goes")


async def test_items_keep_their_numbers_while_only_words_change(tray: subprocess.Popen[bytes], panel: Panel) -> None:
    await until(lambda: panel.has("Start at login"))
    before = await panel.lines()
    assert not (await panel.line("Start at login")).checked
    await panel.choose("Start at login")
    await until(lambda: panel.is_checked("Start at login"), what="the tick")
    assert [(line.number, line.label) for line in await panel.lines()] == [(b.number, b.label) for b in before]


async def test_a_radio_item_tells_the_truth_after_a_click_that_failed(
    desktop: Desktop, daemon: Daemon, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    make_unsupported(daemon.models / "nobody")
    await until(lambda: panel.has("nobody"), what="the model in the menu")
    await panel.choose("nobody")
    await until(lambda: panel.says("Swapping to nobody failed"), what="the failure in the tooltip")
    await until(lambda: panel.is_unchecked("nobody"), what="no tick at a model that does not answer")
    assert await panel.property("IconName") == "flashd-tray-failed"
    desktop.picture("failed-light")
    await panel.choose("Mark errors as seen")
    await until(lambda: panel.says("No model is active"), what="the failure was seen")


async def test_the_icon_has_a_file_of_each_size(tray: subprocess.Popen[bytes], panel: Panel) -> None:
    folder, name = Path(await panel.property("IconThemePath")), await panel.property("IconName")
    assert name == "flashd-tray-away"
    for size in (16, 22, 24, 32, 48, 64):
        assert (folder / "hicolor" / f"{size}x{size}" / "apps" / f"{name}.png").stat().st_size


async def test_the_icon_says_in_words_what_it_shows(tray: subprocess.Popen[bytes], panel: Panel) -> None:
    await until(lambda: panel.says("flashd is not running"))
    assert await panel.property("IconAccessibleDesc") == "flashd is not running"


async def test_items_keep_their_numbers_while_others_come_and_go(
    daemon: Daemon, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    await until(lambda: panel.says("No model is active"))
    for name in ("one", "two"):
        before = {line.label: line.number for line in await panel.lines() if line.label and not line.separator}
        make_unsupported(daemon.models / name)
        await until(lambda name=name: panel.has(f"{name} · "), what="the model in the menu")
        after = {line.label: line.number for line in await panel.lines() if line.label and not line.separator}
        assert {label: number for label, number in before.items() if label in after} == {
            label: number for label, number in after.items() if label in before
        }
