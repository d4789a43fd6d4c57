# SPDX-License-Identifier: Apache-2.0
"""Processes that a worker has started end with it, after a grace period, and leave nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import is_alive
from waiting import PATIENCE_S, until

from flashd.engines.control import Channel, pair

# A zygote whose workers run a command of a shell and end at once. It has a child besides, as an import may leave one.
ZYGOTE = """
import subprocess, sys
from flashd.workers import zygote

def work(channel, listener):
    subprocess.Popen(["sh", "-c", sys.argv[3]])
    return 7

other = subprocess.Popen(["true"])
zygote.serve(sys.argv[:3], work, {"of": "test"})
"""
# One whose workers share memory, write its name to a file, and end: so does what would remove it.
SHARES = """
import os, pathlib, signal, sys
from multiprocessing import resource_tracker, shared_memory
from flashd.workers import zygote

def work(channel, listener):
    for _ in range(3):
        shared = shared_memory.SharedMemory(create=True, size=4096)
    os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
    pathlib.Path(sys.argv[3]).write_text(shared.name)
    os._exit(7)

zygote.serve(sys.argv[:3], work, {"of": "test"})
"""


class Zygote:
    def __init__(self, folder: Path, command: str, program: str = ZYGOTE) -> None:
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        ours, theirs = pair()
        with theirs:
            arguments = [sys.executable, "-c", program, str(theirs.fileno()), str(self.scratch), command]
            self.process = subprocess.Popen(arguments, pass_fds=[theirs.fileno()])
        self.channel = Channel(ours)

    def fork(self) -> int:
        pid = self.ask_for_fork()["pid"]
        assert isinstance(pid, int)
        return pid

    def ask_for_fork(self) -> dict[str, object]:
        control, listener = pair()
        with control, listener, open(os.devnull, "w") as words:  # noqa: PTH123
            socket.send_fds(
                self.channel.socket, [b'{"op": "fork"}'], [control.fileno(), words.fileno(), listener.fileno()]
            )
            return self.channel.receive().content

    def close(self) -> None:
        """As a daemon that is killed does."""
        self.channel.socket.close()
        self.process.wait(PATIENCE_S)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Zygote]]:
    zygotes: list[Zygote] = []

    def start(command: str, program: str = ZYGOTE) -> Zygote:
        zygotes.append(Zygote(tmp_path, command, program))
        return zygotes[-1]

    yield start
    for zygote in zygotes:
        zygote.close()


def written(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_what_a_worker_leaves_behind_may_clean_up(started: Callable[..., Zygote], tmp_path: Path) -> None:
    zygote = started(f"sleep 0.3; echo done >own && cat own >{tmp_path}/late")  # its folder is there as long as it is
    pid = zygote.fork()
    notice = zygote.channel.receive().content
    assert (notice["exited"], notice["status"]) == (pid, 7)
    until(lambda: written(tmp_path / "late") == "done\n")
    until(lambda: not list(zygote.scratch.iterdir()))


def test_what_does_not_end_is_ended_and_its_folder_goes(started: Callable[..., Zygote], tmp_path: Path) -> None:
    """Also one that hangs, and one that goes on writing."""
    zygote = started(
        f"echo $$ >{tmp_path}/first; sh -c 'echo $$ >{tmp_path}/second; while :; do : >$$; done' & kill -STOP $$"
    )
    zygote.fork()
    zygote.channel.receive()
    until(lambda: all(written(tmp_path / name).endswith("\n") for name in ("first", "second")))
    left = [int(written(tmp_path / name)) for name in ("first", "second")]
    until(lambda: not any(map(is_alive, left)) and not list(zygote.scratch.iterdir()))


def test_shared_memory_goes_whatever_became_of_its_tracker(started: Callable[..., Zygote], tmp_path: Path) -> None:
    zygote = started(str(tmp_path / "name"), SHARES)
    zygote.fork()
    assert zygote.channel.receive().content["status"] == 7
    until(lambda: not list(zygote.scratch.iterdir()))
    name = (tmp_path / "name").read_text()
    assert name and not list(Path("/dev/shm").glob(f"{name[:-4]}*"))


def test_nothing_is_left_of_those_that_ended_when_the_daemon_hangs_up(
    started: Callable[..., Zygote], tmp_path: Path
) -> None:
    zygote = started(f"echo $$ >{tmp_path}/first; kill -STOP $$")
    zygote.fork()
    zygote.channel.receive()
    until(lambda: written(tmp_path / "first").endswith("\n"))
    zygote.close()
    assert not is_alive(int(written(tmp_path / "first"))) and not list(zygote.scratch.iterdir())
    assert zygote.process.returncode == 0


def test_a_fork_that_fails_is_told_and_costs_nobody_else_anything(
    started: Callable[..., Zygote], tmp_path: Path
) -> None:
    zygote = started("sleep 600")
    zygote.scratch.rename(tmp_path / "elsewhere")  # as where there is no room for another folder
    assert "No such file" in str(zygote.ask_for_fork()["error"])
    (tmp_path / "elsewhere").rename(zygote.scratch)
    pid = zygote.fork()
    assert zygote.channel.receive().content["exited"] == pid
