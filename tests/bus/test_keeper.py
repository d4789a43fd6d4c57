# SPDX-License-Identifier: Apache-2.0
"""flashd-keeper alone, with a scripted daemon; tests/bus/test_outlive.py tests it with flashd."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from processes import is_alive
from waiting import PATIENCE_S

from flashd.client import launch

# Obeys: each line that it gets over a connection of its own is a piece of Python, and is answered with its result.
DAEMON = """
import os, signal, socket, sys
orders = socket.socket(socket.AF_UNIX)
orders.connect(sys.argv[1])
lines = orders.makefile("rw")
def answer(result):
    lines.write(f"{os.getpid()} {result}\\n")
    lines.flush()
def end(*_):
    # Not with answer(), which the signal may interrupt.
    os.write(orders.fileno(), f"{os.getpid()} asked to end\\n".encode())
    os._exit(0)
signal.signal(signal.SIGINT, end)
def tell(text, fds=()):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect(os.environ["NOTIFY_SOCKET"])
        socket.send_fds(channel, [text.encode()], list(fds))
def memory(text):
    fd = os.memfd_create("kept")
    os.write(fd, text.encode())
    return fd
def barrier():
    reading, writing = os.pipe()
    tell("BARRIER=1", [writing])
    os.close(writing)
    assert os.read(reading, 1) == b""
def handed():
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return "not for us"
    count, names = int(os.environ["LISTEN_FDS"]), os.environ["LISTEN_FDNAMES"].split(":")
    return [(name, os.pread(3 + i, 100, 0).decode()) for i, name in zip(range(count), names)]
for line in lines:
    answer(eval(line))
"""


class RunningKeeper:
    """A keeper and what it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        self.folder.mkdir()
        self.socket = self.folder / "keeper"
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(folder / "orders"))
        self._listening.listen()
        self._listening.settimeout(PATIENCE_S)
        self._daemon: IO[str] | None = None
        self.log = (folder / "log").open("w+")
        command = [launch.keeper(), self.socket, sys.executable, "-c", DAEMON, folder / "orders"]
        self.process = subprocess.Popen(command, stderr=self.log)

    def order(self, line: str) -> tuple[int, str]:
        """The process that carried it out, and its result."""
        daemon = self._running()
        daemon.write(line + "\n")
        daemon.flush()
        return self.said()

    def said(self) -> tuple[int, str]:
        pid, _, result = self._running().readline().rstrip("\n").partition(" ")
        return int(pid), result

    def end(self, line: str) -> None:
        """An order that it does not survive."""
        daemon = self._running()
        daemon.write(line + "\n")
        daemon.flush()
        assert daemon.readline() == ""
        daemon.close()
        self._daemon = None

    def _running(self) -> IO[str]:
        """The connection of the daemon that runs now, or is being started."""
        if self._daemon is None:
            connection, _ = self._listening.accept()
            connection.settimeout(PATIENCE_S)
            self._daemon = connection.makefile("rw")
            connection.close()
        return self._daemon

    def close(self) -> None:
        if self._daemon is not None:
            self._daemon.close()
        self._listening.close()
        self.log.close()

    def words(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()


@pytest.fixture
def keeper(short_path: Path) -> Iterator[RunningKeeper]:
    made = RunningKeeper(short_path)
    yield made
    if made.process.poll() is None:
        made.process.terminate()
        assert made.process.wait(timeout=PATIENCE_S) == 0
    made.close()


READY = "tell('READY=1')"
DIES = "os.kill(os.getpid(), signal.SIGKILL)"


def test_what_is_stored_is_handed_to_the_next_one_and_what_is_removed_is_not(keeper: RunningKeeper) -> None:
    first, handed = keeper.order("handed()")
    assert handed == "[]"
    keeper.order(READY)
    for name, text in (("a", "of a"), ("a", "more of a"), ("b", "of b"), ("c", "of c")):
        keeper.order(f"tell('FDSTORE=1\\nFDPOLL=0\\nFDNAME={name}', [memory({text!r})])")
    keeper.order("tell('FDSTOREREMOVE=1\\nFDNAME=b')")
    keeper.order("barrier()")
    for _ in range(2):
        keeper.end(DIES)
        pid, handed = keeper.order("handed()")
        assert pid != first and handed == "[('a', 'of a'), ('a', 'more of a'), ('c', 'of c')]"


def test_only_the_daemon_is_believed(keeper: RunningKeeper) -> None:
    keeper.order(READY)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        ours.connect(str(keeper.socket))
        reading, writing = os.pipe()
        socket.send_fds(ours, [b"FDSTORE=1\nFDNAME=x"], [writing])
        os.close(writing)
        assert os.read(reading, 1) == b"", "it is let go of at once"
        os.close(reading)
    keeper.end(DIES)
    assert keeper.order("handed()")[1] == "[]"


def test_one_that_was_never_ready_is_not_tried_again(keeper: RunningKeeper) -> None:
    keeper.end("os._exit(13)")
    assert keeper.process.wait(timeout=PATIENCE_S) == 13
    assert not keeper.folder.exists(), "nothing of it is left"


def test_one_that_fails_again_and_again_is_given_up(keeper: RunningKeeper) -> None:
    keeper.order(READY)
    for _ in range(5):
        keeper.end("os._exit(7)")
    assert keeper.process.wait(timeout=PATIENCE_S) == 7
    assert "it is not started again" in keeper.words()


def test_one_that_asks_for_it_is_started_again_as_often_as_it_likes(keeper: RunningKeeper) -> None:
    keeper.order(READY)
    pids = set()
    for _ in range(8):
        keeper.end("os._exit(75)")
        pids.add(keeper.order("handed()")[0])
    assert len(pids) == 8 and keeper.words() == ""


def test_its_end_is_passed_on_and_what_the_daemon_has_left_ends_too(keeper: RunningKeeper) -> None:
    """An engine sees that its channel is closed."""
    keeper.order(READY)
    waits = "import os, sys; os.read(int(sys.argv[1]), 1)"
    engine = (
        "(pair := socket.socketpair(), tell('FDSTORE=1\\nFDNAME=engine', [pair[0].fileno()]), os.set_inheritable("
        f"pair[1].fileno(), True), os.spawnv(os.P_NOWAIT, sys.executable, ['python', '-c', {waits!r}, "
        "str(pair[1].fileno())]))[-1]"
    )
    engine_pid = int(keeper.order(engine)[1])
    keeper.end(DIES)
    keeper.order(READY)
    assert is_alive(engine_pid), "it outlives the daemon"
    keeper.process.send_signal(signal.SIGTERM)
    assert keeper.process.wait(timeout=PATIENCE_S) == 0
    assert keeper.said()[1] == "asked to end"
    assert not is_alive(engine_pid) and not keeper.folder.exists()
