# SPDX-License-Identifier: Apache-2.0
"""The daemon's side of a zygote: a process that has imported a framework, and forks engine processes on request.

Importing torch and transformers takes seconds; forking a process that has imported them takes milliseconds. The zygote
is started with the daemon and imports in the background; an engine that is needed earlier waits for it. It is our
child, an instance of a systemd unit (flashd/workers/launcher.py), or was started by an earlier daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import select
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flashd._version import __version__
from flashd.config.environment import child_environment, unit_of_its_own
from flashd.engines import codec, messages
from flashd.engines.codec import Misunderstood
from flashd.engines.control import KIND, AsyncChannel, Channel, pair
from flashd.engines.inherited import ZYGOTE_PREFIX, InheritedProcess, Keeper, Record
from flashd.engines.messages import Exited
from flashd.errors import EngineFailed, Unavailable

log = logging.getLogger(__name__)

_CONTROL = 3  # descriptor of the control channel, in our child
_GRACE_S = 5.0  # of which remnants of its workers get a second
LAST_WORDS_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Program:
    """The program of a zygote: `python -m MODULE CONTROL_FD FOLDER`. `folder` holds its workers' private folders.

    Its stderr and that of its workers go to files in `logs`. `remedy` is the hint for an interpreter that lacks the
    modules. With `service`, the socket of a systemd unit, that unit runs the program, in its own folder.
    """

    kind: str
    python: str
    module: str
    environment: Mapping[str, str]  # in addition to its own
    logs: Path
    folder: Path
    remedy: str
    service: Path | None

    @property
    def stamp(self) -> tuple[str, ...]:
        """Returns a stamp. Zygotes with equal stamps make equal engines; it includes the version of flashd."""
        environment = [f"{name}={value}" for name, value in sorted(self.environment.items())]
        return (__version__, self.kind, self.python, self.module, *environment)


@dataclass(frozen=True, slots=True)
class ZygoteRecord:
    """The record of a zygote for the next daemon."""

    name: str
    kind: str
    stamp: tuple[str, ...]


class Zygote:
    """The daemon's side of one zygote."""

    def __init__(self, program: Program, keeper: Keeper) -> None:
        self._program = program
        self._keeper = keeper
        self._log = program.logs / f"{program.kind}-zygote.log"
        self._child = 0  # process id, if it is our child
        self._channel: AsyncChannel | None = None
        self._starting: asyncio.Task[None] | None = None
        self._flashd = ""  # version of flashd that it runs
        self._build: dict[str, str] = {}
        self._exits: dict[int, asyncio.Future[int]] = {}
        self._listener: asyncio.Task[None] | None = None
        self._record: Record | None = None  # while it is kept for the next daemon
        self.name = ""

    def begin(self) -> None:
        """Starts the process, which imports in the background. If it has died, another call starts a new one."""
        if self._starting is None or (self._channel is not None and self._channel.closed.is_set()):
            self._starting = asyncio.create_task(self._start(), name="zygote")
            self._starting.add_done_callback(_note_failure)

    def rejoin(self, left: InheritedProcess) -> None:
        """Takes over a zygote that an earlier daemon has left."""
        self.name, self._record = left.name, left.record
        self._channel = AsyncChannel(socket.socket(fileno=left.channel))
        self._starting = asyncio.create_task(self._meet(self._channel), name="zygote")
        self._starting.add_done_callback(_note_failure)

    @property
    def is_begun(self) -> bool:
        return self._starting is not None

    @property
    def is_kept(self) -> bool:
        """True if the zygote and its workers go on running after `leave`."""
        return self._record is not None

    async def build(self) -> dict[str, str]:
        """Returns its imported modules with their versions. Raises like `fork`."""
        self.begin()
        assert self._starting is not None
        await asyncio.shield(self._starting)
        return self._build

    async def fork(self, control: socket.socket, log: Path, listener: socket.socket) -> int:
        """Forks a worker that is controlled by `control` and answers on `listener`. Returns its process id.

        Raises Unavailable if the interpreter or framework is missing, or EngineFailed if the zygote dies.
        """
        await self.build()
        assert self._channel is not None
        with log.open("w+b") as words:  # readable too, because a worker looks there for messages of its own processes
            fds = (control.fileno(), words.fileno(), listener.fileno())
            pid = (await self._channel.request(messages.Fork(), fds)).pid
        self._exits.setdefault(pid, asyncio.get_running_loop().create_future())
        return pid

    async def kill(self, pid: int) -> None:
        """Kills a worker, which may run as another user. Never raises, because workers die with their zygote."""
        assert self._channel is not None
        with contextlib.suppress(EngineFailed):
            await self._channel.request(messages.Kill(pid))

    def has(self, pid: int) -> bool:
        """Tells whether the worker with this process id is still running."""
        return pid in self._exits and not self._exits[pid].done()

    @property
    def has_workers(self) -> bool:
        """True if workers are running, or may be, while a zygote that was taken over has not answered yet."""
        is_unknown = self.is_kept and self._starting is not None and not self._starting.done()
        return is_unknown or any(not ended.done() for ended in self._exits.values())

    async def wait(self, pid: int) -> int:
        """Waits for the end of a worker and returns its exit status, negative for a signal."""
        future = self._exits.setdefault(pid, asyncio.get_running_loop().create_future())
        try:
            return await asyncio.shield(future)
        finally:
            if future.done():
                self._exits.pop(pid, None)

    async def leave(self) -> None:
        """Closes our end and lets the zygote go on running."""
        for task in (self._starting, self._listener):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, EngineFailed, Unavailable):
                    await task
        if self._channel is not None:
            await self._channel.close()

    async def close(self) -> None:
        """Ends the zygote and its remaining workers."""
        self._forget()
        await self.leave()
        await self._bury()

    async def _start(self) -> None:
        self._program.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._forget()
        await self._bury()
        with self._log.open("w+b") as words:
            ours = self._asked_for(words.fileno()) if self._program.service else self._spawned(words.fileno())
        self._channel = AsyncChannel(ours)
        await self._meet(self._channel)
        if self._flashd != __version__:
            await self._channel.close()  # so that the next call finds an interpreter that was repaired meanwhile
            why = f"{self._program.python} has flashd {self._flashd}, but the daemon is {__version__}"
            hint = f"install flashd {__version__} there, or: {self._program.remedy}"
            raise Unavailable(f"engines cannot start: {why}", hint=hint)
        self.name = f"{ZYGOTE_PREFIX}{self._program.kind}.{secrets.token_hex(4)}"
        record = Record.new(codec.to_json(ZygoteRecord(self.name, self._program.kind, self._program.stamp)))
        if self._keeper.keep(self.name, (self._channel.fileno(), record.fd)):
            self._record = record
        else:
            record.close()

    async def _bury(self) -> None:
        if self._child:
            await asyncio.to_thread(_end, self._child)
            self._child = 0

    def _spawned(self, words: int) -> socket.socket:
        """Starts the zygote as our child."""
        program = self._program
        program.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ours, theirs = pair()
        with theirs:
            try:
                unit = unit_of_its_own(f"flashd-{program.kind}-{secrets.token_hex(4)}.scope")
                command = [*unit, program.python, "-m", program.module, str(_CONTROL), str(program.folder)]
                self._child = os.posix_spawnp(
                    command[0],
                    command,
                    child_environment(program.environment),
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                        (os.POSIX_SPAWN_DUP2, words, 1),
                        (os.POSIX_SPAWN_DUP2, words, 2),
                        (os.POSIX_SPAWN_DUP2, theirs.fileno(), _CONTROL),
                    ],
                    setsid=True,
                )
            except OSError as error:
                ours.close()
                raise Unavailable(f"cannot run {program.python}: {error.strerror}", hint=program.remedy) from None
        return ours

    def _asked_for(self, words: int) -> socket.socket:
        """Starts the zygote as an instance of the unit, by a connection to the unit's socket."""
        program = self._program
        end = socket.socket(socket.AF_UNIX, KIND | socket.SOCK_CLOEXEC)
        try:
            end.connect(str(program.service))
            Channel(end).send(messages.Launch(program.python, program.module, program.environment), (words,))
        except OSError as error:
            end.close()
            hint = "see systemctl status flashd-engine.socket"
            raise Unavailable(f"engines cannot start: {program.service}: {error.strerror}", hint=hint) from None
        return end

    async def _meet(self, channel: AsyncChannel) -> None:
        """Waits until the zygote is ready to fork."""
        try:
            answer = await channel.request(messages.AskBuild())
        except Misunderstood as error:
            self._forget()
            await channel.close()
            raise EngineFailed(f"engines cannot start: {error.message}", hint=error.hint) from None
        except EngineFailed:
            self._forget()
            lines = last_words(self._log).splitlines()
            last = lines[-1] if lines else "the zygote died"
            if "No module named" in last or last.startswith("cannot run "):
                raise Unavailable(f"engines cannot start: {last}", hint=self._program.remedy) from None
            raise EngineFailed(f"engines cannot start: {last}", hint=f"see its log, {self._log}") from None
        self._flashd, self._build = answer.flashd, dict(answer.build)
        loop = asyncio.get_running_loop()
        self._exits = {pid: loop.create_future() for pid in answer.workers}
        self._listener = asyncio.create_task(self._listen(channel), name="zygote notices")

    async def _listen(self, channel: AsyncChannel) -> None:
        """Receives exits of workers from the zygote, their parent, which they do not outlive (PR_SET_PDEATHSIG)."""
        closed = asyncio.ensure_future(channel.closed.wait())
        while True:
            notice = asyncio.ensure_future(channel.notices.get())
            await asyncio.wait({notice, closed}, return_when=asyncio.FIRST_COMPLETED)
            if not notice.done():
                notice.cancel()
                break
            try:
                ended = codec.from_json(Exited, notice.result(), "a notice of a zygote")
            except Misunderstood as error:
                log.warning("%s", error)
                continue
            self._exited(ended.exited, ended.status)
        self._forget()
        for pid in list(self._exits):
            self._exited(pid, -signal.SIGKILL)

    def _exited(self, pid: int, status: int) -> None:
        future = self._exits.setdefault(pid, asyncio.get_running_loop().create_future())
        if not future.done():
            future.set_result(status)

    def _forget(self) -> None:
        if self._record is not None:
            self._keeper.forget(self.name)
            self._record.close()
            self._record = None


def _note_failure(starting: asyncio.Task[None]) -> None:
    """Logs a failed start, because no caller may be waiting. The next request for an engine reports it again."""
    if not starting.cancelled() and (error := starting.exception()) is not None:
        log.warning("%s", error)


def last_words(log: Path) -> str:
    """Returns the end of a process's log as text."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_WORDS_BYTES))
        return file.read().decode(errors="replace").strip()
    return ""


def _end(child: int) -> None:
    """Ends a child by closing its control socket, and kills it if it does not end."""
    process = os.pidfd_open(child)
    has_ended, _, _ = select.select([process], [], [], _GRACE_S)
    os.close(process)
    if not has_ended:
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
