# SPDX-License-Identifier: Apache-2.0
"""What does a zygote do after it has imported everything? It forks workers when told to, and tells how they ended.

No thread is started before a fork: a forked copy would lack it, and whatever lock it held would stay locked. Everything
imported is frozen out of the garbage collector, so that collections in workers do not copy its pages.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from flashd import sandbox
from flashd.engines import environments
from flashd.engines.control import Channel, Frame, close_all

Work = Callable[[Channel], int]  # a worker's whole life; returns its exit status


def serve(control_fd: int, work: Work, build: Mapping[str, str]) -> None:
    """`build` tells the daemon what was imported.

    Returns when the daemon has hung up; its engines end with us (PR_SET_PDEATHSIG).
    """
    channel = Channel(socket.socket(fileno=control_fd))
    environments.hold(Path(sys.prefix))
    wake_up, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    gc.collect()
    gc.freeze()
    while True:
        ready, _, _ = select.select([channel.socket.fileno(), wake_up], [], [])
        if wake_up in ready:
            os.read(wake_up, 4096)
            _report_exits(channel)
        if channel.socket.fileno() in ready:
            try:
                frame = channel.receive()
            except (EOFError, ConnectionError):
                return
            if frame.content["op"] == "fork":
                _fork(channel, frame, work)
            else:
                channel.send({"build": dict(build)})


def _fork(channel: Channel, frame: Frame, work: Work) -> None:
    control, words = frame.fds
    pid = os.fork()
    if pid == 0:
        _become_worker(channel, control, words, work)
    close_all(frame.fds)
    channel.send({"pid": pid})


def _become_worker(channel: Channel, control: int, words: int, work: Work) -> NoReturn:
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
        status = work(Channel(socket.socket(fileno=control)))
    except BaseException:  # noqa: BLE001 -- the last words of this process; nobody is above
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)  # the zygote's own exit handlers are not ours to run


def _report_exits(channel: Channel) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        channel.send({"notice": True, "exited": pid, "status": os.waitstatus_to_exitcode(status)})
