# SPDX-License-Identifier: Apache-2.0
"""The tray's files for the desktop (menu entry, file types, icons, AppStream), and what the desktop makes of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from box import PATIENCE_S, ROOT, TRAY, Daemon, Desktop, NotificationDaemon, Panel, make_unsupported, until
from PIL import Image

import flashd

FILES = ROOT / "packaging" / "desktop"
# Asks as file managers do: GIO knows a file's type, and which programs open it.
ASK = """
import sys
from gi.repository import Gio
for name in sys.argv[1:]:
    info = Gio.File.new_for_path(name).query_info("standard::content-type", 0, None)
    kind = info.get_content_type()
    print(kind, *(app.get_id() for app in Gio.AppInfo.get_all_for_type(kind) if "flashd" in app.get_id()))
"""


@pytest.mark.parametrize(
    "command",
    [
        ["desktop-file-validate", FILES / "flashd-tray.desktop", FILES / "flashd-tray-autostart.desktop"],
        ["appstreamcli", "validate", "--no-net", FILES / "org.flashd1.Tray.metainfo.xml"],
        ["xmllint", "--noout", FILES / "flashd.mime.xml", *sorted((FILES / "icons").glob("*.svg"))],
    ],
    ids=lambda command: str(command[0]),
)
def test_valid(command: list[str | Path]) -> None:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"needs {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout


def test_appstream_shows_the_pictures_there_are() -> None:
    images = ElementTree.parse(FILES / "org.flashd1.Tray.metainfo.xml").findall(".//image")
    assert images
    for image in images:
        with Image.open(FILES / "screenshots" / str(image.text).rpartition("/")[2]) as picture:
            assert picture.size == (int(image.get("width", 0)), int(image.get("height", 0)))


def test_installs_for_the_whole_machine(tmp_path: Path) -> None:
    subprocess.run([FILES / "install", "--system"], env=os.environ | {"DESTDIR": str(tmp_path)}, check=True)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == [
        "etc/xdg/autostart/flashd-tray.desktop",
        "usr/bin/flashd-tray",
        "usr/share/applications/flashd-tray.desktop",
        "usr/share/icons/hicolor/scalable/apps/flashd.svg",
        "usr/share/icons/hicolor/symbolic/apps/flashd-symbolic.svg",
        "usr/share/metainfo/org.flashd1.Tray.metainfo.xml",
        "usr/share/mime/packages/flashd.xml",
    ]


async def test_runs_as_the_package_installs_it(desktop: Desktop, panel: Panel, tmp_path: Path) -> None:
    """With the system's Python and pystray, and flashd's code where the daemon's package has it."""
    subprocess.run([FILES / "install", "--system"], env=os.environ | {"DESTDIR": str(tmp_path)}, check=True)
    (packages,) = (ROOT / "build" / "tray" / "lib").glob("python3*")
    (tmp_path / "usr" / "lib" / "flashd" / "lib").mkdir(parents=True)
    (tmp_path / "usr" / "lib" / "flashd" / "lib" / packages.name).symlink_to(packages)
    probe = "import pystray; print(pystray.__file__)"
    if subprocess.run(["/usr/bin/python3", "-c", probe], env=desktop.environment, check=False).returncode:
        pytest.skip("needs python3-pystray")
    tray = desktop.start([tmp_path / "usr" / "bin" / "flashd-tray"])
    await until(panel.items, what="the icon")
    await until(lambda: panel.says("flashd is not running"))
    await panel.choose("Quit")
    assert tray.wait(timeout=PATIENCE_S) == 0
    assert desktop.words("flashd-tray") == ""


@pytest.fixture
def installed(desktop: Desktop) -> Path:
    """The files installed for the person of this desktop, and the tray's command on the path."""
    desktop.environment["XDG_DATA_HOME"] = str(desktop.home / "share")
    desktop.environment["PATH"] = f"{TRAY.parent}:{os.environ['PATH']}"
    desktop.run(FILES / "install")
    return desktop.home / "share"


def test_file_managers_offer_flashd(desktop: Desktop, installed: Path, tmp_path: Path) -> None:
    make_unsupported(tmp_path / "folder")
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\0\0\0")
    (tmp_path / "unnamed").write_bytes(b"GGUF\x03\0\0\0")
    names = ["folder/model.safetensors", "m.gguf", "unnamed", "folder"]
    said = desktop.run("/usr/bin/python3", "-c", ASK, *(tmp_path / name for name in names))
    assert said.splitlines() == [
        "application/x-safetensors flashd-tray.desktop",
        "application/x-gguf flashd-tray.desktop",
        "application/x-gguf flashd-tray.desktop",
        "inode/directory flashd-tray.desktop",
    ]


async def test_open_with_flashd_makes_models(
    desktop: Desktop, daemon: Daemon, installed: Path, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    """With the entry that was installed, and a tray that runs already."""
    make_unsupported(desktop.home / "a folder")
    make_unsupported(desktop.home / "other")
    (desktop.home / "other" / "model.safetensors").rename(desktop.home / "other" / "single.safetensors")
    await until(lambda: panel.says("No model is active"))
    entry = installed / "applications" / "flashd-tray.desktop"
    desktop.run("gio", "launch", entry, desktop.home / "a folder", desktop.home / "other" / "single.safetensors")
    await until(lambda: panel.has("a folder · "), what="the folder is a model")
    await until(lambda: panel.has("single · "), what="the file is a model")
    assert len(await panel.items()) == 1


async def test_what_cannot_be_opened_is_said(
    desktop: Desktop, daemon: Daemon, notifications: NotificationDaemon, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    """By the second process, which has no window of its own and ends at once."""
    await until(lambda: panel.says("No model is active"))
    second = desktop.start([TRAY, desktop.home / "nowhere.safetensors"])
    await until(lambda: notifications.shown, what="a notification")
    assert notifications.shown[0]["title"] == "nowhere.safetensors could not be converted"
    assert second.wait(timeout=PATIENCE_S) == 0


async def test_open_with_flashd_starts_what_it_needs(
    desktop: Desktop, installed: Path, notifications: NotificationDaemon, panel: Panel
) -> None:
    """Neither tray nor daemon runs; and a file for another program is refused with a reason."""
    file = desktop.home / "m.onnx"
    file.write_bytes(bytes(100))
    desktop.start(["gio", "launch", installed / "applications" / "flashd-tray.desktop", file])
    await until(panel.items, what="the tray was started")
    await until(lambda: desktop.windows("flashd"), what="a window with the reason")
    desktop.picture("refused")
    await until(lambda: panel.says("No model is active"), what="the daemon runs")
    assert not notifications.shown, "nothing was sent, so nothing failed later"
    with flashd.connect(desktop.address) as client:
        client.stop()
    await until(lambda: panel.says("flashd is not running"))
    await panel.choose("Quit")
    await until(panel.is_empty)
