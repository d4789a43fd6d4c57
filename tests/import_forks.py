# SPDX-License-Identifier: Apache-2.0
"""The process behind imported.py: it imports once what several programs need, and forks a process for each of them.

    PYTHON tests/import_forks.py ZYGOTE LISTENER_FD

It imports what the zygote of this module does. Each connection to the listener asks for one program, and is told its
exit status, negative for a signal.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from flashd.io import sandbox

ORDER_BYTES = 1 << 17
MOST_FDS = 253  # SCM_MAX_FD, by unix(7)


@dataclass(frozen=True, slots=True)
class Program:
    """A program as an interpreter would run it. `fds` has the numbers that its descriptors are to have."""

    arguments: Sequence[str]
    folder: str
    environment: dict[str, str]
    umask: int
    descriptor_limits: tuple[int, int]
    fds: Sequence[int]


class _Forks:
    def __init__(self, module: str, listener: socket.socket) -> None:
        self._module = module
        self._listener = listener
        self._asking: dict[int, socket.socket] = {}  # connections, by the process that runs for each

    def run(self) -> None:
        """Runs until standard input is closed. The forks end with this process."""
        wake_up, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        while True:
            ready, _, _ = select.select([sys.stdin, self._listener, wake_up, *self._asking.values()], [], [])
            if sys.stdin in ready:
                return
            if wake_up in ready:
                os.read(wake_up, 4096)
                self._report()
            for pid, connection in list(self._asking.items()):
                if connection in ready:  # nothing more is sent, so whoever asked was killed
                    os.kill(pid, signal.SIGKILL)
                    self._asking.pop(pid).close()
            if self._listener in ready:
                self._start(self._listener.accept()[0])

    def _start(self, connection: socket.socket) -> None:
        order, fds, _, _ = socket.recv_fds(connection, ORDER_BYTES, MOST_FDS)
        if not order:  # whoever asked is gone
            connection.close()
            return
        if self._module not in sys.modules:
            importlib.import_module(self._module).prepare()
            gc.collect()
            gc.freeze()  # else each fork would copy the pages of all objects, when it collects them
            gc.enable()
        if (pid := os.fork()) == 0:
            _become(Program(**json.loads(order)), fds)
        for fd in fds:
            os.close(fd)
        self._asking[pid] = connection

    def _report(self) -> None:
        while self._asking:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if (connection := self._asking.pop(pid, None)) is not None:
                with connection, contextlib.suppress(ConnectionError):
                    connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def _become(program: Program, fds: Sequence[int]) -> NoReturn:
    """Runs the program in this fork, as the process that asked for it would have."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        sandbox.end_with_parent(signal.SIGKILL)
        _take(fds, program.fds)
        os.umask(program.umask)
        resource.setrlimit(resource.RLIMIT_NOFILE, program.descriptor_limits)
        os.chdir(program.folder)
        for name in os.environ.keys() - program.environment.keys():
            del os.environ[name]
        # Only what differs: a process's title needs the place of its first environment (vLLM's processes have titles).
        os.environ.update(program.environment.items() - os.environ.items())
        _, module, *arguments = program.arguments
        sys.argv[:] = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 -- the interpreter's own boundary
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _take(fds: Sequence[int], numbers: Sequence[int]) -> None:
    """Gives descriptors their numbers, and closes all others."""
    above = max([*fds, *numbers]) + 1
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, above) for fd in fds]
    os.closerange(0, above)
    for fd, number in zip(moved, numbers, strict=True):
        os.dup2(fd, number)
    os.closerange(above, os.sysconf("SC_OPEN_MAX"))


if __name__ == "__main__":
    _Forks(sys.argv[1], socket.socket(fileno=int(sys.argv[2]))).run()
