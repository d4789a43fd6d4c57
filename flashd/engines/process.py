# SPDX-License-Identifier: Apache-2.0
"""The daemon's side of engine processes and of the factories that start them."""

from __future__ import annotations

import asyncio
import base64
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
from typing import Annotated, TypeVar

from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.gguf.traits import SIDE_FILE as GGUF
from flashd.engines import codec, messages
from flashd.engines.codec import WIRE_NAME, Misunderstood, Range
from flashd.engines.control import AsyncChannel, Frame, Parcel, pair
from flashd.engines.engine import (
    NO_OPTIONS,
    TRANSITIONS,
    Binding,
    BindingRecord,
    EngineImage,
    EngineOptions,
    EngineState,
    EngineStats,
    GpuPlan,
    RankMemory,
    Rejoined,
)
from flashd.engines.inherited import PREFIX, ZYGOTE_PREFIX, InheritedProcess, Keeper, NoKeeper, Record
from flashd.engines.kv_cache import AUTO
from flashd.engines.messages import ArenaLayout, GateState, GivenWeights, Message, Order, PassedOn, Taken, Tuning
from flashd.engines.process_info import listen
from flashd.engines.zygote_client import Program, Zygote, last_words
from flashd.errors import EngineFailed, InvalidArgument
from flashd.tasks import close_all
from flashd.units import GiB

log = logging.getLogger(__name__)

_STOP_GRACE_S = 1.0
_CACHE_BYTES = 2 * GiB  # of an "auto" KV cache without a GPU, whose memory we would know

A = TypeVar("A", bound=Message)


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings with which all engines of a factory are started.

    `environment` has variables for the zygote, and so for its engines, in addition to ours; `options` is tuning for
    this kind of engine only; `numbers` is shared by all factories of a daemon. `keeper` keeps engines for the next
    daemon.
    """

    python: str
    runtime: Path  # for sockets, and for private folders unless `service` provides them
    logs: Path
    threads: int
    max_tokens_default: int
    start_timeout_s: float
    socket_mode: int = 0o600  # mode of the engines' sockets: for this user, or for its group too
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    keeper: Keeper = field(default_factory=NoKeeper)
    # Accepts clients' connections from engines that no longer serve, with bytes read from them. None: engines refuse.
    passed_on: Callable[[socket.socket, bytes, int | None], None] | None = None
    service: Path | None = None  # socket of the unit that runs zygotes; None: they are our children

    @property
    def tuning(self) -> Tuning:
        """Options for all engines, unless a model has other options."""
        own: dict[str, object] = {"threads": self.threads, "max_tokens_default": self.max_tokens_default}
        return codec.from_json(Tuning, {**own, **self.options}, "an engine's options")


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """The record of an engine for the next daemon.

    `bindings` has its binding by the daemon's name for it, and, while the engine takes another one, that one too.
    """

    name: str
    number: Annotated[int, Range(1, 1 << 62)]
    kind: str
    zygote: str
    pid: messages.ProcessId
    started_at: float
    tuning: Tuning = field(metadata={WIRE_NAME: "told"})
    environment: Mapping[str, str]
    bindings: Mapping[str, BindingRecord] = field(metadata={WIRE_NAME: "holdings"})
    identity: str = ""


class EngineProcess:
    """An engine in a process forked from a zygote. flashd/engines/engine.py documents the protocol."""

    def __init__(self, number: int, kind: str, zygote: Zygote, settings: Settings, tuning: Tuning) -> None:
        self.number = number
        self.kind = kind
        self.identity = secrets.token_hex(16)
        self.state = EngineState.ABSENT
        self.socket_path = settings.runtime / "engines" / f"{number}.sock"
        self.pid = 0
        self.started_at = 0.0
        self.cache_bytes = tuning.kv_cache_bytes
        self.on_exit: Callable[[str], None] = lambda last_words: None
        self._zygote = zygote
        self._settings = settings
        self._tuning = tuning
        self._log = settings.logs / f"engine-{number}.log"
        self._channel: AsyncChannel | None = None
        self._name = f"{PREFIX}{number}"
        self._record: Record | None = None  # while it is kept for the next daemon
        # By the daemon's names: the current binding, and, while the engine takes another one, that one too.
        self._records: dict[str, BindingRecord] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self, binding: Binding) -> EngineImage | None:
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
        self._channel.on_notice = self._noticed
        self._watcher = asyncio.create_task(self._watch(), name=f"engine {self.number}")
        try:
            image = await asyncio.wait_for(
                self._bind(self._start_order, binding),
                self._settings.start_timeout_s,
            )
        except TimeoutError:
            hint = f"see {self._log}, or raise engines.start_timeout_s"
            raise EngineFailed(
                f"the engine did not start within {self._settings.start_timeout_s:.0f} s", hint=hint
            ) from None
        self.started_at = time.time()
        self._enter(EngineState.SERVING)
        self._keep()
        return image

    async def drain(self, timeout_s: float, *, leaving: bool = False) -> None:
        await self._request(messages.Drain(timeout_s, leaving))

    async def resume(self) -> None:
        await self._request(messages.Resume())

    async def park(self) -> None:
        await self._request(messages.Park())
        self._enter(EngineState.PARKED)

    async def wake(self, binding: Binding) -> EngineImage | None:
        image = await self._bind(messages.Wake, binding)
        self._enter(EngineState.SERVING)
        return image

    async def rebind(self, binding: Binding) -> EngineImage | None:
        return await self._bind(messages.Rebind, binding)

    @property
    def is_kept(self) -> bool:
        return self._record is not None and self._zygote.is_kept

    def has_become(self, arena_ids: tuple[str, ...]) -> None:
        self._records = {token: replace(record, arena_ids=arena_ids) for token, record in self._records.items()}
        self._write_down()

    @classmethod
    def found(
        cls, left: InheritedProcess, zygote: Zygote, settings: Settings, tuning: Callable[[EngineOptions], Tuning]
    ) -> EngineProcess:
        """Makes the engine that an earlier daemon left. It still has to rejoin.

        `settings` and `tuning` are those with which it would be started today. Raises InvalidArgument for a wrong
        record, or if the engine was started with other settings.
        """
        try:
            record = codec.from_json(EngineRecord, left.content, "its record")
        except Misunderstood as error:
            raise InvalidArgument(f"its record is not of an engine: {error.message}") from None
        if not record.bindings:
            raise InvalidArgument("its record lacks its binding")
        (options, *_) = {binding.model.options for binding in record.bindings.values()}
        today = tuning(options)
        if today.kv_cache_bytes == AUTO and record.tuning.kv_cache_bytes > 0:
            today = replace(today, kv_cache_bytes=record.tuning.kv_cache_bytes)  # what was free then
        engine = cls(record.number, record.kind, zygote, settings, today)
        engine.pid, engine.started_at, engine.identity = record.pid, record.started_at, record.identity
        engine._records = dict(record.bindings)
        if (engine._tuning, dict(settings.environment)) != (record.tuning, record.environment):
            raise InvalidArgument("it was started with other settings")
        engine._record = left.record
        engine._channel = AsyncChannel(socket.socket(fileno=left.channel))
        engine._channel.on_notice = engine._noticed
        return engine

    async def rejoin(self) -> Rejoined:
        await self._zygote.build()
        if not self._zygote.has(self.pid):
            raise EngineFailed("its process has ended")
        self._watcher = asyncio.create_task(self._watch(), name=f"engine {self.number}")
        condition = await self._request(messages.AskCondition())
        record = self._records.get(condition.binding)
        if record is None or not record.arena_ids:
            raise EngineFailed("its binding is unknown")
        self._records = {condition.binding: record}
        self._write_down()
        self._enter(EngineState.PARKED if condition.gate is GateState.PARKED else EngineState.SERVING)
        return Rejoined(record, is_shut=condition.gate is not GateState.OPEN)

    async def leave(self) -> None:
        self._stopping = True
        if self._record is not None:
            self._record.close()
            self._record = None  # the next daemon will ask for the outcome of an order in progress
        if self._watcher is not None:
            self._watcher.cancel()
        if self._channel is not None:
            await self._channel.close()

    async def stop(self) -> None:
        self._stopping = True
        self._forget()
        if self._channel is not None:
            await self._channel.close()  # the worker takes this as the order to end
        if self._watcher is not None:
            try:
                await asyncio.wait_for(asyncio.shield(self._watcher), _STOP_GRACE_S)
            except TimeoutError:
                await self._zygote.kill(self.pid)
                await self._watcher
        self._clean_up()

    async def stats(self) -> EngineStats:
        load = await self._request(messages.AskLoad())
        return EngineStats(load.active_requests, load.memory_bytes, load.seen_requests)

    def _start_order(self, given: GivenWeights) -> messages.Start:
        return messages.Start(given, self._tuning, passes_on=self._settings.passed_on is not None)

    async def make_image(self, binding: Binding) -> EngineImage | None:
        try:
            return await self._given(messages.MakeImage, secrets.token_hex(8), binding)
        except Misunderstood:
            await self.stop()
            raise

    async def _bind(self, order: Callable[[GivenWeights], Order[Taken]], binding: Binding) -> EngineImage | None:
        token, held = secrets.token_hex(8), self._records
        weights = binding.weights
        record = BindingRecord(binding.model, () if weights.wants_image else weights.arena_ids)
        self._records = {**held, token: record}
        self._write_down()
        try:
            image = await self._given(order, token, binding)
        except Misunderstood:
            await self.stop()  # whether it has taken the weights is unknown
            raise
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):  # or it may still take them
                self._records = held
                self._write_down()
            raise
        self._records = {token: record if image else replace(record, arena_ids=weights.arena_ids)}
        self._write_down()
        return image

    async def _given(
        self, order: Callable[[GivenWeights], Order[Taken]], token: str, binding: Binding
    ) -> EngineImage | None:
        """Sends weights and side files as descriptors, because the worker cannot open our files by name.

        `token` is our name for the binding. Returns the image that was made of the weights.
        """
        weights, files = binding.weights, sorted(binding.side_files.items())
        first, *further = (ArenaLayout(rank.size_bytes, rank.layout) for rank in weights.ranks)
        given = GivenWeights(
            binding=token,
            model_name=binding.model.name,
            names=binding.model.served_names,
            first=first,
            side_files={name: file.digest for name, file in files},
            checkpoint_layout=weights.checkpoint_layout,
            devices=binding.devices,
            is_image=weights.is_image,
            wants_image=weights.wants_image,
            further=tuple(further),
            checkpoint_id=binding.model.checkpoint_id,
        )
        opened: list[int] = []
        try:
            opened += [os.open(file.path, os.O_RDONLY | os.O_CLOEXEC) for _, file in files]
            arenas = [rank.fd for rank in weights.ranks]
            image = _image(await self._exchange(order(given), (*arenas, *opened)))
        except OSError as error:
            why = f"{error.filename}: {error.strerror}"
            raise EngineFailed(why, hint="check the model with flash verify") from None
        finally:
            close_all(opened)
        if image is None and weights.wants_image:
            log.warning(
                "engine %d could not make an image of the weights of %s: see %s",
                self.number,
                binding.model.name,
                self._log,
            )
        return image

    def _noticed(self, frame: Frame) -> None:
        """Accepts a client's connection from a worker, after checking that it is one, since workers are not trusted."""
        try:
            notice = codec.from_json(PassedOn, frame.content, "a notice")
            if self._settings.passed_on is None or len(frame.fds) != 1:
                raise Misunderstood("the notice must have one descriptor")
            connection = socket.socket(fileno=frame.fds[0])
        except (EngineFailed, OSError) as error:
            log.warning("engine %d sent an invalid message: %s", self.number, error)
            close_all(frame.fds)
            return
        try:
            if (connection.family, connection.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
                raise ValueError("not a client's connection")
            connection.setblocking(False)
            engine = None if notice.is_for_active else self.number
            self._settings.passed_on(connection, base64.b64decode(notice.passed_on), engine)
        except (OSError, ValueError) as error:
            log.warning("engine %d passed on something other than a connection: %s", self.number, error)
            connection.close()

    async def _request(self, order: Order[A]) -> A:
        answer = await self._exchange(order)
        close_all(answer.fds)
        return answer.message

    async def _exchange(self, order: Order[A], fds: tuple[int, ...] = ()) -> Parcel[A]:
        if self._channel is None:
            raise EngineFailed("the engine is not running")
        try:
            return await self._channel.exchange(order, fds)
        except EngineFailed as error:
            if not self._channel.closed.is_set():
                raise
            if self._watcher is not None:
                await asyncio.wait({self._watcher})
            hint = f"see its log, {self._log}"
            raise EngineFailed(f"{error.message}: {self._epitaph()}", hint=hint) from None

    def _keep(self) -> None:
        """Hands the engine's descriptors to the keeper, so that it outlives us."""
        assert self._channel is not None
        record = Record.new(self._described())
        if self._settings.keeper.keep(self._name, (self._channel.fileno(), record.fd)):
            self._record = record
        else:
            record.close()

    def _write_down(self) -> None:
        if self._record is not None:
            self._record.write(self._described())

    def _described(self) -> dict[str, object]:
        return codec.to_json(
            EngineRecord(
                name=self._name,
                number=self.number,
                kind=self.kind,
                zygote=self._zygote.name,
                pid=self.pid,
                started_at=self.started_at,
                tuning=self._tuning,
                environment=self._settings.environment,
                bindings=self._records,
                identity=self.identity,
            )
        )

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
        """Removes its files, descriptors and record when the process has ended."""
        self.state = EngineState.FAILED
        self.socket_path.unlink(missing_ok=True)
        self._forget()

    def _epitaph(self) -> str:
        # Messages of multiprocessing after the end are not the cause.
        lines = [line for line in last_words(self._log).splitlines() if "resource_tracker" not in line]
        return lines[-1] if lines else "its log is empty"

    def _enter(self, state: EngineState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise EngineFailed(f"the engine is {self.state}, and cannot become {state}")
        self.state = state


def _image(answer: Parcel[Taken]) -> EngineImage | None:
    """Returns the image that a worker has made, if any. It is checked later, when it is adopted."""
    made = answer.message.made
    if not made:
        close_all(answer.fds)
        return None
    if len(made) != len(answer.fds):
        close_all(answer.fds)
        raise Misunderstood(f"an answer has {len(made)} images, but {len(answer.fds)} descriptors")
    ranks = zip(made, answer.fds, strict=True)
    parts = tuple(RankMemory(fd, image.size_bytes, image.layout) for image, fd in ranks)
    return EngineImage(parts, is_own=any(image.is_own for image in made))


class ZygoteFactory:
    """Makes engines whose processes are forked from one zygote."""

    copies_checkpoints = False

    def __init__(self, kind: str, module: str, settings: Settings, *, remedy: str) -> None:
        """`remedy` is the hint for an interpreter that lacks the modules which the zygote imports."""
        self.kind = kind
        self._module = module
        self._remedy = remedy
        self._settings = settings
        self._zygote = self._new_zygote()
        self._former: list[Zygote] = []  # of former interpreters, in which engines still run
        self._retiring: asyncio.Future[None] | None = None

    def begin(self) -> None:
        """Starts the zygote's imports in the background, so that the first engine starts as fast as later ones."""
        self._zygote.begin()

    def refusal(self, architecture: str, side_files: Mapping[str, Path]) -> str:
        if GGUF in side_files:
            return f"it is a GGUF file, with which only llama.cpp answers, and not {self.kind}"
        if "config.json" not in side_files:
            return "it has no config.json, so the architecture of its weights is unknown"
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

    def create(self, options: EngineOptions = NO_OPTIONS, *, cache_bytes: int = 0) -> EngineProcess:
        if self._former:
            self._retiring = asyncio.ensure_future(self._retire())
        settings, tuning = self._settings, self._tuning(options)
        if tuning.kv_cache_bytes == AUTO:
            tuning = replace(tuning, kv_cache_bytes=cache_bytes or _CACHE_BYTES)
        return EngineProcess(next(settings.numbers), self.kind, self._zygote, settings, tuning)

    def _tuning(self, options: EngineOptions) -> Tuning:  # noqa: ARG002 -- for vLLM
        """Returns the options of an engine for a model with these options."""
        return self._settings.tuning

    def rejoin(self, kept: Sequence[InheritedProcess]) -> Sequence[EngineProcess]:
        """Rejoins engines as in the protocol. The last zygote that suits new engines also makes those."""
        zygotes = {}
        for left in kept:
            if left.name.startswith(ZYGOTE_PREFIX) and left.content.get("kind") == self.kind:
                zygotes[left.name] = zygote = self._new_zygote()
                zygote.rejoin(left)
                if left.content.get("stamp") == list(self._program().stamp) and not self._zygote.is_begun:
                    self._zygote = zygote
                else:
                    self._former.append(zygote)
        engines = []
        for left in kept:
            if left.name.startswith(PREFIX) and left.content.get("kind") == self.kind:
                try:
                    zygote = zygotes[str(left.content["zygote"])]
                    engines.append(EngineProcess.found(left, zygote, self._settings, self._tuning))
                except (InvalidArgument, KeyError) as error:
                    log.warning("%s is not taken over: %s", left.name, error)
                    self._settings.keeper.forget(left.name)
                    left.close()
        return engines

    async def run_in(self, python: str) -> None:
        """Selects the interpreter for new engines. Existing engines are not affected."""
        if python != self._settings.python:
            self._former.append(self._zygote)
            self._settings = dataclasses.replace(self._settings, python=python)
            self._zygote = self._new_zygote()
        await self._retire()

    async def _retire(self) -> None:
        """Ends zygotes without workers that are not needed for new engines."""
        idle = [zygote for zygote in self._former if not zygote.has_workers]
        self._former = [zygote for zygote in self._former if zygote not in idle]
        for zygote in idle:
            await zygote.close()

    async def close(self, *, leaving: bool = True) -> None:
        for zygote in (self._zygote, *self._former):
            if leaving and zygote.is_kept:
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
    return ZygoteFactory("torch", "flashd.workers.torch.main", settings, remedy=remedy)
