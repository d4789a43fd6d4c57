# SPDX-License-Identifier: Apache-2.0
"""A minimal service manager that speaks systemd's protocol: readiness, the file descriptor store, barriers.

flashd-keeper does the same for a user's daemon; here it can be stopped while a test looks at what a daemon has left.
The real systemd is tested in tests/system."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from processes import is_alive
from running import Daemon
from waiting import PATIENCE_S, until

import flashd
from flashd.client import launch
from flashd.errors import FlashdError

# For tests of behaviour that both share; parametrizes the fixture `manager` of a module.
of_both = pytest.mark.parametrize("manager", ["double", "keeper"], indirect=True)

# Hands on descriptors from 3 on, and says whose they are, as sd_listen_fds(3) expects.
_LAUNCHER = """
import fcntl, os, sys
given = [int(fd) for fd in sys.argv[1].split(",") if fd]
numbers = [fcntl.fcntl(fd, fcntl.F_DUPFD, 200) for fd in given]
for fd in given:
    os.close(fd)
for index, number in enumerate(numbers):
    os.dup2(number, 3 + index)
    os.close(number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(numbers)), "LISTEN_FDNAMES": sys.argv[2]}
os.execv(sys.argv[3], sys.argv[3:])
"""


@dataclass(slots=True)
class Manager:
    """Receives what a service says; keeps descriptors by name."""

    path: Path
    store: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    said: list[str] = field(default_factory=list)
    is_slow_to_let_go: bool = False
    ready: threading.Event = field(default_factory=threading.Event)
    socket: socket.socket = field(default_factory=lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self) -> None:
        self.socket.bind(str(self.path))
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        for fds in self.store.values():
            for fd in fds:
                os.close(fd)

    def names(self) -> set[str]:
        with self.lock:
            return {name for name, fds in self.store.items() if fds}

    def forget(self, name: str) -> None:
        with self.lock:
            for fd in self.store.pop(name, []):
                os.close(fd)

    def empty(self) -> None:
        """As for a service that was stopped."""
        for name in self.names():
            self.forget(name)

    def _listen(self) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.socket, 4096, 16)
            except OSError:
                return
            if not data and not fds:
                return
            lines = dict(line.split("=", 1) for line in data.decode().splitlines())
            with self.lock:
                self.said += data.decode().splitlines()
                if "FDSTORE" in lines:
                    assert lines["FDPOLL"] == "0", "a GPU's descriptor would be thrown out"
                    self.store[lines["FDNAME"]] += fds
                    fds = []
                if "FDSTOREREMOVE" in lines:
                    for fd in self.store.pop(lines["FDNAME"], []):
                        os.close(fd)
            for fd in fds:  # a barrier's, which waits for this
                os.close(fd)
            if lines.get("READY"):
                self.ready.set()


@dataclass(slots=True)
class Keeper:
    """The program of ours."""

    path: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self, daemon: Daemon) -> None:
        """Returns when a daemon is ready: the first one, or that which it starts for the one that has ended."""
        daemon.prepare()
        if self.process is None:
            with daemon.log.open("ab") as output:
                command = [launch.keeper(), self.path, *daemon.command()]
                self.process = subprocess.Popen(command, stdout=output, stderr=output)
        else:
            self.process.send_signal(signal.SIGCONT)
        until(lambda: self._is_ready(daemon))

    def _is_ready(self, daemon: Daemon) -> bool:
        assert self.process is not None and self.process.poll() is None, daemon.log.read_text()
        try:
            with flashd.connect(daemon.address) as client:
                return client.status().state == "ready"
        except FlashdError:
            return False

    def end_daemon(self, daemon: Daemon, how: signal.Signals) -> None:
        """Without starting the next one yet. SIGTERM stands for an end that the next one is to follow."""
        assert self.process is not None
        pid = self.daemon_pid()
        self.process.send_signal(signal.SIGSTOP)
        if how is signal.SIGTERM:
            with flashd.connect(daemon.address) as client:
                client.restart()
        else:
            os.kill(pid, how)
        until(lambda: not is_alive(pid))

    def daemon_pid(self) -> int:
        """Its first child; engines that it has taken over come later, and run something else."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = [int(pid) for pid in children if b"flashd.daemon.main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return pid

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=PATIENCE_S)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@dataclass(slots=True)
class KeptDaemon(Daemon):
    """One below our keeper."""

    keeper: Keeper = field(default_factory=lambda: Keeper(Path()))

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.keeper.end_daemon(self, signal.Signals(number))
        return 0


def start(daemon: Daemon, manager: Manager | Keeper) -> None:
    """As systemd starts a service that has left descriptors with it."""
    if isinstance(manager, Keeper):
        manager.start(daemon)
        return
    with manager.lock:
        kept = [(fd, name) for name, fds in manager.store.items() for fd in fds]
    daemon.prepare()
    manager.ready.clear()
    numbers, names = ",".join(str(fd) for fd, _ in kept), ":".join(name for _, name in kept)
    with daemon.log.open("ab") as output:
        daemon.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, numbers, names, *daemon.command()],
            env={**os.environ, "NOTIFY_SOCKET": str(manager.path)},
            pass_fds=[fd for fd, _ in kept],
            stdout=output,
            stderr=output,
        )
    assert manager.ready.wait(PATIENCE_S), daemon.log.read_text()
