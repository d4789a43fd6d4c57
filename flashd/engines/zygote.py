# SPDX-License-Identifier: Apache-2.0
"""Where do engine processes come from? A zygote: a process that has imported everything, and forks on request.

Importing torch and transformers takes seconds; a fork of a process that has takes milliseconds. The zygote is started
when the daemon starts and imports in the background; whoever needs an engine earlier waits for it. It is our child, or
an instance of a unit of its own (flashd/engines/launcher.py), or was started by a daemon before us.
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

from flashd import __version__, config
from flashd.engines.control import KIND, AsyncChannel, Channel, pair
from flashd.engines.kept import ZYGOTE_PREFIX, Keeper, Kept, Record
from flashd.errors import EngineFailed, Unavailable

log = logging.getLogger(__name__)

_CONTROL = 3  # the descriptor of its control channel, in a child of ours
_GRACE_S = 5.0  # its workers' remnants have a second
LAST_WORDS_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Program:
    """What a zygote runs: `python -m MODULE CONTROL_FD FOLDER`, where `folder` is for its workers' private folders.

    Its stderr, and that of what it forks, goes to files in `logs`. `remedy` tells what to do where the interpreter
    lacks what is to be imported. With `service`, the socket of a unit, that unit runs it, in a folder of its own.
    """

    kind: str
    python: str
    module: str
    environment: Mapping[str, str]  # beside its own
    logs: Path
    folder: Path
    remedy: str
    service: Path | None

    @property
    def stamp(self) -> list[str]:
        """Zygotes of equal stamps make the same engines; of an older flashd they are others."""
        environment = [f"{name}={value}" for name, value in sorted(self.environment.items())]
        return [__version__, self.kind, self.python, self.module, *environment]


class Zygote:
    """The daemon's side of one."""

    def __init__(self, program: Program, keeper: Keeper) -> None:
        self._program = program
        self._keeper = keeper
        self._log = program.logs / f"{program.kind}-zygote.log"
        self._child = 0  # its process id, if we have started it ourselves
        self._channel: AsyncChannel | None = None
        self._starting: asyncio.Task[None] | None = None
        self._flashd = ""  # the version that it is of
        self._build: dict[str, str] = {}
        self._exits: dict[int, asyncio.Future[int]] = {}
        self._listener: asyncio.Task[None] | None = None
        self._record: Record | None = None  # while it is kept beyond us
        self.name = ""

    def begin(self) -> None:
        """Starts importing, in the background. Call it again after a zygote has died: it starts another."""
        if self._starting is None or (self._channel is not None and self._channel.closed.is_set()):
            self._starting = asyncio.create_task(self._start(), name="zygote")
            self._starting.add_done_callback(_note_failure)

    def rejoin(self, left: Kept) -> None:
        """Takes up one that a daemon before us has left."""
        self.name, self._record = left.name, left.record
        self._channel = AsyncChannel(socket.socket(fileno=left.channel))
        self._starting = asyncio.create_task(self._meet(self._channel), name="zygote")
        self._starting.add_done_callback(_note_failure)

    @property
    def is_begun(self) -> bool:
        return self._starting is not None

    @property
    def is_kept(self) -> bool:
        """Whether it and its workers run on when we leave."""
        return self._record is not None

    async def build(self) -> dict[str, str]:
        """What it has imported, in which versions. Raises as `fork` does."""
        self.begin()
        assert self._starting is not None
        await asyncio.shield(self._starting)
        return self._build

    async def fork(self, control: socket.socket, log: Path, listener: socket.socket) -> int:
        """A worker that has `control`, and answers on `listener`; returns its process id.

        Raises Unavailable if there is no such interpreter or framework, EngineFailed if the zygote dies.
        """
        await self.build()
        assert self._channel is not None
        with log.open("w+b") as words:  # read as well, by a worker that looks for what its own processes said
            fds = (control.fileno(), words.fileno(), listener.fileno())
            answer = await self._channel.request({"op": "fork"}, fds)
        pid = int(answer["pid"])
        self._exits.setdefault(pid, asyncio.get_running_loop().create_future())
        return pid

    async def kill(self, pid: int) -> None:
        """Ends a worker, which may be another user's, at once. Raises nothing: a zygote that has gone took it along."""
        assert self._channel is not None
        with contextlib.suppress(EngineFailed):
            await self._channel.request({"op": "kill", "pid": pid})

    def has(self, pid: int) -> bool:
        """Whether a worker of this number still runs."""
        return pid in self._exits and not self._exits[pid].done()

    @property
    def has_workers(self) -> bool:
        """Whether anything that it forked still runs, or may run: one that was found has not told yet."""
        is_unknown = self.is_kept and self._starting is not None and not self._starting.done()
        return is_unknown or any(not ended.done() for ended in self._exits.values())

    async def wait(self, pid: int) -> int:
        """Returns the exit status of a worker, negative for a signal, when it has ended."""
        future = self._exits.setdefault(pid, asyncio.get_running_loop().create_future())
        try:
            return await asyncio.shield(future)
        finally:
            if future.done():
                self._exits.pop(pid, None)

    async def leave(self) -> None:
        """Lets go of it, and lets it run."""
        for task in (self._starting, self._listener):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, EngineFailed, Unavailable):
                    await task
        if self._channel is not None:
            await self._channel.close()

    async def close(self) -> None:
        """Ends it, and what is left of its workers."""
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
            await self._channel.close()  # so that the next one who asks finds what was put right meanwhile
            why = f"{self._program.python} has flashd {self._flashd}, and the daemon is {__version__}"
            hint = f"install flashd {__version__} there, or: {self._program.remedy}"
            raise Unavailable(f"engines cannot start: {why}", hint=hint)
        self.name = f"{ZYGOTE_PREFIX}{self._program.kind}.{secrets.token_hex(4)}"
        record = Record.new({"name": self.name, "kind": self._program.kind, "stamp": self._program.stamp})
        if self._keeper.keep(self.name, (self._channel.fileno(), record.fd)):
            self._record = record
        else:
            record.close()

    async def _bury(self) -> None:
        if self._child:
            await asyncio.to_thread(_end, self._child)
            self._child = 0

    def _spawned(self, words: int) -> socket.socket:
        """As our child."""
        program = self._program
        program.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ours, theirs = pair()
        with theirs:
            try:
                self._child = os.posix_spawnp(
                    program.python,
                    [program.python, "-m", program.module, str(_CONTROL), str(program.folder)],
                    config.child_environment(program.environment),
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
        """As an instance of the unit, which a connection to its socket makes."""
        program = self._program
        end = socket.socket(socket.AF_UNIX, KIND | socket.SOCK_CLOEXEC)
        try:
            end.connect(str(program.service))
            content = {"python": program.python, "module": program.module, "environment": dict(program.environment)}
            Channel(end).send(content, (words,))
        except OSError as error:
            end.close()
            hint = "systemctl status flashd-engine.socket tells why"
            raise Unavailable(f"engines cannot start: {program.service}: {error.strerror}", hint=hint) from None
        return end

    async def _meet(self, channel: AsyncChannel) -> None:
        """Returns when it is ready to fork, or was all the time."""
        try:
            answer = await channel.request({"op": "ready"})
        except EngineFailed:
            self._forget()
            lines = last_words(self._log).splitlines()
            last = lines[-1] if lines else "the zygote died"
            if "No module named" in last or last.startswith("cannot run "):
                raise Unavailable(f"engines cannot start: {last}", hint=self._program.remedy) from None
            raise EngineFailed(f"engines cannot start: {last}", hint=f"{self._log} has all that it wrote") from None
        self._flashd = str(answer.get("flashd", "of another version"))
        self._build = {str(name): str(version) for name, version in answer["build"].items()}
        loop = asyncio.get_running_loop()
        self._exits = {int(pid): loop.create_future() for pid in answer["workers"]}
        self._listener = asyncio.create_task(self._listen(channel), name="zygote notices")

    async def _listen(self, channel: AsyncChannel) -> None:
        """Exits are told by the zygote, whose children workers are; they do not outlive it (PR_SET_PDEATHSIG)."""
        closed = asyncio.ensure_future(channel.closed.wait())
        while True:
            notice = asyncio.ensure_future(channel.notices.get())
            await asyncio.wait({notice, closed}, return_when=asyncio.FIRST_COMPLETED)
            if not notice.done():
                notice.cancel()
                break
            self._exited(int(notice.result().get("exited", 0)), int(notice.result().get("status", 0)))
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
    """Nobody may be waiting for it yet; whoever wants an engine later is told again."""
    if not starting.cancelled() and (error := starting.exception()) is not None:
        log.warning("%s", error)


def last_words(log: Path) -> str:
    """The end of what a process wrote to its log, as text."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_WORDS_BYTES))
        return file.read().decode(errors="replace").strip()
    return ""


def _end(child: int) -> None:
    """Its control socket is closed, which it takes as the word to go; if it does not, it is made to."""
    process = os.pidfd_open(child)
    has_ended, _, _ = select.select([process], [], [], _GRACE_S)
    os.close(process)
    if not has_ended:
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
