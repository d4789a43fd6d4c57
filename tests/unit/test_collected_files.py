# SPDX-License-Identifier: Apache-2.0
"""Files sent over several messages: only their sender may add some, their number is limited, each is closed once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashd.dbus import collected_files
from flashd.dbus.collected_files import CollectedFiles
from flashd.dbus.object_tree import Caller
from flashd.errors import InvalidArgument, NotAuthorized


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path, os.O_RDONLY)
    yield opened
    os.close(opened)


def is_open(fd: int) -> bool:
    return Path(f"/proc/self/fd/{fd}").exists()


def test_only_the_sender_may_add_files() -> None:
    collected = CollectedFiles("import", ":1.1")
    collected.check_sender(Caller(":1.1", 0), 7)
    with pytest.raises(NotAuthorized, match="job 7 is another caller's import"):
        collected.check_sender(Caller(":1.2", 0), 7)


def test_a_file_is_sent_once_and_none_after_the_last_message(fd: int) -> None:
    with_files = CollectedFiles("import", ":1.1")
    with_files.add({"a": fd}, more=True)
    with pytest.raises(InvalidArgument, match="'a' was sent twice"):
        with_files.add({"a": fd}, more=False)
    with_files.add({"b": fd}, more=False)
    with pytest.raises(InvalidArgument, match="all files of this import were sent"):
        with_files.add({"c": fd}, more=False)
    assert len(with_files) == 2
    with_files.close()


def test_there_is_a_limit_over_all_messages(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collected_files, "MAX_FILES", 2)
    collected = CollectedFiles("pull", ":1.1")
    collected.add({"a": fd}, more=True)
    with pytest.raises(InvalidArgument, match="more than 2 files in one pull"):
        collected.add({"b": fd, "c": fd}, more=True)
    collected.close()


def test_it_is_cut_short_only_by_its_sender_and_only_before_the_last_message() -> None:
    collected = CollectedFiles("import", ":1.1")
    assert collected.is_cut_short(":1.1") and not collected.is_cut_short(":1.2")
    collected.add({}, more=False)
    assert not collected.is_cut_short(":1.1")


def test_descriptors_are_duplicates_and_closed_unless_they_were_taken(fd: int) -> None:
    collected = CollectedFiles("import", ":1.1")
    collected.add({"a": fd}, more=True)
    (ours,) = collected.take().values()
    collected.close()
    assert ours != fd and is_open(ours)
    os.close(ours)
    collected.add({"b": fd}, more=True)
    with collected.taken() as fds:
        assert is_open(fds["b"])
    assert not is_open(fds["b"]) and is_open(fd)
