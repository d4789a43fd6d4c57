# SPDX-License-Identifier: Apache-2.0
"""The channel between the daemon and its engines: frames and descriptors arrive whole, and are not inherited."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator

import pytest

from flashd.engines.control import MAX_FRAME_BYTES, Channel, pair
from flashd.engines.messages import RankImage
from flashd.tasks import close_all


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = pair()
    with ours, theirs:
        yield Channel(ours), Channel(theirs)


@pytest.mark.parametrize("size_bytes", [1, 1 << 20])
def test_what_is_received_is_whole_and_not_inherited_by_programs(
    ends: tuple[Channel, Channel], size_bytes: int
) -> None:
    ours, theirs = ends
    memory = os.memfd_create("a GPU's, say")
    ours.send(RankImage(size_bytes, "x" * size_bytes), (memory, memory))
    frame = theirs.receive()
    assert frame.content == {"size_bytes": size_bytes, "layout": "x" * size_bytes, "is_own": False}
    assert [os.fstat(fd).st_ino for fd in frame.fds] == [os.fstat(memory).st_ino] * 2
    assert not any(os.get_inheritable(fd) for fd in frame.fds), "it would stay taken as long as they run"
    close_all((memory, *frame.fds))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("nothing", "memfd is missing"),
        ("not sealed", "sealed"),
        ("too large", "too large"),
        ("no object", "a JSON object"),
        ("too deep", "too deeply"),
    ],
)
def test_what_a_worker_says_wrong_is_refused_and_nothing_of_it_stays_open(
    ends: tuple[Channel, Channel], wrong: str, why: str
) -> None:
    ours, theirs = ends
    memory = os.memfd_create("said", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, MAX_FRAME_BYTES + 1)
    if wrong == "too large":
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    open_before = sorted(os.listdir("/proc/self/fd"))
    raw = {"no object": b"[]", "too deep": b"[" * 20_000}.get(wrong, b"@")
    socket.send_fds(ours.socket, [raw], [] if wrong == "nothing" else [memory])
    with pytest.raises(ValueError, match=why):
        theirs.receive()
    assert sorted(os.listdir("/proc/self/fd")) == open_before
    os.close(memory)
