# SPDX-License-Identifier: Apache-2.0
"""A hundred models stay usable: the menu fits on the screen, typing finds one, and any panel shows the icon."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator

import pytest
from box import HEIGHT, PANEL_HEIGHT, TRAY, Daemon, Desktop, Panel, icon_is_drawn, make_unsupported, rows_of_text, until

import flashd


@pytest.fixture
async def hundred(
    desktop: Desktop, daemon: Daemon, tray: subprocess.Popen[bytes], panel: Panel
) -> AsyncIterator[Panel]:
    source = desktop.home / "source"
    make_unsupported(source)
    await until(lambda: panel.says("No model is active"))
    with flashd.connect(desktop.address) as client:
        for number in range(100):
            client.begin_import(source, f"{'acme' if number % 2 else 'lab'}/tune-{number:02}")
    await until(lambda: panel.has("88 more models"), what="all of them")
    await until(lambda: panel.says("No model is active"), what="nothing is under way")
    yield panel


async def test_a_hundred_models_stay_usable(desktop: Desktop, hundred: Panel) -> None:
    lines = await hundred.lines()
    assert len([line for line in lines if line.toggle == "radio"]) == 100
    more = await hundred.line("88 more models")
    assert 3 <= len(more.children) <= 8
    assert all(len(group.children) <= 20 for group in more.children)
    below = {child.number for line in lines for child in line.children}
    assert len([line for line in lines if line.number not in below and not line.separator]) * 26 < HEIGHT - PANEL_HEIGHT

    deep = more.children[-1].children[-1]
    await hundred.choose_line(deep)
    name = deep.label.split(" ")[0]
    await until(lambda: hundred.says(f"Swapping to {name} failed"), what="the click reached the model")


async def test_typing_finds_a_model(desktop: Desktop, hundred: Panel) -> None:
    await hundred.choose("Find a model")
    (window,) = await until(lambda: desktop.windows("flashd: find a model"))
    desktop.run("xdotool", "windowfocus", "--sync", window, "type", "--delay", "20", "lab 7")
    await until(lambda: rows_found(desktop, window) == 5, what="lab/tune-70 to 78 and no others")
    desktop.picture("finder")
    desktop.run("xdotool", "key", "Return")
    await until(lambda: hundred.says("Swapping to lab/tune-70 failed"), what="the first that matches")
    assert not desktop.windows("flashd: find a model")


def rows_found(desktop: Desktop, window: str) -> int:
    """How many lines of text stand in the finder's list, which is all of its window but the entry at the top."""
    shown = desktop.picture(window=window).convert("L")
    return len(rows_of_text(shown.crop((12, 50, shown.width - 12, shown.height - 12))))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
async def test_the_icon_is_seen_on_the_panel(desktop: Desktop, panel: Panel, dark: bool) -> None:
    if dark:
        await until(panel.is_ready)
        desktop.run("xfconf-query", "-c", "xfce4-panel", "-p", "/panels/dark-mode", "-n", "-t", "bool", "-s", "true")
        await panel.restart(desktop)
    desktop.start([TRAY])
    shot = f"icon-{'dark' if dark else 'light'}"
    await until(lambda: icon_is_drawn(desktop, shot), what="an icon that stands out")
    background = desktop.picture().getpixel((20, 16))
    assert (max(background) < 100) is dark
