# SPDX-License-Identifier: Apache-2.0
"""What does the daemon know of one engine process, and how does it drive it?"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    Holding,
    Made,
    RankArena,
    Rejoined,
)
from flashd.engines.gate import GateState
from flashd.engines.kept import PREFIX, ZYGOTE_PREFIX, Keeper, Kept, NoKeeper, Record
from flashd.engines.surroundings import listen
from flashd.engines.zygote import Program, Zygote, last_words
from flashd.errors import EngineFailed, InvalidArgument

log = logging.getLogger(__name__)

_STOP_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What every engine of a factory is started with.

    `environment` is what the zygote, and so they, find in theirs beside ours; `options` is what its kind of engine
    alone knows; `numbers` is shared by all factories of a daemon. `keeper` keeps them beyond us.
    """

    python: str
    runtime: Path  # sockets, and private folders unless `service` has those
    logs: Path
    threads: int
    max_tokens_default: int
    start_timeout_s: float
    socket_mode: int = 0o600  # who may ask its engines: this user, or this user's group too
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    keeper: Keeper = field(default_factory=NoKeeper)
    service: Path | None = None  # the socket of the unit that runs zygotes; None: they are our children

    @property
    def told(self) -> dict[str, Any]:
        """What an engine is told at its start, and holds on to."""
        return {"threads": self.threads, "max_tokens_default": self.max_tokens_default, **self.options}

    @property
    def lasting(self) -> dict[str, Any]:
        """What no engine can be told otherwise once it runs."""
        return {"told": self.told, "environment": dict(self.environment)}


class EngineProcess:
    """An engine in a process forked from a zygote; see flashd/engines/engine.py for the protocol it keeps."""

    def __init__(self, number: int, kind: str, zygote: Zygote, settings: Settings) -> None:
        self.number = number
        self.kind = kind
        self.state = EngineState.ABSENT
        self.socket_path = settings.runtime / "engines" / f"{number}.sock"
        self.pid = 0
        self.started_at = 0.0
        self.on_exit: Callable[[str], None] = lambda last_words: None
        self._zygote = zygote
        self._settings = settings
        self._log = settings.logs / f"engine-{number}.log"
        self._channel: AsyncChannel | None = None
        self._name = f"{PREFIX}{number}"
        self._record: Record | None = None  # while it is kept beyond us
        # By the names that we and it call them: what it holds, and while it takes something else, that too.
        self._holdings: dict[str, Holding] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self, binding: Binding) -> Made | None:
        self._enter(EngineState.STARTING)
        self.socket_path.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = pair()
        with theirs, listen(self.socket_path, self._settings.socket_mode) as listener:
            try:
                self.pid = await self._zygote.fork(theirs, self._log, listener)
            except BaseException:
                ours.close()
                self._clean_up()
                raise
        self._channel = AsyncChannel(ours)
        self._watcher = asyncio.create_task(self._watch(), name=f"engine {self.number}")
        try:
            made = await asyncio.wait_for(
                self._bind("start", binding, self._settings.told), self._settings.start_timeout_s
            )
        except TimeoutError:
            hint = f"raise engines.start_timeout_s; {self._log} has what it wrote"
            raise EngineFailed(
                f"the engine did not start in {self._settings.start_timeout_s:.0f} s", hint=hint
            ) from None
        self.started_at = time.time()
        self._enter(EngineState.SERVING)
        self._keep()
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

    @property
    def is_kept(self) -> bool:
        return self._record is not None and self._zygote.is_kept

    def has_become(self, forms: tuple[str, ...]) -> None:
        self._holdings = {token: replace(holding, forms=forms) for token, holding in self._holdings.items()}
        self._write_down()

    @classmethod
    def found(cls, left: Kept, zygote: Zygote, settings: Callable[[EngineOptions], Settings]) -> EngineProcess:
        """One that a daemon before us left; it is yet to rejoin. `settings` are what it would be started with today.

        Raises InvalidArgument, also if it was started with others.
        """
        said = left.content
        try:
            (options, *_) = {_understood(holding).options for holding in said["holdings"].values()}
            engine = cls(int(said["number"]), str(said["kind"]), zygote, settings(options))
            engine.pid, engine.started_at = int(said["pid"]), float(said["started_at"])
            engine._holdings = {token: _understood(holding) for token, holding in said["holdings"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InvalidArgument("its record is not of an engine") from None
        if not engine._settings.lasting.items() <= said.items():
            raise InvalidArgument("it was started with other settings")
        engine._record = left.record
        engine._channel = AsyncChannel(socket.socket(fileno=left.channel))
        return engine

    async def rejoin(self) -> Rejoined:
        await self._zygote.build()
        if not self._zygote.has(self.pid):
            raise EngineFailed("its process has ended")
        self._watcher = asyncio.create_task(self._watch(), name=f"engine {self.number}")
        answer = await self._request({"op": "state"})
        token, gate = str(answer.get("binding")), answer.get("gate")
        holding = self._holdings.get(token)
        if holding is None or not holding.forms or gate not in set(GateState):
            raise EngineFailed("nobody knows what it holds")
        self._holdings = {token: holding}
        self._write_down()
        self._enter(EngineState.PARKED if gate == GateState.PARKED else EngineState.SERVING)
        return Rejoined(holding, is_shut=gate != GateState.OPEN)

    async def leave(self) -> None:
        self._stopping = True
        if self._record is not None:
            self._record.close()
            self._record = None  # what comes of an order that is under way is for others to find out
        if self._watcher is not None:
            self._watcher.cancel()
        if self._channel is not None:
            await self._channel.close()

    async def stop(self) -> None:
        self._stopping = True
        self._forget()
        if self._channel is not None:
            await self._channel.close()  # the worker takes this as the word to go
        if self._watcher is not None:
            try:
                await asyncio.wait_for(asyncio.shield(self._watcher), _STOP_GRACE_S)
            except TimeoutError:
                await self._zygote.kill(self.pid)
                await self._watcher
        self._clean_up()

    async def stats(self) -> EngineStats:
        answer = await self._request({"op": "stats"})
        return EngineStats(int(answer["active_requests"]), int(answer["memory_bytes"]), int(answer["seen_requests"]))

    async def _bind(self, op: str, binding: Binding, options: Mapping[str, Any] | None = None) -> Made | None:
        """Sends weights and side files as descriptors: the worker opens nothing of ours by name."""
        token, held = secrets.token_hex(8), self._holdings
        holding = Holding(
            binding.model_name, binding.names, binding.checkpoint_id, binding.private_to, binding.options,
            forms=() if binding.wants_image else binding.forms,
        )  # fmt: skip
        content = {
            "op": op,
            "binding": token,
            "model_name": binding.model_name,
            "names": list(binding.names),
            "arena_bytes": binding.arena_bytes,
            "layout": binding.layout,
            "side_files": {name: binding.digests[name] for name in sorted(binding.side_files)},
            "checkpoint_layout": binding.checkpoint_layout,
            "devices": list(binding.devices),
            "is_image": binding.is_image,
            "wants_image": binding.wants_image,
            "further": [{"arena_bytes": rank.size_bytes, "layout": rank.layout} for rank in binding.further],
            **(options or {}),
        }
        opened: list[int] = []
        self._holdings = {**held, token: holding}
        self._write_down()
        try:
            opened += [
                os.open(binding.side_files[name], os.O_RDONLY | os.O_CLOEXEC) for name in sorted(binding.side_files)
            ]
            arenas = (binding.arena_fd, *(rank.fd for rank in binding.further))
            answer = await self._exchange(content, (*arenas, *opened))
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):  # else it may take it yet
                self._holdings = held
                self._write_down()
            if isinstance(error, OSError):
                why = f"{error.filename}: {error.strerror}"
                raise EngineFailed(why, hint="flash verify checks the model") from None
            raise
        finally:
            close_all(opened)
        made = _made(answer)
        if made is None and binding.wants_image:
            log.warning(
                "engine %d keeps the weights of %s to itself: see %s", self.number, binding.model_name, self._log
            )
        self._holdings = {token: holding if made else replace(holding, forms=binding.forms)}
        self._write_down()
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
            if self._watcher is not None:
                await asyncio.wait({self._watcher})
            hint = f"{self._log} has all that it wrote"
            raise EngineFailed(f"{error.message}: {self._epitaph()}", hint=hint) from None

    def _keep(self) -> None:
        """From now on it outlives us, if somebody keeps it."""
        assert self._channel is not None
        record = Record.new(self._described())
        if self._settings.keeper.keep(self._name, (self._channel.fileno(), record.fd)):
            self._record = record
        else:
            record.close()

    def _write_down(self) -> None:
        if self._record is not None:
            self._record.write(self._described())

    def _described(self) -> dict[str, Any]:
        return {
            "name": self._name,
            "number": self.number,
            "kind": self.kind,
            "zygote": self._zygote.name,
            "pid": self.pid,
            "started_at": self.started_at,
            **self._settings.lasting,
            "holdings": {token: dataclasses.asdict(holding) for token, holding in self._holdings.items()},
        }

    def _forget(self) -> None:
        if self._record is not None:
            self._settings.keeper.forget(self._name)
            self._record.close()
            self._record = None

    async def _watch(self) -> None:
        status = await self._zygote.wait(self.pid)
        if self._channel is not None:
            await self._channel.close()
        self._clean_up()
        if not self._stopping:
            reason = f"signal {-status}" if status < 0 else f"status {status}"
            self.on_exit(f"{reason}; {self._epitaph()}")

    def _clean_up(self) -> None:
        """What is left of it here when its process has ended."""
        self.state = EngineState.FAILED
        self.socket_path.unlink(missing_ok=True)
        self._forget()

    def _epitaph(self) -> str:
        # What multiprocessing has to say after an end is not why.
        lines = [line for line in last_words(self._log).splitlines() if "resource_tracker" not in line]
        return lines[-1] if lines else "it left no words"

    def _enter(self, state: EngineState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise EngineFailed(f"the engine is {self.state}, and cannot become {state}")
        self.state = state


def _understood(holding: Mapping[str, Any]) -> Holding:
    options = EngineOptions(tuple(holding["options"]["arguments"]), holding["options"]["kv_cache_bytes"])
    lists = {name: tuple(holding[name]) for name in ("names", "forms")}
    return Holding(**{**holding, **lists, "options": options})


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
        self._retiring: asyncio.Future[None] | None = None

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
        if self._former:
            self._retiring = asyncio.ensure_future(self._retire())
        settings = self._with(options)
        return EngineProcess(next(settings.numbers), self.kind, self._zygote, settings)

    def _with(self, options: EngineOptions) -> Settings:
        return dataclasses.replace(self._settings, options=self._told(options))

    def _told(self, options: EngineOptions) -> Mapping[str, Any]:  # noqa: ARG002 -- for vLLM
        """What an engine's own options are with what one model has different."""
        return self._settings.options

    def rejoin(self, kept: Sequence[Kept]) -> Sequence[EngineProcess]:
        """As the protocol says; of zygotes the last that runs what new engines shall run in makes those too."""
        zygotes = {}
        for left in kept:
            if left.name.startswith(ZYGOTE_PREFIX) and left.content.get("kind") == self.kind:
                zygotes[left.name] = zygote = self._new_zygote()
                zygote.rejoin(left)
                if left.content.get("stamp") == self._program().stamp and not self._zygote.is_begun:
                    self._zygote = zygote
                else:
                    self._former.append(zygote)
        engines = []
        for left in kept:
            if left.name.startswith(PREFIX) and left.content.get("kind") == self.kind:
                try:
                    engines.append(EngineProcess.found(left, zygotes[left.content["zygote"]], self._with))
                except (InvalidArgument, KeyError) as error:
                    log.warning("%s is let go of: %s", left.name, error)
                    self._settings.keeper.forget(left.name)
                    left.close()
        return engines

    async def run_in(self, python: str) -> None:
        """Engines made from now on run in this interpreter; those that there are stay what they are."""
        if python != self._settings.python:
            self._former.append(self._zygote)
            self._settings = dataclasses.replace(self._settings, python=python)
            self._zygote = self._new_zygote()
        await self._retire()

    async def _retire(self) -> None:
        """Ends the zygotes of which nothing runs any more, and nothing will."""
        idle = [zygote for zygote in self._former if not zygote.has_workers]
        self._former = [zygote for zygote in self._former if zygote not in idle]
        for zygote in idle:
            await zygote.close()

    async def close(self) -> None:
        for zygote in (self._zygote, *self._former):
            if zygote.is_kept:
                await zygote.leave()
            else:
                await zygote.close()

    def _new_zygote(self) -> Zygote:
        return Zygote(self._program(), self._settings.keeper)

    def _program(self) -> Program:
        chosen = self._settings
        return Program(
            kind=self.kind,
            python=chosen.python,
            module=self._module,
            environment=chosen.environment,
            logs=chosen.logs,
            folder=chosen.runtime / "scratch",
            remedy=self._remedy,
            service=chosen.service,
        )


def torch_factory(settings: Settings) -> ZygoteFactory:
    remedy = "flash engine install torch, or set engines.torch.python to an interpreter that has torch and flashd"
    return ZygoteFactory("torch", "flashd.engines.torch.zygote", settings, remedy=remedy)
