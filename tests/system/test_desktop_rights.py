# SPDX-License-Identifier: Apache-2.0
"""A user without rights clicks in the panel: the desktop's polkit agent asks, and a denial is explained.

The packages of daemon and tray, a real logind session without a seat, Xvfb, xfce4-panel and lxpolkit; the tray is
started by its autostart entry.
"""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Machine, Result, booted, daemon_of, rooted

SHOTS = ROOT / "build" / "desktop-shots"
PACKAGES = (
    *("libglib2.0-bin", "dbus-user-session", "xvfb", "openbox", "xfce4-panel", "lxpolkit", "xdotool", "imagemagick"),
    *("python3-gi", "gir1.2-gtk-3.0", "gir1.2-ayatanaappindicator3-0.1", "python3-pystray", "python3-pil"),
    *("adwaita-icon-theme", "dex"),
)
DISPLAY = "DISPLAY=:9"
SESSION = """#!/bin/sh
export DISPLAY=:9 NO_AT_BRIDGE=1
Xvfb :9 -screen 0 1000x700x24 -nolisten tcp -ac &
until xdotool getmouselocation >/dev/null 2>&1; do sleep 0.1; done
openbox &
xfce4-panel --disable-wm-check &
lxpolkit &
dex --autostart --environment LXDE
wait
"""
# Lists the menu of the panel's only item, or clicks the line that begins with the words given.
CHOOSE = """#!/usr/bin/python3
import sys, time
from gi.repository import Gio, GLib

bus = Gio.bus_get_sync(Gio.BusType.SESSION)
PROPERTIES, WATCHER = "org.freedesktop.DBus.Properties", "org.kde.StatusNotifierWatcher"

def call(name, path, interface, member, arguments):
    return bus.call_sync(name, path, interface, member, arguments, None, 0, 5000, None).unpack()[0:]

def get(name, path, interface, member):
    return call(name, path, PROPERTIES, "Get", GLib.Variant("(ss)", (interface, member)))[0]

def lines(node):
    number, properties, children = node
    yield number, properties.get("label", "").replace("_", "")
    for child in children:
        yield from lines(child)

name, _, path = get(WATCHER, "/StatusNotifierWatcher", WATCHER, "RegisteredStatusNotifierItems")[0].partition("/")
menu = get(name, "/" + path, "org.kde.StatusNotifierItem", "Menu")
_, layout = call(name, menu, "com.canonical.dbusmenu", "GetLayout", GLib.Variant("(iias)", (0, -1, [])))
for number, label in lines(layout):
    if len(sys.argv) == 1:
        print(label)
    elif label.startswith(sys.argv[1]):
        event = GLib.Variant("(isvu)", (number, "clicked", GLib.Variant("i", 0), int(time.time())))
        call(name, menu, "com.canonical.dbusmenu", "Event", event)
        sys.exit(0)
sys.exit(len(sys.argv) > 1)
"""


class Person:
    """gerd, who may do nothing, and what gerd sees and does."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def run(self, *command: str, check: bool = True) -> Result:
        uid = self.machine.run("id", "-u", "gerd").out.strip()
        bus = f"DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/{uid}/bus"
        return self.machine.run("runuser", "-u", "gerd", "--", "env", bus, DISPLAY, *command, check=check)

    def menu(self) -> list[str]:
        return self.run("choose", check=False).out.splitlines()

    def is_shown_the_model(self) -> bool:
        """With its size, wherever its bytes are by now."""
        return any(line.startswith("one · 1.2 MB · ") for line in self.menu())

    def sees(self, title: str) -> bool:
        return self.run("xdotool", "search", "--onlyvisible", "--name", f"^{title}$", check=False).status == 0

    def types(self, *keys: str) -> None:
        self.run("xdotool", *keys)

    def answers(self, password: str) -> None:
        self.machine.until(lambda: self.sees("Authentication"), 40)
        self.run("xdotool", "search", "--onlyvisible", "--name", "^Authentication$", "windowfocus", "--sync")
        self.types("type", password)
        self.types("key", "Return")

    def picture(self, name: str) -> None:
        """Kept among the artefacts. The machine's /tmp is its own, so it comes by way of a home."""
        self.run("import", "-window", "root", f"/home/gerd/{name}.png")
        SHOTS.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.machine.root / "home" / "gerd" / f"{name}.png", SHOTS)
        width, height = struct.unpack(">II", (SHOTS / f"{name}.png").read_bytes()[16:24])
        assert (width, height) == (1000, 700)


def prepare() -> Path:
    """A root with a desktop in it."""
    return rooted(*PACKAGES)


@pytest.fixture(scope="module")
def gerd(tools: None, packages: Path) -> Iterator[Person]:
    with booted(prepare()) as machine:
        for deb in packages.glob("*.deb"):
            shutil.copy(deb, machine.root / "root")
        machine.run("sh", "-c", "dpkg -i /root/flashd_*.deb /root/flashd-tray_*.deb")
        machine.run("useradd", "-m", "gerd")
        machine.run("useradd", "-m", "-G", "sudo", "admin")
        machine.run("sh", "-c", "echo admin:secret | chpasswd")
        for name, text in {"session": SESSION, "choose": CHOOSE}.items():
            (machine.root / "usr/local/bin" / name).write_text(text)
            (machine.root / "usr/local/bin" / name).chmod(0o755)
        machine.make_source("/root/one")
        machine.run("systemctl", "start", "flashd")
        machine.run("flash", "import", "/root/one", "one")
        kind = ("-E", "XDG_SESSION_TYPE=x11", "-E", "XDG_SESSION_CLASS=user", "-E", "LANG=C.UTF-8")
        unit = ("--unit=desktop", "-p", "User=gerd", "-p", "PAMName=login", *kind)
        machine.run("systemd-run", "-q", *unit, "/usr/local/bin/session")
        person = Person(machine)
        machine.until(person.is_shown_the_model)
        machine.until(lambda: "Registered Authentication Agent" in machine.run("journalctl", "-u", "polkit").out)
        yield person
        words = machine.run("journalctl", "-u", "desktop", "--no-pager").out
        assert "Traceback" not in words, words


def files(package: Path) -> set[str]:
    listed = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(listed)) as archive:
        return {member.name.removeprefix("./") for member in archive if member.isfile()}


def test_the_packages_carry_all_of_it(packages: Path) -> None:
    (tray,), daemon = packages.glob("flashd-tray_*_all.deb"), daemon_of(packages)
    assert files(tray) - {name for name in files(tray) if name.startswith("usr/share/doc/")} == {
        "etc/xdg/autostart/flashd-tray.desktop",
        "usr/bin/flashd-tray",
        "usr/share/applications/flashd-tray.desktop",
        "usr/share/icons/hicolor/scalable/apps/flashd.svg",
        "usr/share/icons/hicolor/symbolic/apps/flashd-symbolic.svg",
        "usr/share/lintian/overrides/flashd-tray",
        "usr/share/man/man1/flashd-tray.1.gz",
        "usr/share/metainfo/org.flashd1.Tray.metainfo.xml",
        "usr/share/mime/packages/flashd.xml",
    }
    code = ROOT / "tray" / "flashd_tray"
    wanted = {str(path.relative_to(code)) for kind in ("*.py", "*.mo") for path in code.rglob(kind)}
    carried = {name.partition("/flashd_tray/")[2] for name in files(daemon)}
    assert wanted <= carried, wanted - carried


def test_a_denied_click_is_explained(gerd: Person) -> None:
    gerd.run("choose", "one")
    gerd.machine.until(lambda: gerd.sees("Authentication"))
    gerd.picture("rights-asked")
    gerd.types("key", "Escape")
    gerd.machine.until(lambda: gerd.sees("flashd"))
    gerd.picture("rights-denied")
    assert "swap" not in gerd.machine.run("flash", "jobs").out, "nothing was done"
    gerd.types("key", "Escape")
    gerd.machine.until(lambda: not gerd.sees("flashd"))


def test_a_wrong_password_is_no_right(gerd: Person) -> None:
    gerd.run("choose", "one")
    gerd.answers("wrong")
    gerd.machine.until(lambda: gerd.sees("Error"), 40)
    gerd.types("key", "Escape")
    gerd.machine.until(lambda: not gerd.sees("Error"))
    gerd.types("key", "Escape")  # the agent asks again
    gerd.machine.until(lambda: gerd.sees("flashd"), 40)
    assert "swap" not in gerd.machine.run("flash", "jobs").out
    gerd.types("key", "Escape")
    gerd.machine.until(lambda: not gerd.sees("flashd"))


def test_an_administrator_s_password_lets_it_happen(gerd: Person) -> None:
    gerd.run("choose", "one")
    gerd.answers("secret")
    # There is no engine in this machine, so the swap that may begin fails.
    gerd.machine.until(lambda: "swap" in gerd.machine.run("flash", "jobs").out)
    gerd.machine.until(lambda: not gerd.sees("Authentication"))


def test_a_click_starts_the_machine_s_daemon(gerd: Person) -> None:
    gerd.machine.run("systemctl", "stop", "flashd")
    gerd.machine.until(lambda: "Start flashd" in gerd.menu())
    gerd.run("choose", "Start flashd")
    gerd.machine.until(gerd.is_shown_the_model)
    assert gerd.machine.show("flashd", "ActiveState") == "active"
