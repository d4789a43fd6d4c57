# SPDX-License-Identifier: Apache-2.0
"""Notifications for users who do not look at the tray, and the effects of clicking them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from box import Daemon, Desktop, NotificationDaemon, Panel, make_unsupported, until

import flashd
from flashd.dbus.connection import connect


async def test_a_dropped_model_is_announced_and_can_be_switched_to(
    desktop: Desktop,
    daemon: Daemon,
    sources: Path,
    notifications: NotificationDaemon,
    tray: subprocess.Popen[bytes],
    panel: Panel,
) -> None:
    await until(lambda: panel.says("No model is active"))
    shutil.copytree(sources / "ada", daemon.models / "ada")
    await until(lambda: notifications.shown, what="a notification")
    (shown,) = notifications.shown
    assert shown["title"] == "ada is ready"
    assert shown["body"].startswith("6.49 MB. Converted in")
    assert shown["actions"] == ["swap", "Switch"]
    await notifications.click(shown["number"], "swap")
    await until(lambda: panel.says("ada answers"), "the click switched")


async def test_a_failed_conversion_is_told_with_its_reason(
    desktop: Desktop, daemon: Daemon, notifications: NotificationDaemon, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    await until(lambda: panel.says("No model is active"))
    make_unsupported(daemon.models / "torn")
    (daemon.models / "torn" / "model.safetensors").write_bytes(b"\xff" * 4096)
    await until(lambda: notifications.shown, what="a notification")
    (shown,) = notifications.shown
    assert shown["title"] == "torn could not be converted"
    assert "model.safetensors" in shown["body"]
    await notifications.click(shown["number"], "show-error")
    await until(lambda: desktop.windows("flashd"), what="a window with all of it")


async def test_refused_memory_is_told(
    desktop: Desktop, daemon: Daemon, notifications: NotificationDaemon, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    make_unsupported(daemon.models / "large")
    await until(lambda: panel.has("large"))
    daemon.stop()
    daemon.config.write_text(daemon.config.read_text() + '[memory]\nhost_budget = "4KiB"\n')
    await until(lambda: panel.says("flashd is not running"))
    daemon.start()
    await until(lambda: panel.has("large"))
    await panel.choose("large")

    def told() -> list[str]:
        return [shown["body"] for shown in notifications.shown if shown["title"] == "No swap to large"]

    (body,) = await until(told, what="that it was refused")
    assert body.startswith("It does not fit into memory: ")


async def test_what_was_switched_off_is_not_told(
    desktop: Desktop, daemon: Daemon, notifications: NotificationDaemon, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    await until(lambda: panel.says("No model is active"))
    await panel.choose("A new model is ready")
    await until(lambda: panel.is_unchecked("A new model is ready"))
    make_unsupported(daemon.models / "quiet")
    await until(lambda: panel.has("quiet"))
    (daemon.models / "loud").mkdir()
    (daemon.models / "loud" / "model.safetensors").write_bytes(b"\xff" * 4096)
    await until(lambda: notifications.shown)
    assert [shown["title"] for shown in notifications.shown] == ["loud could not be converted"]


async def test_what_is_told_cannot_carry_markup(
    desktop: Desktop, daemon: Daemon, notifications: NotificationDaemon, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    await until(lambda: panel.says("No model is active"))
    source = desktop.home / "source"
    make_unsupported(source)
    (source / "config.json").write_text('{"architectures": ["<b>"], "model_type": "<a href=x>"')
    with flashd.connect(desktop.address) as client:
        client.begin_import(source, "it + (he)")
    await until(lambda: notifications.shown)
    assert "<" not in notifications.shown[0]["body"]


async def test_a_desktop_without_notifications_is_no_reason_to_fail(
    desktop: Desktop, daemon: Daemon, tray: subprocess.Popen[bytes], panel: Panel
) -> None:
    """The menu says the same; and the first notice after such a daemon has come is shown."""
    make_unsupported(daemon.models / "unheard")
    await until(lambda: panel.has("✓ unheard is ready"), what="the menu tells of it")
    connection = await connect(desktop.address)
    late = NotificationDaemon(connection)
    await late.start()
    source = desktop.home / "source"
    make_unsupported(source)
    (source / "model.safetensors").write_bytes(b"\xff" * 4096)
    with flashd.connect(desktop.address) as client:
        client.begin_import(source, "heard")
    await until(lambda: late.shown, what="a notification")
    assert [shown["title"] for shown in late.shown] == ["heard could not be converted"]
    await connection.close()
