# SPDX-License-Identifier: Apache-2.0
"""Each rank of a vLLM engine gets its own weights, and the images of all ranks come back in order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from flashd.engines.control import Parcel
from flashd.engines.messages import RankImage, RankShare
from flashd.errors import EngineFailed
from flashd.tasks import close_all
from flashd.workers.vllm import rank_server
from flashd.workers.vllm.rank_server import Handover


@pytest.fixture
def socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # paths of sockets are short
    return Path(rank_server.SOCKET)


@pytest.fixture
def memories() -> Iterator[list[int]]:
    fds = [os.memfd_create(f"rank {rank}") for rank in range(2)]
    yield fds
    close_all(fds)


def count() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def share(rank: int, fd: int) -> Parcel[RankShare]:
    return Parcel(RankShare(rank, "", is_image=False, wants_image=True), (fd,))


def asked(socket: Path, rank: int) -> tuple[int, int]:
    given = rank_server.ask(socket, rank)
    try:
        (fd,) = given.fds
        return given.message.arena_bytes, inode(fd)
    finally:
        close_all(given.fds)


def test_an_image_has_a_part_for_each_rank_and_a_checkpoint_is_for_all(socket: Path, memories: list[int]) -> None:
    held = Handover(socket)
    first, second = (share(rank, fd) for rank, fd in enumerate(memories))
    held.hold([first, second])
    assert [asked(socket, rank) for rank in (1, 0)] == [(1, inode(memories[1])), (0, inode(memories[0]))]
    held.hold([first])
    assert [asked(socket, rank) for rank in (0, 1, 7)] == [(0, inode(memories[0]))] * 3
    held.drop()
    with pytest.raises(EOFError):
        rank_server.ask(socket, 0)


def test_what_ranks_have_made_comes_back_in_their_order_and_once(socket: Path, memories: list[int]) -> None:
    held = Handover(socket)
    for rank in (1, 0):
        rank_server.tell_made(socket, rank, RankImage(rank, ""), memories[rank])
    made = held.take_made()
    assert [image.message for image in made] == [RankImage(0, ""), RankImage(1, "")]
    assert [inode(image.fds[0]) for image in made] == [inode(fd) for fd in memories]
    assert held.take_made() == []
    for image in made:
        close_all(image.fds)


def test_a_child_keeps_nothing_and_its_children_lose_nothing(socket: Path, memories: list[int]) -> None:
    held = Handover(socket)
    held.hold([share(rank, fd) for rank, fd in enumerate(memories)])
    pid = os.fork()
    if pid == 0:
        before = count()
        held.forsake()
        gone = before - count()
        for _ in range(gone):
            os.open("/dev/null", os.O_RDONLY)  # gets the number of one of those
        held.forsake()  # as a fork of this fork does
        os._exit(0 if (gone, count()) == (3, before) else 1)  # the listener and two arenas
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("rank", [2, "0", None])
def test_a_rank_that_makes_no_sense_is_refused_and_others_are_answered(
    socket: Path, memories: list[int], rank: object
) -> None:
    held = Handover(socket)
    held.hold([share(rank, fd) for rank, fd in enumerate(memories)])
    with pytest.raises((EOFError, EngineFailed)):
        rank_server.ask(socket, cast(int, rank))
    assert asked(socket, 0) == (0, inode(memories[0]))
