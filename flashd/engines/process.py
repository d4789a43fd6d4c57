# SPDX-License-Identifier: Apache-2.0
"""What does the daemon know of one engine process, and how does it drive it?"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashd.checkpoint.files import Checkpoint
from flashd.engines.control import AsyncChannel, Frame, close_all, pair
from flashd.engines.engine import (
    NO_OPTIONS,
    TRANSITIONS,
    Binding,
    EngineOptions,
    EngineState,
    EngineStats,
    GpuPlan,
    Made,
    RankArena,
)
from flashd.engines.zygote import Zygote, last_words
from flashd.errors import EngineFailed

log = logging.getLogger(__name__)

_STOP_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What every engine of a factory is started with.

    `environment` is the zygote's, and so theirs, or None for ours; `options` is what its kind of engine alone knows;
    `numbers` is shared by all factories of a daemon.
    """

    python: str
    runtime: Path  # sockets, private folders
    logs: Path
    threads: int
    max_tokens_default: int
    start_timeout_s: float
    socket_mode: int = 0o600  # who may ask its engines: this user, or this user's group too
    environment: Mapping[str, str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))


class EngineProcess:
    """An engine in a process forked from a zygote; see flashd/engines/engine.py for the protocol it keeps."""

    def __init__(self, number: int, kind: str, zygote: Zygote, settings: Settings) -> None:
        self.number = number
        self.kind = kind
        self.state = EngineState.ABSENT
        self.binding: Binding | None = None
        self.socket_path = settings.runtime / "engines" / f"{number}.sock"
        self.pid = 0
        self.started_at = 0.0
        self.on_exit: Callable[[str], None] = lambda last_words: None
        self._zygote = zygote
        self._settings = settings
        self._scratch = self.socket_path.with_suffix(".scratch")
        self._log = settings.logs / f"engine-{number}.log"
        self._channel: AsyncChannel | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self, binding: Binding) -> Made | None:
        self._enter(EngineState.STARTING)
        self._scratch.mkdir(parents=True, exist_ok=True)
        ours, theirs = pair()
        try:
            self.pid = await self._zygote.fork(theirs, self._log)
        except BaseException:
            ours.close()
            self._enter(EngineState.FAILED)
            raise
        finally:
            theirs.close()
        self._channel = AsyncChannel(ours)
        self._watcher = asyncio.create_task(self._watch(), name=f"engine {self.number}")
        options = {
            "socket": str(self.socket_path),
            "socket_mode": self._settings.socket_mode,
            "scratch": str(self._scratch),
            "threads": self._settings.threads,
            "max_tokens_default": self._settings.max_tokens_default,
            **self._settings.options,
        }
        try:
            made = await asyncio.wait_for(self._bind("start", binding, options), self._settings.start_timeout_s)
        except TimeoutError:
            hint = f"raise engines.start_timeout_s; {self._log} has what it wrote"
            raise EngineFailed(
                f"the engine did not start in {self._settings.start_timeout_s:.0f} s", hint=hint
            ) from None
        self.started_at = time.time()
        self._enter(EngineState.SERVING)
        return made

    async def drain(self, timeout_s: float) -> None:
        await self._request({"op": "drain", "timeout_s": timeout_s})

    async def resume(self) -> None:
        await self._request({"op": "resume"})

    async def park(self) -> None:
        await self._request({"op": "park"})
        self._enter(EngineState.PARKED)

    async def wake(self, binding: Binding) -> Made | None:
        made = await self._bind("wake", binding)
        self._enter(EngineState.SERVING)
        return made

    async def rebind(self, binding: Binding) -> Made | None:
        return await self._bind("rebind", binding)

    async def stop(self) -> None:
        self._stopping = True
        if self._channel is not None:
            await self._channel.close()  # the worker takes this as the word to go
        if self._watcher is not None:
            try:
                await asyncio.wait_for(asyncio.shield(self._watcher), _STOP_GRACE_S)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
                await self._watcher
        self._clean_up()

    async def stats(self) -> EngineStats:
        answer = await self._request({"op": "stats"})
        return EngineStats(int(answer["active_requests"]), int(answer["memory_bytes"]), int(answer["seen_requests"]))

    async def _bind(self, op: str, binding: Binding, options: Mapping[str, Any] | None = None) -> Made | None:
        """Sends weights and side files as descriptors: the worker opens nothing of ours by name."""
        content = {
            "op": op,
            "model_name": binding.model_name,
            "names": list(binding.names),
            "arena_bytes": binding.arena_bytes,
            "layout": binding.layout,
            "side_files": sorted(binding.side_files),
            "devices": list(binding.devices),
            "is_image": binding.is_image,
            "wants_image": binding.wants_image,
            "further": [{"arena_bytes": rank.size_bytes, "layout": rank.layout} for rank in binding.further],
            **(options or {}),
        }
        opened: list[int] = []
        try:
            opened += [
                os.open(binding.side_files[name], os.O_RDONLY | os.O_CLOEXEC) for name in sorted(binding.side_files)
            ]
            arenas = (binding.arena_fd, *(rank.fd for rank in binding.further))
            answer = await self._exchange(content, (*arenas, *opened))
        except OSError as error:
            raise EngineFailed(f"{error.filename}: {error.strerror}", hint="flash verify checks the model") from None
        finally:
            close_all(opened)
        self.binding = binding
        made = _made(answer)
        if made is None and binding.wants_image:
            log.warning(
                "engine %d keeps the weights of %s to itself: see %s", self.number, binding.model_name, self._log
            )
        return made

    async def _request(self, content: dict[str, Any]) -> dict[str, Any]:
        answer = await self._exchange(content)
        close_all(answer.fds)
        return answer.content

    async def _exchange(self, content: dict[str, Any], fds: tuple[int, ...] = ()) -> Frame:
        if self._channel is None:
            raise EngineFailed("the engine is not running")
        try:
            return await self._channel.exchange(content, fds)
        except EngineFailed as error:
            if not self._channel.closed.is_set():
                raise
            await asyncio.wait([self._watcher] if self._watcher else [])
            hint = f"{self._log} has all that it wrote"
            raise EngineFailed(f"{error.message}: {self._epitaph()}", hint=hint) from None

    async def _watch(self) -> None:
        status = await self._zygote.wait(self.pid)
        if self._channel is not None:
            await self._channel.close()
        self._clean_up()
        if not self._stopping:
            reason = f"signal {-status}" if status < 0 else f"status {status}"
            self.on_exit(f"{reason}; {self._epitaph()}")

    def _clean_up(self) -> None:
        """What the process itself may not have had the time to remove."""
        self.state = EngineState.FAILED
        self.socket_path.unlink(missing_ok=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _epitaph(self) -> str:
        lines = last_words(self._log).splitlines()
        return lines[-1] if lines else "it left no words"

    def _enter(self, state: EngineState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise EngineFailed(f"the engine is {self.state}, and cannot become {state}")
        self.state = state


def _made(answer: Frame) -> Made | None:
    """What a worker says of its image is checked by whoever takes it in."""
    match answer.content.get("made"):
        case [*said] if said and len(said) == len(answer.fds):
            arenas = [arena for rank, fd in zip(said, answer.fds, strict=True) if (arena := _rank_arena(rank, fd))]
            if len(arenas) == len(said):
                return Made(tuple(arenas))
    close_all(answer.fds)
    return None


def _rank_arena(said: object, fd: int) -> RankArena | None:
    match said:
        case {"size_bytes": int(size_bytes), "layout": str(layout)}:
            return RankArena(fd, size_bytes, layout)
    return None


class ZygoteFactory:
    """Makes engines whose processes are forked from one zygote, which starts importing at once."""

    def __init__(self, kind: str, module: str, settings: Settings, *, remedy: str) -> None:
        """`remedy` tells what to do where the interpreter lacks what the zygote imports."""
        self.kind = kind
        self._module = module
        self._remedy = remedy
        self._settings = settings
        self._zygote = self._new_zygote()
        self._former: list[Zygote] = []  # of interpreters that engines still run in

    def begin(self) -> None:
        """Starts importing in the background, so that the first engine starts as fast as the others."""
        self._zygote.begin()

    def refusal(self, architecture: str, side_files: Mapping[str, Path]) -> str:
        if "config.json" not in side_files:
            return "it has no config.json, so nothing says which architecture its weights belong to"
        if not architecture:
            return "its config.json names no architecture"
        return ""

    def rebind_key(self, checkpoint: Checkpoint, options: EngineOptions = NO_OPTIONS) -> str:  # noqa: ARG002 -- for vLLM
        return checkpoint.manifest.architecture_key

    async def gpu_plan(
        self,
        checkpoint: Checkpoint,  # noqa: ARG002 -- for vLLM
        options: EngineOptions = NO_OPTIONS,  # noqa: ARG002
    ) -> GpuPlan | None:
        return None

    def create(self, options: EngineOptions = NO_OPTIONS) -> EngineProcess:
        settings = dataclasses.replace(self._settings, options=self._told(options))
        return EngineProcess(next(settings.numbers), self.kind, self._zygote, settings)

    def _told(self, options: EngineOptions) -> Mapping[str, Any]:  # noqa: ARG002 -- for vLLM
        """What an engine's own options are with what one model has different."""
        return self._settings.options

    async def run_in(self, python: str) -> None:
        """Engines made from now on run in this interpreter; those that there are stay what they are."""
        idle = [zygote for zygote in self._former if not zygote.has_workers]
        self._former = [zygote for zygote in self._former if zygote.has_workers]
        if python != self._settings.python:
            (self._former if self._zygote.has_workers else idle).append(self._zygote)
            self._settings = dataclasses.replace(self._settings, python=python)
            self._zygote = self._new_zygote()
        for zygote in idle:
            await zygote.close()

    async def close(self) -> None:
        for zygote in (self._zygote, *self._former):
            await zygote.close()

    def _new_zygote(self) -> Zygote:
        chosen = self._settings
        return Zygote(chosen.python, self._module, chosen.logs, environment=chosen.environment, remedy=self._remedy)


def torch_factory(settings: Settings) -> ZygoteFactory:
    remedy = "flash engine install torch, or set engines.torch.python to an interpreter that has torch and flashd"
    return ZygoteFactory("torch", "flashd.engines.torch.zygote", settings, remedy=remedy)
