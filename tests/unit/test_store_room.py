# SPDX-License-Identifier: Apache-2.0
"""A slow or hanging store does not delay callers who ask for its free space."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
from waiting import PATIENCE_S, eventually

from flashd.daemon.events import Events
from flashd.daemon.library import store_room
from flashd.daemon.library.store_room import Room, StoreRoom
from flashd.tasks import Background


class Disk:
    """A catalog whose disk answers when it is let."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.free = 7
        self.asked = 0
        self.images = SimpleNamespace(leftover_bytes=lambda: 3)

    def free_bytes(self) -> int:
        self.asked += 1
        assert self.answers.wait(PATIENCE_S)
        return self.free


async def test_a_disk_that_hangs_is_asked_once_and_again_when_it_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_room, "_PATIENCE_S", 0.05)
    disk = Disk()
    room = StoreRoom(cast(Any, disk), Background(), Events())
    disk.answers.clear()
    for _ in range(5):
        await asyncio.gather(room.refresh(), room.refresh())
        assert room.known == Room(7, 3)
    assert disk.asked == 2, "at first, and by the one look that waits"
    assert caplog.text.count("does not answer") == 1
    disk.free = 5
    disk.answers.set()

    async def is_known() -> bool:
        await room.refresh()
        return room.known == Room(5, 3)

    await eventually(is_known)


async def test_what_changed_is_told_once_and_only_if_it_changed() -> None:
    disk, background, events, told = Disk(), Background(), Events(), list[int]()
    events.manager_changed.subscribe(lambda: told.append(1))
    room = StoreRoom(cast(Any, disk), background, events)
    events.model_published(cast(Any, None))
    await background.close()
    assert told == []
    disk.free = 6
    for _ in range(3):
        events.model_removed(cast(Any, None))
    await background.close()
    assert told == [1] and room.known.free_bytes == 6


async def test_without_threads_the_last_answer_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    room = StoreRoom(cast(Any, Disk()), Background(), Events())

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", start)
        await room.refresh()
    assert room.known == Room(7, 3)
