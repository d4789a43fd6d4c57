# SPDX-License-Identifier: Apache-2.0
"""Descriptors that are not files opened for reading are refused by the call itself, which names the file."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, Remote, import_model, make_source
from waiting import PATIENCE_S, eventually

from flashd.dbus import opened_files, wire
from flashd.errors import FlashdError, InvalidArgument, InvalidSource, LimitExceeded, TransferFailed

BAD = "model.safetensors"


@contextmanager
def hostile(folder: Path) -> Iterator[dict[str, int]]:
    """Descriptors by what the error says of them."""
    (folder / "file").write_bytes(b"x")
    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to("file")
    end, other = socket.socketpair()
    fds = {
        "opened with O_PATH": os.open(folder / "file", os.O_PATH),
        "opened for writing only": os.open(folder / "file", os.O_WRONLY),
        "a folder": os.open(folder, os.O_RDONLY),
        "a pipe": os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK),
        "a device": os.open("/dev/null", os.O_RDWR),
        "a socket": end.detach(),
        "O_PATH": os.open(folder / "link", os.O_PATH | os.O_NOFOLLOW),
    }
    try:
        yield fds
    finally:
        other.close()
        for fd in fds.values():
            os.close(fd)


async def is_watched(remote: Remote) -> bool:
    """Whether the inbox was looked at: it is watched before that."""
    return all(when > 0 for *_, when in await remote.get(wire.ROOT_PATH, wire.MANAGER, "InboxWatched"))


async def test_what_is_no_file_opened_for_reading_is_refused_at_once(
    remote: Remote, daemon: Daemon, tmp_path: Path
) -> None:
    good = os.open(make_source(tmp_path / "source") / "config.json", os.O_RDONLY)
    await import_model(remote, tmp_path / "source", "old")
    await eventually(lambda: is_watched(remote))  # in a thread, which may take its time
    before = daemon.open_files()
    (job,) = await remote.call("Import", "sa{sh}ba{sv}", "collecting", {}, True, {})
    (pull,) = await remote.call("BeginPull", "ssa{sv}", "somewhere@1", "pulled", {})

    async def refused(error: type[FlashdError], words: str, files: dict[str, int], fds: list[int]) -> None:
        calls: list[tuple[Any, ...]] = [
            ("Import", "sa{sh}ba{sv}", "new", files, False, {}),
            ("ImportFiles", "oa{sh}b", job, files, False),
            ("PullFiles", "oa{sh}asb", pull, files, [], False),
            ("InstallEnvironment", "sa{sh}b", "torch", files, False),
        ]
        for call in calls:
            with pytest.raises(error, match=words) as caught:
                await remote.call(*call, fds=fds)
            assert BAD in caught.value.message
            assert caught.value.hint

    with hostile(tmp_path) as fds:
        for words, fd in fds.items():
            await refused(InvalidSource, words, {"config.json": 0, BAD: 1}, [good, fd])
    await refused(InvalidArgument, "have the same descriptor", {"config.json": 0, BAD: 0}, [good])
    os.close(good)
    assert await remote.get(job, wire.JOB, "State") == "collecting", "what was refused is not part of it"
    for path in (job, pull):
        await remote.call("Cancel", path=path, interface=wire.JOB)
    await import_model(remote, tmp_path / "source", "new")
    await eventually(lambda: not daemon.open_files() - before)


async def test_a_file_system_that_does_not_answer_keeps_only_its_caller_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, really = threading.Event(), os.fstat
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)

    def fstat(asked: int) -> os.stat_result:
        if threading.current_thread().name == "look at opened files":
            assert answers.wait(PATIENCE_S)
        return really(asked)

    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setattr(opened_files, "_ANSWER_S", 0.05)
    try:
        looked = opened_files.OpenedFiles()
        for _ in range(opened_files._MOST_UNANSWERED):  # each leaves a thread behind
            with pytest.raises(TransferFailed, match="the file system of 'a' does not answer"):
                await looked.check(1000, {"a": fd})
        with pytest.raises(LimitExceeded, match="waiting for a file system"):
            await looked.check(1000, {"a": fd})
        with pytest.raises(TransferFailed):
            await looked.check(1001, {"a": fd})  # another user's limit is their own
        answers.set()
        await eventually(lambda: not looked._unanswered[1000])
        await looked.check(1000, {"a": fd})
    finally:
        answers.set()
        os.close(fd)
