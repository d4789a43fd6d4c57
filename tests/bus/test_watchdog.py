# SPDX-License-Identifier: Apache-2.0
"""Keep-alives and the status line, as the service manager receives them."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Remote, make_source
from manager import Manager, start
from running import CONFIG, Daemon
from silent_files import SilentFiles
from waiting import eventually, until

from flashd.config.environment import watchdog_s
from flashd.daemon.lifecycle.stall_detector import StallDetector
from flashd.dbus import wire
from flashd.dbus.connection import connect
from flashd.dbus.private_bus import PrivateBus
from flashd.service_manager import ServiceManager, Watchdog


@pytest.fixture
def manager(short_path: Path) -> Iterator[socket.socket]:
    """Where the service manager listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(short_path / "notify"))
        listening.setblocking(False)
        yield listening


def told(manager: socket.socket) -> list[str]:
    lines = []
    while True:
        try:
            lines.append(manager.recv(1000).decode())
        except BlockingIOError:
            return lines


async def test_signs_come_often_enough_and_the_status_when_it_changes(manager: socket.socket) -> None:
    lines: list[str] = []
    asyncio.get_running_loop().add_reader(manager, lambda: lines.extend(told(manager)))
    summary = "no models"
    watchdog = Watchdog(ServiceManager(manager.getsockname()), 0.15, lambda: summary)
    watchdog.start()
    await asyncio.sleep(0.4)
    summary = "one model"
    await asyncio.sleep(0.2)
    await watchdog.close()
    asyncio.get_running_loop().remove_reader(manager)
    assert lines.count("WATCHDOG=1") >= 6
    assert [line for line in lines if line.startswith("STATUS=")] == ["STATUS=no models", "STATUS=one model"]


async def test_a_loop_that_is_stuck_gives_no_sign(manager: socket.socket) -> None:
    watchdog = Watchdog(ServiceManager(manager.getsockname()), 0.15, lambda: "")
    watchdog.start()
    await asyncio.sleep(0.01)
    told(manager)
    time.sleep(0.3)
    assert told(manager) == []
    await watchdog.close()


async def test_no_signs_where_none_are_wanted(manager: socket.socket) -> None:
    watchdog = Watchdog(ServiceManager(manager.getsockname()), None, lambda: "well")
    watchdog.start()
    await asyncio.sleep(0.05)
    await watchdog.close()
    assert told(manager) == ["STATUS=well"]


def test_the_time_is_the_one_that_we_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert watchdog_s() is None
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert watchdog_s() == 30.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert watchdog_s() is None, "meant for another process"


@dataclass
class Moving:
    """A transfer, as far as anybody looks."""

    done_bytes: int = 0
    total_bytes: int = 100
    finished: bool = False


def test_only_what_moves_nothing_for_long_and_is_not_done_is_stuck() -> None:
    now = 0.0
    stalls = StallDetector(lambda: 10.0, clock=lambda: now)
    slow, flushing = Moving(), Moving(done_bytes=100)
    stalls.started(slow)
    stalls.started(flushing)
    for second in range(1, 60):
        now = float(second)
        slow.done_bytes = second // 8
        assert stalls.found() == ""
    now = 68.0
    assert stalls.found() == "a transfer is stuck at 7 B of 100 B"
    slow.done_bytes = 8
    assert stalls.found() == "", "it goes on"
    now = 100.0
    assert stalls.found() != ""
    slow.finished = True
    assert stalls.found() == ""
    assert StallDetector(lambda: 0.0, clock=lambda: now).found() == ""


def test_a_store_that_does_not_answer_is_found_while_a_conversion_stalls(tmp_path: Path) -> None:
    now = 0.0
    stalls = StallDetector(lambda: 10.0, clock=lambda: now)
    for _ in range(3):
        stalls.look_at(tmp_path)  # asked again and again
    until(lambda: stalls.found() == "" and not list(tmp_path.iterdir()))
    with SilentFiles(tmp_path / "store", {}) as store:
        store.silent = {*range(100)}
        for second in range(0, 12, 4):
            now = float(second)
            stalls.look_at(store.folder)
            assert stalls.found() == ""
        now = 12.0
        assert stalls.found() == "the store does not answer"
        store.answer()
        until(lambda: stalls.found() == "")


def test_what_ended_is_kept_by_nobody_though_nobody_asks() -> None:
    stalls = StallDetector(lambda: 10.0)
    ended = [Moving(finished=True) for _ in range(100)]
    references = [weakref.ref(transfer) for transfer in ended]
    for transfer in ended:
        stalls.started(transfer)
    stalls.started(Moving())
    del ended, transfer
    assert [reference for reference in references if reference() is not None] == []


HANGS = Path(__file__).with_name("hangs.c")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
async def test_a_streamer_that_is_stuck_ends_the_signs_while_everybody_is_answered(
    bus: PrivateBus, short_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, trigger = tmp_path / "hangs.so", tmp_path / "hangs"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HANGS], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("HANGS_WHILE", str(trigger))
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    manager = Manager(short_path / "notify")
    manager.open()
    daemon = Daemon(bus.address, tmp_path, short_path)
    # Longer than a busy machine takes for anything of this size.
    daemon.config.write_text(CONFIG + "[streamer]\nbackend = 'threads'\ndirect = false\nstall_timeout_s = 2.0\n")
    start(daemon, manager)
    remote = Remote(await connect(bus.address))

    def signs() -> int:
        with manager.lock:
            return manager.said.count("WATCHDOG=1")

    def statuses() -> list[str]:
        with manager.lock:
            return [line for line in manager.said if line.startswith("STATUS=")]

    try:
        make_source(daemon.models / "large", elements=3_000_000)
        await remote.model("large")
        before = signs()
        await eventually(lambda: signs() > before + 3)
        trigger.touch()
        (job,) = await remote.call("Load", "ssa{sv}", "large", "host", {})
        await eventually(lambda: "a transfer is stuck" in statuses()[-1])
        before = signs()
        await asyncio.sleep(1.0)
        assert signs() == before, "systemd ends it now"
        assert (await remote.all(job, wire.JOB))["State"] == "running", "it answers all the same"
        assert "a transfer is stuck" in daemon.log.read_text()
        trigger.unlink()
        assert (await remote.finished(job))["State"] == "done"
        await eventually(lambda: signs() > before + 3)
        await remote.connection.close()
    finally:
        trigger.unlink(missing_ok=True)
        assert daemon.stop() == 0
        manager.close()
