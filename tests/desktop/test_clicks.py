# SPDX-License-Identifier: Apache-2.0
"""Each item of the menu does what it says, in a real desktop."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from box import TRAY, Daemon, Desktop, Panel, make_unsupported, until
from dbus_next import Variant

import flashd
from flashd.dbus import wire
from flashd.dbus.connection import Connection, Received, Reply, connect
from flashd.dbus.wire import OBJECT_MANAGER, PROPERTIES
from flashd.errors import NotAuthorized


@pytest.fixture
async def shown(daemon: Daemon, programs: Path, tray: subprocess.Popen[bytes], panel: Panel) -> Panel:
    await until(lambda: panel.says("No model is active"))
    return panel


async def test_opens_the_models_folder(daemon: Daemon, shown: Panel, programs: Path) -> None:
    await shown.choose("Open models folder")
    await until(programs.exists)
    await until(lambda: programs.read_text().splitlines()[1:] == [str(daemon.models)])


async def test_pins_and_lets_go(desktop: Desktop, daemon: Daemon, shown: Panel) -> None:
    make_unsupported(daemon.models / "small_one")
    await until(lambda: shown.has("small_one"))
    with flashd.connect(desktop.address) as client:
        client.load("small_one")
        await until(lambda: shown.has("small_one · 12 kB · warm"))
        lines = [line for line in await shown.lines() if line.label == "small_one"]
        assert [line.toggle for line in lines] == ["checkmark"], "a name with an underscore is shown as it is"
        await shown.choose_line(lines[0])
        await until(lambda: shown.has("small_one · 12 kB · warm · pinned"))
        assert client.model("small_one").pinned
        await shown.choose_line(lines[0])
        await until(lambda: not client.model("small_one").pinned)


async def test_about_and_finder_are_windows(desktop: Desktop, shown: Panel) -> None:
    await shown.choose("About flashd")
    await until(lambda: desktop.windows("About flashd"))
    desktop.picture("about")


async def test_autostart_writes_a_valid_entry(desktop: Desktop, shown: Panel) -> None:
    await shown.choose("Start at login")
    await until(lambda: shown.is_checked("Start at login"))
    entry = desktop.home / "config" / "autostart" / "flashd-tray.desktop"
    assert f"Exec={TRAY}\n" in entry.read_text()
    subprocess.run(["desktop-file-validate", entry], check=True)
    await shown.choose("Start at login")
    await until(lambda: shown.is_unchecked("Start at login"))
    assert not entry.exists()


class Denying:
    """A daemon of somebody who may look and not touch: as the real one answers where polkit says no."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def answer(self, call: Received) -> Reply:
        match call.interface, call.member:
            case str(i), "GetAll" if i == PROPERTIES:
                return Reply("a{sv}", (MANAGER,))
            case str(i), "GetManagedObjects" if i == OBJECT_MANAGER:
                return Reply("a{oa{sa{sv}}}", ({},))
            case _, "ListModels":
                return Reply("s", (MODELS,))
        self.asked.append(call.member)
        raise NotAuthorized("swapping is for members of the group flashd", hint="sudo usermod -aG flashd eve")


MANAGER: dict[str, Any] = {
    "Version": Variant("s", "1.0"), "State": Variant("s", "ready"), "ActiveModel": Variant("o", "/"),
    "Endpoint": Variant("s", ""), "ModelsDirectories": Variant("as", []), "StorePath": Variant("s", ""),
    "StoreBytes": Variant("t", 0), "StoreQuotaBytes": Variant("t", 0), "StoreFreeBytes": Variant("t", 0),
    "InboxItems": Variant("a(sss)", []),
}  # fmt: skip
MODELS = (
    '{"/org/flashd1/model/ada": {"Name": "ada", "Aliases": [], "Checkpoint": "", "Architecture": "", "DType": "BF16",'
    ' "SizeBytes": 1, "TensorCount": 1, "Residency": "stored", "Devices": [], "Active": false, "Pinned": false,'
    ' "Leases": 0, "CreatedAt": 0, "LastUsedAt": 0, "UseCount": 0, "Source": ""}}'
)


@pytest.fixture
async def denying(desktop: Desktop) -> AsyncIterator[Denying]:
    connection: Connection = await connect(desktop.address)
    peer = Denying()
    connection.serve(peer.answer)
    await connection.own(wire.BUS_NAME)
    yield peer
    await connection.close()


async def test_a_denial_is_explained(
    desktop: Desktop, denying: Denying, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    await until(lambda: panel.has("ada"))
    await panel.choose("ada")
    await until(lambda: desktop.windows("flashd"), what="a window that explains")
    desktop.picture("denied")
    assert denying.asked == ["Swap"]
    await until(lambda: panel.is_unchecked("ada"))


@pytest.mark.parametrize(("language", "said"), [("de_DE:de", "flashd läuft nicht"), ("zh_CN", "flashd 未运行")])
async def test_speaks_the_language_of_the_desktop(desktop: Desktop, panel: Panel, language: str, said: str) -> None:
    desktop.start([TRAY], LANGUAGE=language, LC_ALL="", LANG="de_DE.UTF-8")
    await until(panel.items)
    await until(lambda: panel.says(said))
