# SPDX-License-Identifier: Apache-2.0
"""Events in the months that a tray runs: daemons, panels and buses come and go, and users click meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from box import PATIENCE_S, TRAY, WATCHER, Daemon, Desktop, Panel, end, make_unsupported, until
from dbus_next import Variant

import flashd
from flashd.dbus.connection import Received, Reply
from flashd.dbus.private_bus import PrivateBus
from flashd.errors import NotFound

MEMORY_BYTES = 60 * 10**6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_follows_a_daemon_that_restarts(
    daemon: Daemon, tray: subprocess.Popen[bytes], panel: Panel, number: int
) -> None:
    for _ in range(2):
        await until(lambda: panel.says("No model is active"), what="the daemon is seen")
        daemon.stop(number)
        await until(lambda: panel.says("flashd is not running"), what="its end is seen")
        assert await panel.has("Start flashd")
        daemon.start()
    await until(lambda: panel.says("No model is active"), what="the daemon is seen again")
    assert not await panel.has("Start flashd")


async def test_registers_again_with_a_panel_that_restarts(
    desktop: Desktop, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    for _ in range(2):
        await panel.restart(desktop)
        await until(lambda: panel.has("Quit"), what="the icon is in the new panel")
        assert len(await panel.items()) == 1


async def test_asks_again_where_the_panel_was_not_ready(desktop: Desktop, panel: Panel) -> None:
    """At login all begin together: a panel that has its name already may refuse whoever comes before the rest is up."""
    await panel.leave(desktop)
    asked: list[str] = []
    listed: list[str] = []
    looked_at: list[str] = []

    async def answer(call: Received) -> Reply:
        if call.member == "RegisterStatusNotifierItem":
            asked.append(call.sender)
            if len(asked) == 1:
                raise NotFound("no object yet")
            listed.append(f"{call.sender}/x")
            return Reply()
        if call.member == "Get":
            looked_at[:] = listed
            return Reply("v", (Variant("as", listed),))
        return Reply("a{sv}", ({"IsStatusNotifierHostRegistered": Variant("b", True)},))

    panel.connection.serve(answer)
    await panel.connection.own(WATCHER)
    desktop.start([TRAY])
    await until(lambda: looked_at, what="it has seen that a second try was heard")
    assert len(asked) == 2


async def test_outlives_the_bus_that_the_daemon_is_on(desktop: Desktop, panel: Panel, tmp_path: Path) -> None:
    folder = desktop.home / "elsewhere"
    folder.mkdir()
    address = f"unix:path={folder}/bus"
    tray = desktop.start([TRAY, "--bus", address])
    daemon = Daemon(desktop, tmp_path)
    for _ in range(2):
        await until(panel.items)
        await until(lambda: panel.says("flashd is not running"))
        with PrivateBus(folder) as bus:
            command = [address if word == "session" else word for word in daemon.command()]
            process = desktop.start(command)
            await until(lambda: panel.says("No model is active"), what="the daemon on the other bus")
            os.kill(bus.pid, signal.SIGKILL)
            await until(lambda: panel.says("flashd is not running"), what="its bus has gone")
            end(process)
    end(tray)
    assert "Traceback" not in desktop.words("flashd-tray")


async def test_sees_what_happened_while_it_slept(
    desktop: Desktop, daemon: Daemon, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    await until(lambda: panel.says("No model is active"))
    tray.send_signal(signal.SIGSTOP)
    daemon.stop()
    make_unsupported(daemon.models / "newcomer")
    daemon.start()
    await until(lambda: _is_reachable(desktop))
    tray.send_signal(signal.SIGCONT)
    await until(lambda: panel.has("newcomer"), what="what the new daemon shows")


async def test_shows_a_window_where_no_panel_would_show_an_icon(desktop: Desktop, panel: Panel) -> None:
    """To who has clicked, which desktops mark; at login it stays silent, as the next test sees."""
    await panel.leave(desktop)
    desktop.start([TRAY], DESKTOP_STARTUP_ID="menu-1-box-tray-0_TIME1")
    await until(lambda: desktop.windows("flashd: find a model"), what="something to be seen")


async def test_a_second_tray_raises_the_first(desktop: Desktop, tray: subprocess.Popen[bytes], panel: Panel) -> None:
    assert not desktop.windows("flashd: find a model")
    second = subprocess.run(
        [TRAY], env=desktop.environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (second.returncode, second.stderr) == (0, "")
    await until(lambda: desktop.windows("flashd: find a model"), what="the first shows that it is there")
    assert len(await panel.items()) == 1
    (window,) = desktop.windows("flashd: find a model")
    await panel.choose("About flashd")
    (about,) = await until(lambda: desktop.windows("About flashd"))
    await until(lambda: desktop.active_window() == about, what="another window in front")
    clicked_at = int(time.monotonic() * 1000)  # the X server's clock, which goes on where this id says when
    desktop.run(TRAY, DESKTOP_STARTUP_ID=f"menu-1-box-tray-0_TIME{clicked_at}")
    await until(lambda: desktop.active_window() == window, what="it comes to the front again")
    assert desktop.windows("flashd: find a model") == [window]


async def test_the_window_that_a_second_tray_raises_starts_the_daemon(
    desktop: Desktop, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    """Where a panel shows no icons, the menu entry is all there is."""
    desktop.run(TRAY)
    (window,) = await until(lambda: desktop.windows("flashd: find a model"))
    desktop.picture("finder-away")
    desktop.run("xdotool", "windowfocus", "--sync", window, "key", "Return")
    await until(lambda: panel.says("No model is active"), what="the daemon runs")
    with flashd.connect(desktop.address) as client:
        client.stop()


async def test_ends_with_its_session(desktop: Desktop, panel: Panel) -> None:
    tray = desktop.start([TRAY])
    await until(panel.items)
    folder = Path(await panel.property("IconThemePath"))
    end(desktop.bus)
    tray.wait(timeout=PATIENCE_S)
    await until(lambda: not folder.exists(), what="nothing of it is left")
    assert "Traceback" not in desktop.words("flashd-tray")


async def test_starts_the_daemon(desktop: Desktop, tray: subprocess.Popen[bytes], panel: Panel) -> None:
    await until(lambda: panel.has("Start flashd"))
    await panel.choose("Start flashd")
    await until(lambda: panel.says("No model is active"), what="the daemon runs")
    with flashd.connect(desktop.address) as client:
        client.stop()
    await until(lambda: panel.has("Start flashd"))


async def test_explains_why_the_daemon_does_not_start(
    desktop: Desktop, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    (desktop.home / "config" / "flashd").mkdir()
    (desktop.home / "config" / "flashd" / "flashd.toml").write_text("[stoer]\n")
    await until(lambda: panel.has("Start flashd"))
    await panel.choose("Start flashd")
    await until(lambda: desktop.windows("flashd"), what="a window with the reason")
    desktop.picture("error-window")


async def test_stays_small(desktop: Desktop, daemon: Daemon, tray: subprocess.Popen[bytes], panel: Panel) -> None:
    """Its share: what it has in common with every program of the desktop, GTK first of all, counts in part.

    How soon it is there, tests/bench/tray.py measures.
    """
    await until(lambda: panel.says("No model is active"))
    rollup = Path(f"/proc/{tray.pid}/smaps_rollup").read_text()
    (share,) = [int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")]
    print(f"{share / 1e6:.0f} MB")
    assert share < MEMORY_BYTES


def _is_reachable(desktop: Desktop) -> bool:
    try:
        with flashd.connect(desktop.address):
            return True
    except flashd.errors.FlashdError:
        return False
