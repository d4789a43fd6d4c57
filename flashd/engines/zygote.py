# SPDX-License-Identifier: Apache-2.0
"""Where do engine processes come from? A zygote: a process that has imported everything, and forks on request.

Importing torch and transformers takes seconds; a fork of a process that has takes milliseconds. The zygote is started
when the daemon starts and imports in the background; whoever needs an engine earlier waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path

from flashd.engines.control import AsyncChannel, pair
from flashd.errors import EngineFailed, Unavailable

log = logging.getLogger(__name__)

_GRACE_S = 2.0
LAST_WORDS_BYTES = 4096


class Zygote:
    """Runs `python -m MODULE CONTROL_FD`; its stderr, and that of what it forks, goes to files in `log_folder`."""

    def __init__(
        self, python: str, module: str, log_folder: Path, *, environment: Mapping[str, str] | None, remedy: str
    ) -> None:
        """`remedy` tells what to do where the interpreter lacks what is to be imported."""
        self._python = python
        self._module = module
        self._environment = environment
        self._remedy = remedy
        self._log_folder = log_folder
        self._process: asyncio.subprocess.Process | None = None
        self._channel: AsyncChannel | None = None
        self._starting: asyncio.Task[None] | None = None
        self._build: dict[str, str] = {}
        self._exits: dict[int, asyncio.Future[int]] = {}
        self._listener: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Starts importing, in the background. Call it again after a zygote has died: it starts another."""
        if self._starting is None or (self._channel is not None and self._channel.closed.is_set()):
            self._starting = asyncio.create_task(self._start(), name="zygote")
            self._starting.add_done_callback(_note_failure)

    async def build(self) -> dict[str, str]:
        """What it has imported, in which versions. Raises as `fork` does."""
        self.begin()
        assert self._starting is not None
        await asyncio.shield(self._starting)
        return self._build

    async def fork(self, control: socket.socket, log: Path) -> int:
        """A worker that has `control`; returns its process id. Raises Unavailable if there is no such interpreter or
        framework, EngineFailed if the zygote dies."""
        await self.build()
        assert self._channel is not None
        with log.open("wb") as words:
            answer = await self._channel.request({"op": "fork"}, (control.fileno(), words.fileno()))
        pid = int(answer["pid"])
        self._exits.setdefault(pid, asyncio.get_running_loop().create_future())
        return pid

    @property
    def has_workers(self) -> bool:
        """Whether anything that it forked still runs."""
        return any(not ended.done() for ended in self._exits.values())

    async def wait(self, pid: int) -> int:
        """Returns the exit status of a worker, negative for a signal, when it has ended."""
        future = self._exits.setdefault(pid, asyncio.get_running_loop().create_future())
        try:
            return await asyncio.shield(future)
        finally:
            if future.done():
                self._exits.pop(pid, None)

    async def close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, EngineFailed, Unavailable):
                await self._starting
        if self._listener is not None:
            self._listener.cancel()
        if self._channel is not None:
            await self._channel.close()
        if self._process is not None:
            await _ended(self._process)

    async def _start(self) -> None:
        ours, theirs = pair()
        self._log_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = self._log_folder / f"{self._module.split('.')[-2]}-zygote.log"
        try:
            with log.open("wb") as words:
                self._process = await asyncio.create_subprocess_exec(
                    *(self._python, "-m", self._module, str(theirs.fileno())),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=words,
                    stderr=words,
                    pass_fds=(theirs.fileno(),),
                    env=self._environment,
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise Unavailable(f"cannot run {self._python}: {error.strerror}", hint=self._remedy) from None
        finally:
            theirs.close()
        self._channel = AsyncChannel(ours)
        try:
            answer = await self._channel.request({"op": "ready"})
        except EngineFailed:
            words_said = last_words(log)
            if "No module named" in words_said:
                raise Unavailable(f"engines cannot start: {words_said.splitlines()[-1]}", hint=self._remedy) from None
            last = words_said.splitlines()[-1] if words_said else "the zygote died"
            raise EngineFailed(f"engines cannot start: {last}", hint=f"{log} has all that it wrote") from None
        self._build = {str(name): str(version) for name, version in answer["build"].items()}
        self._listener = asyncio.create_task(self._listen(self._channel), name="zygote notices")

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
        for pid in list(self._exits):
            self._exited(pid, -signal.SIGKILL)

    def _exited(self, pid: int, status: int) -> None:
        future = self._exits.setdefault(pid, asyncio.get_running_loop().create_future())
        if not future.done():
            future.set_result(status)


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


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Its control socket is closed, which it takes as the word to go; if it does not, it is made to."""
    try:
        await asyncio.wait_for(process.wait(), _GRACE_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
