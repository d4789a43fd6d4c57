# SPDX-License-Identifier: Apache-2.0
"""Signs of life and the status line, as the service manager gets them."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashd import config
from flashd.daemon.service_manager import ServiceManager
from flashd.daemon.watchdog import Watchdog


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
    assert config.watchdog_s() is None
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert config.watchdog_s() == 30.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert config.watchdog_s() is None, "meant for another process"
