# SPDX-License-Identifier: Apache-2.0
"""Other programs have all that inotify gives: what is dropped becomes a model all the same, and a person is told why
that takes longer.

The daemon is in a user namespace with limits of its own (user_namespaces(7), /proc/sys/user), for the kernel to refuse
it what another program would have taken.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Remote, make_source
from running import Daemon
from waiting import eventually

from flashd.cli import doctor
from flashd.cli.installation import Finding, Verdict
from flashd.dbus import wire
from flashd.dbus.private_bus import PrivateBus

INSTANCES, WATCHES = "fs.inotify.max_user_instances", "fs.inotify.max_user_watches"


@dataclass(slots=True)
class Limited(Daemon):
    """A daemon that is given no inotify instance until the limits are changed."""

    def command(self) -> list[str | Path]:
        limited = 'echo 0 > /proc/sys/user/max_inotify_instances && exec "$@"'
        return ["unshare", "-Ur", "sh", "-c", limited, "sh", *Daemon.command(self)]

    def limit(self, what: str, most: int) -> None:
        assert self.process is not None
        inside = ["nsenter", f"--target={self.process.pid}", "--user", "--preserve-credentials"]
        subprocess.run([*inside, "sh", "-c", f"echo {most} > /proc/sys/user/max_inotify_{what}"], check=True)


@pytest.fixture
def daemon(bus: PrivateBus, short_path: Path, tmp_path: Path) -> Iterator[Limited]:
    running = Limited(bus.address, tmp_path, short_path)
    running.start()
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log.read_text()


async def test_without_inotify_a_folder_is_looked_at_every_so_often(
    remote: Remote, daemon: Limited, bus: PrivateBus
) -> None:
    async def watched() -> tuple[str, str, float]:
        ((folder, how, why, when),) = await remote.get(wire.ROOT_PATH, wire.MANAGER, "InboxWatched")
        assert folder == str(daemon.models)
        return how, why, when

    async def is_watched(how: str, sysctl: str = "") -> bool:
        now, why, when = await watched()
        return now == how and sysctl in why and bool(why) == bool(sysctl) and when > 0

    async def becomes_a_model(name: str) -> None:
        make_source(daemon.models / name)
        await remote.model(name)

    async def found() -> Finding:
        return await asyncio.to_thread(lambda: next(f for f in doctor.examine(bus.address) if f.subject == "inbox"))

    await eventually(lambda: is_watched("every 1 s", INSTANCES))
    await becomes_a_model("one")
    finding = await found()
    assert finding.verdict is Verdict.SLOW and INSTANCES in finding.remedy
    assert "every 1 s; last scan: " in finding.found and finding.found.endswith(
        "other programs use all inotify instances"
    )

    daemon.limit("instances", 100)
    await eventually(lambda: is_watched("events"))
    finding = await found()
    assert finding.verdict is Verdict.GOOD and "is watched by events; last scan: " in finding.found

    daemon.limit("watches", 0)  # existing watches stay, but new folders have no events
    await eventually(lambda: is_watched("every 1 s", WATCHES))
    await becomes_a_model("owner/two")
    shutil.rmtree(daemon.models)
    await eventually(lambda: is_watched("every 1 s", "it does not exist"))
    daemon.models.mkdir()
    await eventually(lambda: is_watched("every 1 s", WATCHES))  # now it has none at all
    await becomes_a_model("three")
    assert WATCHES in (await found()).remedy

    _, _, before = await watched()

    async def is_looked_at_again() -> bool:
        return (await watched())[2] > before

    await eventually(is_looked_at_again)
    daemon.limit("watches", 100)
    await eventually(lambda: is_watched("events"))
    words = daemon.log.read_text()
    assert (words.count(INSTANCES), words.count(WATCHES)) == (1, 1), words
