# SPDX-License-Identifier: Apache-2.0
"""What does a zygote do after it has imported everything? It forks workers when told to, and tells how they ended.

No thread is started before a fork: a forked copy would lack it, and whatever lock it held would stay locked. Everything
imported is frozen out of the garbage collector, so that collections in workers do not copy its pages.
"""

from __future__ import annotations

import gc
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from flashd import __version__, sandbox
from flashd.engines import environments
from flashd.engines.control import Channel, Frame, close_all

# A worker's whole life, in a folder of its own: it obeys its channel, answers on its listening socket, and returns its
# exit status.
Work = Callable[[Channel, socket.socket], int]

# What a worker has started may outlive it so long: multiprocessing's tracker removes the shared memory that it left.
_GRACE_S = 1.0
_LOOK_S = 0.05


def serve(arguments: Sequence[str], work: Work, build: Mapping[str, str]) -> None:
    """`arguments` are the zygote's: its control channel's descriptor, and a folder for its workers' folders. `build`
    tells the daemon what was imported.

    Returns when the daemon has hung up; its engines end with us (PR_SET_PDEATHSIG).
    """
    _, control_fd, folder = arguments
    environments.hold(Path(sys.prefix))
    _Zygote(Channel(socket.socket(fileno=int(control_fd))), Path(folder), work, build).run()


class _Zygote:
    def __init__(self, channel: Channel, folder: Path, work: Work, build: Mapping[str, str]) -> None:
        self._channel = channel
        self._folder = folder
        self._work = work
        self._build = build
        self._workers: dict[int, Path] = {}  # those that have not ended, and their folders
        self._remnants: dict[int, tuple[float, Path]] = {}  # process groups of those that have: until when, and where

    def run(self) -> None:
        wake_up, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()
        control = self._channel.socket.fileno()
        try:
            while True:
                ready, _, _ = select.select([control, wake_up], [], [], _LOOK_S if self._remnants else None)
                if wake_up in ready:
                    os.read(wake_up, 4096)
                    self._report_exits()
                self._end_remnants()
                if control in ready:
                    self._obey(self._channel.receive())
        except (EOFError, ConnectionError):
            for pid in self._workers:
                os.kill(pid, signal.SIGKILL)
            for pid in list(self._workers):
                os.waitpid(pid, 0)
                self._ended(pid)
            while self._remnants:
                self._end_remnants()
                time.sleep(_LOOK_S)

    def _obey(self, frame: Frame) -> None:
        match frame.content["op"]:
            case "fork":
                try:
                    self._channel.send({"pid": self._fork(frame)})
                except OSError as error:  # no room for a folder, too many processes: the others are not to end of that
                    self._channel.send({"error": f"no process for an engine: {error}"})
                finally:
                    close_all(frame.fds)
            case "kill":
                if (pid := frame.content["pid"]) in self._workers:
                    os.kill(pid, signal.SIGKILL)
                self._channel.send({})
            case _:
                self._channel.send({"flashd": __version__, "build": dict(self._build), "workers": list(self._workers)})

    def _fork(self, frame: Frame) -> int:
        folder = Path(tempfile.mkdtemp(prefix="engine-", dir=self._folder))
        try:
            pid = os.fork()
        except OSError:
            folder.rmdir()
            raise
        if pid == 0:
            _become_worker(self._channel, folder, frame, self._work)
        self._workers[pid] = folder
        return pid

    def _report_exits(self) -> None:
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if pid not in self._workers:
                continue  # something that was imported has started it
            self._ended(pid)
            self._channel.send({"notice": True, "exited": pid, "status": os.waitstatus_to_exitcode(status)})

    def _ended(self, pid: int) -> None:
        self._remnants[pid] = time.monotonic() + _GRACE_S, self._workers.pop(pid)

    def _end_remnants(self) -> None:
        """What a worker has forked ends with its parent, if it got as far as asking for that; what has executed
        something else does not. All are of its group, whose number is nobody else's as long as one of them is there."""
        for group, (deadline, folder) in list(self._remnants.items()):
            is_due = time.monotonic() >= deadline
            try:
                os.killpg(group, signal.SIGKILL if is_due else 0)
            except ProcessLookupError:
                is_due = True
            if is_due:
                del self._remnants[group]
                shutil.rmtree(folder, ignore_errors=True)


def _become_worker(channel: Channel, folder: Path, frame: Frame, work: Work) -> NoReturn:
    control, words, listener = frame.fds
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        channel.socket.close()
        os.setsid()
        sandbox.end_with_parent(signal.SIGKILL)
        os.dup2(words, 1)
        os.dup2(words, 2)
        os.close(words)
        os.chdir(folder)
        status = work(Channel(socket.socket(fileno=control)), socket.socket(fileno=listener))
    except BaseException:  # noqa: BLE001 -- the last words of this process; nobody is above
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)  # the zygote's own exit handlers are not ours to run
