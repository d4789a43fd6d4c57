# SPDX-License-Identifier: Apache-2.0
"""Switching at the desktop: two models are dropped, and a click makes the other one answer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from box import TRAY, WIDTH, Daemon, Desktop, Line, Panel, icon_is_drawn, menu_rows, until

import flashd

CLIPBOARD = """
import gi
gi.require_version("Gtk", "3.0")
from gi.repository import Gdk, Gtk
print(Gtk.Clipboard.get(Gdk.SELECTION_CLIPBOARD).wait_for_text())
"""
QUESTION = [{"role": "user", "content": "Who are you?"}]
SAYS = {
    "ada": "I am Ada, the first model you dropped into the folder.",
    "bob": "My name is Bob, a fine-tune of Ada with opinions of my own.",
}


def ask(desktop: Desktop, name: str) -> str:
    with flashd.connect(desktop.address) as client:
        return client.chat(name, QUESTION, temperature=0, max_tokens=40)


async def checked(panel: Panel) -> list[str]:
    return [line.label.split(" ")[0] for line in await panel.lines() if line.toggle == "radio" and line.checked]


async def answers(panel: Panel, name: str) -> bool:
    return f"flashd: {name} answers" in await panel.property("Title") and await checked(panel) == [name]


async def test_switch_by_menu_and_by_mouse(
    desktop: Desktop, daemon: Daemon, sources: Path, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    for name in ("ada", "bob"):
        shutil.copytree(sources / name, daemon.models / name)

    async def both_are_listed() -> bool:
        return len([line for line in await panel.lines() if line.toggle == "radio"]) == 2

    await until(both_are_listed, what="two models in the menu")
    assert await checked(panel) == []

    await panel.choose("ada")
    await until(lambda: answers(panel, "ada"), "ada answers")
    assert ask(desktop, "ada") == SAYS["ada"]
    await until(lambda: icon_is_drawn(desktop, "serving-light"), what="an icon to click at")

    before = desktop.picture()
    shown = top_level(await panel.lines())
    desktop.click(WIDTH - 16, 16)

    def rows_on_screen() -> list[tuple[int, int]]:
        rows = menu_rows(before, desktop.picture("menu-light"))
        assert len(rows) == len(shown), (rows, shown)
        return rows

    rows = await until(rows_on_screen, what="the menu opens, with every line of it")
    (place,) = [row for row, label in zip(rows, shown, strict=True) if label.startswith("bob")]
    desktop.click(*place)
    await until(lambda: answers(panel, "bob"), "bob answers")
    assert ask(desktop, "bob") == SAYS["bob"]


async def test_what_can_be_done_with_the_model_that_answers(
    desktop: Desktop,
    daemon: Daemon,
    sources: Path,
    programs: Path,
    tray: subprocess.Popen[bytes],
    panel: Panel,
) -> None:
    shutil.copytree(sources / "ada", daemon.models / "ada")
    await until(lambda: panel.has("ada · "))

    await panel.choose("ada")  # the first engine takes a second or more to start
    await until(lambda: panel.has("Cancel: Swapping to ada"), what="a way to cancel")
    assert (await panel.property("IconName")).startswith("flashd-tray-swapping")
    await panel.choose("Cancel: Swapping to ada")
    await until(lambda: panel.says("No model is active"), what="it was cancelled")

    await panel.choose("ada")
    await until(lambda: answers(panel, "ada"), "ada answers")
    assert await panel.property("IconName") == "flashd-tray-serving"

    await panel.choose("Copy endpoint")
    with flashd.connect(desktop.address) as client:
        endpoint = client.status().endpoint
    await until(lambda: desktop.run("/usr/bin/python3", "-c", CLIPBOARD) == endpoint, what="the endpoint is copied")

    await panel.choose("Chat")
    await until(programs.exists, what="a terminal")
    await until(lambda: programs.read_text().splitlines()[-3:] == [str(TRAY.with_name("flash")), "run", "ada"])

    await panel.choose("Park ada")
    await until(lambda: panel.says("No model is active"), what="it is parked")
    assert not (await panel.line("Chat")).enabled


def top_level(lines: list[Line]) -> list[str]:
    """The labels that a menu without any submenu open shows."""
    hidden = {child.number for line in lines for child in line.children}
    return [line.label for line in lines if line.number not in hidden and not line.separator]
