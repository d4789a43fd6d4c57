# SPDX-License-Identifier: Apache-2.0
"""A complete desktop for tests: Xvfb, a session bus, a window manager, xfce4-panel's tray, and a user's actions."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from dbus_next import Variant
from PIL import Image, ImageChops
from safetensors.numpy import save_file

from flashd.dbus.connection import Connection, Received, Reply, plain
from flashd.dbus.wire import DBUS, DBUS_PATH, PROPERTIES
from flashd.errors import FlashdError, Internal

ROOT = Path(__file__).parents[2]
TRAY = ROOT / "build" / "tray" / "bin" / "flashd-tray"
SHOTS = ROOT / "build" / "desktop-shots"
WATCHER = "org.kde.StatusNotifierWatcher"
ITEM = "org.kde.StatusNotifierItem"
MENU = "com.canonical.dbusmenu"
NOTIFICATIONS = "org.freedesktop.Notifications"
APPLICATION = "org.flashd1.Tray"
PROGRAMS = ("Xvfb", "xfce4-panel", "openbox", "xdotool", "import", "xfconf-query", "gio", "dbus-daemon")
WIDTH, HEIGHT = 1000, 700
PANEL_HEIGHT = 32
PATIENCE_S = 60.0  # more than anything takes on two slow and busy cores, so that only defects wait so long

PANEL = """<?xml version="1.0" encoding="UTF-8"?>
<channel name="xfce4-panel" version="1.0">
  <property name="configver" type="int" value="2"/>
  <property name="panels" type="array"><value type="int" value="1"/>
    <property name="panel-1" type="empty">
      <property name="position" type="string" value="p=6;x=0;y=0"/>
      <property name="length" type="uint" value="100"/>
      <property name="position-locked" type="bool" value="true"/>
      <property name="size" type="uint" value="32"/>
      <property name="plugin-ids" type="array"><value type="int" value="1"/><value type="int" value="2"/></property>
    </property></property>
  <property name="plugins" type="empty">
    <property name="plugin-1" type="string" value="separator">
      <property name="expand" type="bool" value="true"/><property name="style" type="uint" value="0"/></property>
    <property name="plugin-2" type="string" value="systray"><property name="square-icons" type="bool" value="true"/>
    </property>
  </property>
</channel>
"""


@functools.cache
def missing_programs() -> list[str]:
    """Waits for the tray's environment where tests/run is making it."""
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    is_set_up = subprocess.run([ROOT / "packaging/tray", "--check"], capture_output=True, check=False).returncode == 0
    return lacking if is_set_up else [*lacking, "packaging/tray --install-only"]


class Desktop:
    """One session of one person; ends, with all that was started in it, with its context."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._ends = ExitStack()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "FLASHD_", "DBUS_"))},
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_RUNTIME_DIR": str(home / "run"),
            "XDG_STATE_HOME": str(home / "state"),
            "NO_AT_BRIDGE": "1",
            "LANGUAGE": "",
            "LANG": "C.UTF-8",
            "LC_ALL": "C.UTF-8",
        }

    @property
    def address(self) -> str:
        return self.environment["DBUS_SESSION_BUS_ADDRESS"]

    def __enter__(self) -> Desktop:
        (self.home / "run").mkdir(mode=0o700)
        self.set_up_panel()
        self.set_up_gtk()
        display, _ = self._printed(
            ["Xvfb", "-displayfd", "1", "-screen", "0", f"{WIDTH}x{HEIGHT}x24", "-nolisten", "tcp"]
        )
        self.environment["DISPLAY"] = f":{display}"
        self.environment["DBUS_SESSION_BUS_ADDRESS"], self.bus = self._printed(
            ["dbus-daemon", "--session", "--nofork", "--nopidfile", "--print-address=1"]
        )
        self.start(["openbox"])
        self.start_panel()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()
        # Programs that others start for us, such as file managers, know only this home.
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # ended meanwhile, or owned by another user
                if f"HOME={self.home}".encode() in environment.read_bytes().split(b"\0"):
                    os.kill(int(environment.parent.name), signal.SIGTERM)

    def set_up_panel(self) -> None:
        folder = self.home / "config" / "xfce4" / "xfconf" / "xfce-perchannel-xml"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "xfce4-panel.xml").write_text(PANEL)

    def set_up_gtk(self) -> None:
        """Pictures show what is there, and not how it fades in."""
        folder = self.home / "config" / "gtk-3.0"
        folder.mkdir(parents=True)
        (folder / "settings.ini").write_text("[Settings]\ngtk-enable-animations=0\ngtk-cursor-blink=0\n")

    def start(self, command: list[str | Path], **environment: str) -> subprocess.Popen[bytes]:
        """A program of this session; its words go to a file named after it."""
        with (self.home / f"{Path(command[0]).name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment | environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._ends.callback(end, process)
        return process

    def words(self, program: str) -> str:
        """What a program has said so far."""
        return (self.home / f"{program}.log").read_text()

    def run(self, *command: str | Path, **environment: str) -> str:
        done = subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, check=True, timeout=PATIENCE_S
        )
        return done.stdout.strip()

    def start_panel(self) -> None:
        self.panel = self.start(["xfce4-panel", "--disable-wm-check"])

    def picture(self, name: str = "", *, window: str = "root") -> Image.Image:
        """The whole screen, or a window without its frame; kept among the artefacts under a name."""
        path = SHOTS / f"{name}.png" if name else self.home / "screen.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.run("import", "-window", window, path)
        with Image.open(path) as image:
            return image.convert("RGB")

    def click(self, x: int, y: int, button: int = 1) -> None:
        self.run("xdotool", "mousemove", str(x), str(y), "click", str(button))

    def windows(self, title: str) -> list[str]:
        """Visible windows whose title is this one."""
        return self._asked("search", "--onlyvisible", "--name", f"^{title}$").split()

    def active_window(self) -> str:
        """The one that has the keyboard; nothing where none has."""
        return self._asked("getactivewindow")

    def _asked(self, *words: str) -> str:
        """What xdotool says; it fails where there is nothing to tell."""
        done = subprocess.run(
            ["xdotool", *words],
            env=self.environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        return done.stdout.strip()

    def _printed(self, command: list[str]) -> tuple[str, subprocess.Popen[bytes]]:
        """Starts a program that prints one line when it is ready: that line, and the program."""
        process = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._ends.callback(end, process)
        assert process.stdout is not None
        with process.stdout as printed:
            return printed.readline().decode().strip(), process


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True, slots=True)
class Line:
    """An item of the menu, as the panel was told."""

    number: int
    label: str
    enabled: bool
    toggle: str
    checked: bool
    separator: bool
    children: tuple[Line, ...]

    def all(self) -> Iterator[Line]:
        yield self
        for child in self.children:
            yield from child.all()


@dataclass(slots=True)
class Panel:
    """The tray as the panel sees it: the first item that registered.

    What is asked of a panel or a tray that is not there raises FlashdError or AssertionError; `until` asks again.
    """

    connection: Connection

    async def items(self) -> list[str]:
        found: list[str] = await self._get(WATCHER, "/StatusNotifierWatcher", WATCHER, "RegisteredStatusNotifierItems")
        return found

    async def is_ready(self) -> bool:
        reply = await self.connection.call(DBUS, DBUS_PATH, DBUS, "NameHasOwner", "s", (WATCHER,))
        return bool(reply.body[0])

    async def is_gone(self) -> bool:
        return not await self.is_ready()

    async def leave(self, desktop: Desktop) -> None:
        """Its tray is a process of its own, which may go on answering for a moment when the panel has ended."""
        end(desktop.panel)
        await until(self.is_gone, what="nobody stands in for the panel that ended")

    async def restart(self, desktop: Desktop) -> None:
        await self.leave(desktop)
        desktop.start_panel()
        await until(self.is_ready, what="the new panel")

    async def property(self, name: str) -> Any:
        destination, path = await self._item()
        return await self._get(destination, path, ITEM, name)

    async def lines(self) -> list[Line]:
        """Every item of the menu, at any depth, in order."""
        destination, path = await self._item()
        menu = await self._get(destination, path, ITEM, "Menu")
        reply = await self.connection.call(destination, menu, MENU, "GetLayout", "iias", (0, -1, []))
        return list(_line(plain(reply.body[1])).all())[1:]

    async def labels(self) -> list[str]:
        return [line.label for line in await self.lines() if not line.separator]

    async def line(self, beginning: str) -> Line:
        found = [line for line in await self.lines() if line.label.startswith(beginning)]
        assert found, f"nothing begins with {beginning!r}: {await self.labels()}"
        return found[0]

    async def choose(self, beginning: str) -> None:
        """Clicks an item as a panel does: by the menu protocol."""
        await self.choose_line(await self.line(beginning))

    async def choose_line(self, line: Line) -> None:
        destination, path = await self._item()
        menu = await self._get(destination, path, ITEM, "Menu")
        event = (line.number, "clicked", Variant("i", 0), int(time.time()) & 0xFFFFFFFF)
        with contextlib.suppress(Internal):  # NoReply: a tray that quits at a click may be gone before it answers
            await self.connection.call(destination, menu, MENU, "Event", "isvu", event)

    async def has(self, beginning: str) -> bool:
        return any(label.startswith(beginning) for label in await self.labels())

    async def says(self, words: str) -> bool:
        """Whether the tooltip does."""
        return words in await self.property("Title")

    async def is_checked(self, beginning: str) -> bool:
        return (await self.line(beginning)).checked

    async def is_unchecked(self, beginning: str) -> bool:
        return not await self.is_checked(beginning)

    async def is_empty(self) -> bool:
        return not await self.items()

    async def _item(self) -> tuple[str, str]:
        items = await self.items()
        assert items, "there is no icon in the panel"
        destination, _, path = items[0].partition("/")
        return destination, "/" + path

    async def _get(self, destination: str, path: str, interface: str, name: str) -> Any:
        reply = await self.connection.call(destination, path, PROPERTIES, "Get", "ss", (interface, name))
        return plain(reply.body[0])


def _line(node: list[Any]) -> Line:
    number, properties, children = node
    return Line(
        number,
        properties.get("label", "").replace("__", "\0").replace("_", "").replace("\0", "_"),
        properties.get("enabled", True),
        properties.get("toggle-type", ""),
        properties.get("toggle-state", 0) == 1,
        properties.get("type") == "separator",
        tuple(_line(child) for child in children),
    )


@dataclass(slots=True)
class NotificationDaemon:
    """What a desktop has for notifications, made of the specification's four methods."""

    connection: Connection
    shown: list[dict[str, Any]] = field(default_factory=list)

    async def start(self) -> None:
        self.connection.serve(self._answer)
        await self.connection.own(NOTIFICATIONS)

    async def click(self, number: int, key: str) -> None:
        """When the tray has had time to read the number of what it has shown: nobody clicks sooner."""
        with contextlib.suppress(FlashdError):
            await self.connection.call(APPLICATION, "/org/flashd1/Tray", "org.freedesktop.DBus.Peer", "Ping")
        self.connection.emit("/org/freedesktop/Notifications", NOTIFICATIONS, "ActionInvoked", "us", [number, key])

    async def _answer(self, call: Received) -> Reply:
        assert call.member == "Notify", call
        _, replaces, icon, title, body, actions, hints, _ = call.body
        number = replaces or len(self.shown) + 1
        self.shown.append(
            {"number": number, "title": title, "body": body, "actions": actions, "icon": icon, "hints": plain(hints)}
        )
        return Reply("u", (number,))


class Daemon:
    """The real flashd on the session's bus."""

    def __init__(self, desktop: Desktop, root: Path) -> None:
        self._desktop = desktop
        self.root = root
        self.models = root / "models"
        self.models.mkdir()
        self.config = root / "flashd.toml"
        self.config.write_text(
            "[inbox]\nsettle_s = 0.3\nrescan_s = 1.0\n[engines]\nwarm_new = false\n[engines.torch]\nthreads = 1\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str | Path]:
        return [
            *(sys.executable, "-m", "flashd.daemon.main", "--bus", "session", "--config", self.config),
            *("--state-dir", self.root / "state", "--models-dir", self.models),
            *("--runtime-dir", self._desktop.home / "run" / "flashd"),
        ]

    def start(self) -> None:
        self.process = self._desktop.start(self.command())

    def stop(self, number: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(timeout=PATIENCE_S)


def icon_corner(picture: Image.Image) -> Image.Image:
    """Where the panel shows its only icon."""
    return picture.crop((WIDTH - PANEL_HEIGHT, 0, WIDTH, PANEL_HEIGHT - 2))


def icon_is_drawn(desktop: Desktop, shot: str = "") -> bool:
    """And stands out from the panel."""
    low, high = icon_corner(desktop.picture(shot)).convert("L").getextrema()
    return high - low > 60


def menu_rows(before: Image.Image, after: Image.Image) -> list[tuple[int, int]]:
    """Where to click for each line of text of a menu that opened between two pictures, from its top to its end."""
    box = ImageChops.difference(before, after).getbbox()
    assert box is not None, "nothing changed on the screen"
    left, top, right, bottom = box
    top = max(top, PANEL_HEIGHT + 1)  # the icon in the panel is highlighted as well
    # A column left of submenu arrows; the frame of the menu and its separators are of one shade over all its width.
    strip = after.convert("L").crop((left + 4, top + 2, right - 4, bottom - 2))
    return [((left + right) // 2, top + 2 + (first + last) // 2) for first, last in rows_of_text(strip)]


def rows_of_text(strip: Image.Image) -> list[tuple[int, int]]:
    """From where to where each line of text goes, in a picture of grey tones with one background."""
    inked = []
    for y in range(strip.height):
        low, high = strip.crop((0, y, strip.width, y + 1)).getextrema()
        inked.append(high - low > 60)
    rows, start = [], None
    for y, ink in enumerate([*inked, False]):
        if ink and start is None:
            start = y
        elif not ink and start is not None:
            rows.append((start, y))
            start = None
    return [(first, last) for first, last in rows if last - first >= 5]


async def until(condition: Callable[[], Any], what: str = "") -> Any:
    """What the condition, a coroutine function or not, returned when it held; fails after a while.

    While what it asks is not there (a menu that is about to change, a panel on its way) it does not hold.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        why: Exception | None = None
        try:
            holds = condition()
            if asyncio.iscoroutine(holds):
                holds = await holds
            if holds:
                return holds
        except (AssertionError, FlashdError) as error:
            why = error
        if time.monotonic() >= deadline:
            raise AssertionError(f"it did not come to pass: {what}") from why
        await asyncio.sleep(0.05)


def make_unsupported(folder: Path) -> None:
    """A model that converts, and that no engine can run."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["TinyForNothing"], "model_type": "tiny"}))
    save_file({"weight": np.arange(3000, dtype=np.float32)}, folder / "model.safetensors")


def tour_environment() -> Mapping[str, str]:
    # One thread: on a busy machine more only wait for each other.
    return {**os.environ, "PYTHONPATH": str(ROOT / "packaging" / "tour"), "OMP_NUM_THREADS": "1"}
