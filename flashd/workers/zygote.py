# SPDX-License-Identifier: Apache-2.0
"""The main loop of a zygote after its imports: it forks workers on request, and reports their ends.

No thread is started before a fork, because it would be missing in the child, and its locks would stay locked. Imported
objects are frozen for the garbage collector, so that collections in workers do not copy their pages.
"""

from __future__ import annotations

import contextlib
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
from multiprocessing import shared_memory
from pathlib import Path
from typing import NoReturn

from flashd._version import __version__
from flashd.engines import environments, messages
from flashd.engines.control import Channel, Frame
from flashd.engines.messages import (
    AskBuild,
    Done,
    Exited,
    Fork,
    Forked,
    Kill,
    Message,
    Refusal,
    ZygoteBuild,
    ZygoteOrder,
)
from flashd.errors import EngineFailed
from flashd.io import sandbox
from flashd.tasks import close_all

# The work of a worker, in its own folder: it obeys its channel, answers on its listening socket, and returns its exit
# status.
Work = Callable[[Channel, socket.socket], int]

# Grace for processes that a worker has started, such as multiprocessing's tracker, which cleans up after it.
_GRACE_S = 1.0
_SHARED_MEMORY = Path("/dev/shm")  # used by shm_open(3)
_LOOK_S = 0.05


def serve(arguments: Sequence[str], work: Work, build: Mapping[str, str]) -> None:
    """Serves as a zygote until the daemon hangs up; the workers then end with us (PR_SET_PDEATHSIG).

    `arguments` are the descriptor of the control channel, and the folder for workers' folders. `build` has the imported
    modules with their versions, for the daemon.
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
        self._workers: dict[int, Path] = {}  # running workers and their folders
        self._remnants: dict[int, tuple[float, Path]] = {}  # process groups of ended workers: deadline and folder

    def run(self) -> None:
        wake_up, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()
        gc.enable()
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
        try:
            order = messages.order_from_json(messages.ZYGOTE_ORDERS, frame.content, "a zygote")
            self._channel.send(self._answer(order, frame))
        except EngineFailed as error:
            self._channel.send(Refusal.of(error))
        finally:
            close_all(frame.fds)

    def _answer(self, order: ZygoteOrder, frame: Frame) -> Message:
        match order:
            case AskBuild():
                return ZygoteBuild(self._build, tuple(self._workers), __version__)
            case Fork():
                try:
                    return Forked(self._fork(frame))
                except OSError as error:  # no space or processes left, which is no reason to end
                    return Refusal(f"cannot start a process for an engine: {error}")
            case Kill(pid):
                if pid in self._workers:
                    os.kill(pid, signal.SIGKILL)
                return Done()

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
                continue  # started by an imported module
            self._ended(pid)
            self._channel.notify(Exited(pid, os.waitstatus_to_exitcode(status)))

    def _ended(self, pid: int) -> None:
        self._remnants[pid] = time.monotonic() + _GRACE_S, self._workers.pop(pid)

    def _end_remnants(self) -> None:
        """Ends processes that a worker has left.

        Its forks end with their parent, once they have asked for that; executed programs do not. All are in its process
        group, whose number is not reused before the last of them has ended.
        """
        for group, (deadline, folder) in list(self._remnants.items()):
            is_due = time.monotonic() >= deadline
            try:
                os.killpg(group, signal.SIGKILL if is_due else 0)
            except ProcessLookupError:
                is_due = True
            if is_due:
                del self._remnants[group]
                _free_shared_memory(folder)
                shutil.rmtree(folder, ignore_errors=True)


def _shared_name(folder: Path) -> str:
    """Returns the prefix for shared memory of a folder's worker.

    Names have 14 characters, of which Python needs four.
    """
    return f"fd{folder.name[-6:]}-"


def _free_shared_memory(folder: Path) -> None:
    """Removes shared memory that a worker left, since multiprocessing's tracker may have been killed or too slow."""
    for left in _SHARED_MEMORY.glob(f"{_shared_name(folder)}*"):
        with contextlib.suppress(OSError):  # removed meanwhile, or another user's
            left.unlink()


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
        # Inherited by forks. There is no public way to name the shared memory of libraries.
        shared_memory._SHM_NAME_PREFIX = f"/{_shared_name(folder)}"  # type: ignore[attr-defined]
        status = work(Channel(socket.socket(fileno=control)), socket.socket(fileno=listener))
    except BaseException:  # noqa: BLE001 -- the last boundary of this process, which logs the error
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)  # without the exit handlers of the zygote
