# SPDX-License-Identifier: Apache-2.0
"""The vLLM engine process: serves vLLM's OpenAI server behind our gate, and carries out the daemon's orders.

This process is the server; vLLM runs its scheduler and each rank in processes below it, which end with it. vLLM forks
from the main thread, where the event loop runs: a child ends with the thread that forked it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import re
import select
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashd.checkpoint import fitting, header, manifest
from flashd.checkpoint.files import WEIGHTS
from flashd.checkpoint.lora.applied import AppliedAdapter
from flashd.checkpoint.source.reader import pooling_path
from flashd.config.environment import show_gpus
from flashd.engines.control import Channel, Parcel
from flashd.engines.kv_cache import MOST_SEQUENCES
from flashd.engines.messages import GivenWeights, RankShare, Refusal, Start, Taken, Tuning
from flashd.engines.process_info import lacks_memory, read_all
from flashd.errors import EngineFailed, FlashdError, Unsupported
from flashd.io import sandbox
from flashd.tasks import close_all
from flashd.units import MiB
from flashd.workers.guard import Guard
from flashd.workers.templates import Renderer
from flashd.workers.vllm import adapters, compat, model_folder, rank_server
from flashd.workers.vllm.answers import Described
from flashd.workers.vllm.plugin import LOAD_FORMAT
from flashd.workers.vllm.prefixes import Salts
from flashd.workers.vllm.rank_server import Handover
from flashd.workers.worker import Worker, receive_start

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from vllm.engine.protocol import EngineClient

# The model's folder, relative to the working directory, the scratch folder. The path is fixed, because it is a part of
# the key under which vLLM caches compiled code.
_MODEL = "./model"
_EXTENSION = "flashd.workers.vllm.extension.Extension"
_GPU_WORKER = "flashd.workers.vllm.gpu_worker.GpuWorker"
_LOOK_S = 0.5  # interval of checks that the engine core is alive
_RESET_S = 30.0
_LOG_BYTES = 4 * MiB
_CAUSE = re.compile(r"(?:^|[\s)])((?:\w+\.)*\w*(?:Error|Exception|Interrupt)|flashd\.errors\.\w+): (.+)$")
_NO_ERROR = re.compile(r"\b(?:WARNING|INFO|DEBUG) \d\d-\d\d ")  # errors that vLLM logs but tolerates
_BUSY = "busy or unavailable"  # CUDA's error if a GPU lacks memory even for a context
_BUSY_HINT = "other programs may use all of its memory, or use the GPU exclusively: see nvidia-smi"
_NO_CAUSE = ("root cause", "EngineDeadError", "Engine core initialization failed")  # errors that only refer to others


def main(channel: Channel, listener: socket.socket) -> int:
    """Runs until the daemon closes the channel. Returns the exit status."""
    sandbox.restrict(network=True, writes=True)  # ranks find each other over the loopback interface
    os.umask(0o077)
    Renderer().take_over()
    os.register_at_fork(after_in_child=lambda: _child(channel, listener))
    return asyncio.run(_run(channel, listener, receive_start(channel)))


async def _run(channel: Channel, listener: socket.socket, first: Parcel[Start]) -> int:
    return await _Worker(channel, listener, first.message).run(first)


def _child(channel: Channel, listener: socket.socket) -> None:
    """Prepares a forked process of vLLM: it ends with its parent in all cases, and does not keep our sockets."""
    sandbox.end_with_parent(signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)  # the parent ended before the request
    for end in (channel.socket, listener):
        with contextlib.suppress(OSError):
            end.close()


class _Worker(Worker):
    def __init__(self, channel: Channel, listener: socket.socket, start: Start) -> None:
        super().__init__(channel, passes_on=start.passes_on)
        self.binding = start.given.binding
        self._listener = listener
        self._tuning = start.tuning
        tempfile.tempdir = str(Path.cwd())  # so that files left by vLLM are removed with our folder
        self._handover = Handover(Path(rank_server.SOCKET))
        os.register_at_fork(after_in_child=self._handover.forsake)
        self._client: EngineClient = None
        self._app: Starlette = None
        self._is_starting = False
        self._adapters: list[AppliedAdapter] = []
        self._salts = Salts()
        self._has_lost_cache = False  # since it was parked

    async def run(self, first: Parcel[Start]) -> int:
        """Runs the engine. Returns only if it cannot start, because a hang-up or a death ends the process at once."""
        # From here on a hang-up of the daemon ends us, even during the long start of vLLM.
        watch = threading.Thread(target=self._leave_with_the_daemon, daemon=True, name="start")
        try:
            arguments = self._prepare(first.message.given, first.fds)
            compat.fork_processes()
            compat.answer_is_idle()  # in what is forked; what is spawned is told by our plugin
            compat.tokenise_at_once()
            compat.nap_between_steps()
            compat.name_shared_memory()
            self._is_starting = True
            watch.start()
            async with compat.engine_client(arguments) as client:
                self._client = client
                compat.before_each_request(client, self._salts.add)
                self._app = await compat.application(client, arguments)
                await self._enter(first.message.given)
                self._handover.drop()
                await self._serve()
            return 0
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- the boundary of starting
            traceback.print_exc()
            self._is_starting = False
            self.channel.send(_refusal(error))
            return 1

    def _leave_with_the_daemon(self) -> None:
        """Ends this process when the channel becomes readable, since before `start` is answered only a hang-up can
        come.
        """
        while self._is_starting:
            ready, _, _ = select.select([self.channel.socket], [], [], 0.1)
            if ready and self._is_starting:
                os._exit(0)

    async def _serve(self) -> None:
        http = self.http(Guard(Described(self._app), self.gate))
        self._app.state.server = http  # vLLM looks for it here when its engine dies
        serving = asyncio.create_task(http.serve(sockets=[self._listener]))
        while not http.started and not serving.done():  # noqa: ASYNC110 -- uvicorn has no event for it
            await asyncio.sleep(0.005)
        self.gate.open()
        self._is_starting = False
        taken = self._taken()
        self.channel.send(taken.message, taken.fds)
        close_all(taken.fds)
        self.obey()
        written = _log_bytes()
        while not serving.done():
            if self._client.errored:
                _die(_root_cause(written) or "vLLM's engine core has died")
            written = _log_bytes()
            await asyncio.wait({serving}, timeout=_LOOK_S)

    def take(self, given: GivenWeights, fds: tuple[int, ...]) -> Parcel[Taken]:
        self.on_loop(self._take(given, fds))
        return self._taken()

    def make_image(self, given: GivenWeights, fds: tuple[int, ...]) -> Parcel[Taken]:
        self.on_loop(self._make_image(given, fds))
        return self._taken()

    def let_go(self) -> None:
        self._has_lost_cache = True
        self.on_loop(self._client.collective_rpc("flashd_park"))

    def _taken(self) -> Parcel[Taken]:
        """Returns the answer to the daemon, with the image made meanwhile, if any."""
        made = self._handover.take_made()
        return Parcel(Taken(tuple(rank.message for rank in made)), tuple(fd for rank in made for fd in rank.fds))

    def _prepare(self, given: GivenWeights, fds: tuple[int, ...]) -> argparse.Namespace:
        """Makes the model's folder and vLLM's arguments. Raises EngineFailed if vLLM does not know one of them."""
        if given.devices:
            show_gpus([int(device.removeprefix("cuda:")) for device in given.devices])
        ranks = _ranks(given, fds)
        Path(_MODEL).mkdir()
        for name, fd in zip(given.side_files, fds[len(ranks) :], strict=True):
            path = Path(_MODEL) / pooling_path(name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(read_all(fd))
        model_folder.check_pooling(Path(_MODEL))
        _check(ranks)
        tensors = model_folder.listed(given.checkpoint_layout if given.is_image else given.first.layout)
        config_json = (Path(_MODEL) / "config.json").read_bytes()
        if why := fitting.misfit(manifest.read_config(config_json), model_folder.shapes(tensors)):
            hint = "replace it with the config.json that belongs to the weights"
            raise EngineFailed(f"its config.json is of other weights: {why}", hint=hint)
        (Path(_MODEL) / WEIGHTS).write_bytes(header.framed(json.dumps(tensors)))
        self._adapters = [AppliedAdapter.read(setting) for setting in self._tuning.adapters]
        self._handover.hold(ranks)
        close_all(fds)
        try:
            arguments = compat.parse([*vllm_arguments(given.names, self._tuning, self._adapters)])
        except ValueError as error:
            hint = "correct engines.vllm.arguments, or the arguments of the model"
            raise EngineFailed(str(error), hint=hint) from None
        compat.tell_apart(arguments, model_folder.digest(tensors))
        if not model_folder.draws(Path(_MODEL)):
            compat.take_likeliest(arguments)
        return arguments

    async def _take(self, given: GivenWeights, fds: tuple[int, ...]) -> None:
        """Takes other weights in place.

        Faults of the weights themselves are detected before any change; if vLLM fails half-way, the process ends,
        because it would answer with a mixture of both models.
        """
        ranks = _ranks(given, fds)
        _check(ranks)
        written = _log_bytes()
        keeps = not self._has_lost_cache and compat.keeps_prefixes(self._client.vllm_config)
        self._salts.leave()
        try:
            self._handover.hold(ranks)
            # Both concurrently, because each is a round trip to the engine core. The first is carried out first: if no
            # request is left then, none computes with both models. No request is answered meanwhile.
            is_clean, _ = await asyncio.gather(
                compat.is_idle(self._client) if keeps else self._client.reset_prefix_cache(),
                self._client.collective_rpc("flashd_take"),
            )
            await forget(self._client, is_clean=is_clean)
            self._has_lost_cache = False
            compat.rename(self._app, given.names, _MODEL)
            await self._enter(given)
            self.binding = given.binding
        except Exception as error:  # noqa: BLE001 -- after any error, the engine holds a mixture of two models
            why = _root_cause(written)
            traceback.print_exc()
            _die(why or f"{type(error).__name__}: {error}")
        finally:
            self._handover.drop()
        self.open_gate()

    async def _make_image(self, given: GivenWeights, fds: tuple[int, ...]) -> None:
        """Has each rank make an image. If one fails half-way, the process ends, as for weights that it would serve."""
        if not given.wants_image:
            raise Unsupported("an image is made only of a checkpoint, and on a GPU")
        ranks = _ranks(given, fds)
        _check(ranks)
        written = _log_bytes()
        try:
            self._handover.hold(ranks)
            await self._client.collective_rpc("flashd_make_image")
        except Exception as error:  # noqa: BLE001 -- after any error, the model's layers may be in any state
            why = _root_cause(written)
            traceback.print_exc()
            _die(why or f"{type(error).__name__}: {error}")
        finally:
            self._handover.drop()

    async def _enter(self, given: GivenWeights) -> None:
        """Makes the model's adapters available, and names the model and them in the salts of requests.

        Adapters that vLLM refuses are left out and logged.
        """
        own = [adapter for adapter in self._adapters if adapter.is_of(given.names)]
        before = {adapter.name: adapter.id() for adapter in own}
        offered = {adapter.name: str(adapter.folder) for adapter in own}
        for name, why in (await compat.offer_adapters(self._app, offered)).items():
            print(f"the adapter {name} is not applied: {why}", file=sys.stderr, flush=True)
        # What vLLM has loaded of an adapter that changed meanwhile is unknown, so it gets no id.
        ids = {adapter.name: known for adapter in own if (known := adapter.id()) and known == before[adapter.name]}
        # A daemon of an older version does not tell the checkpoint's id; no other binding has the binding's name.
        self._salts.enter(given.checkpoint_id or given.binding, ids)


async def forget(client: EngineClient, *, is_clean: bool) -> None:
    """Drops cached results of other weights for images, and for prompts unless `is_clean`. Raises TimeoutError."""
    if not is_clean:
        await compat.abort_all(client)
    async with asyncio.timeout(_RESET_S):
        while not is_clean:  # cut requests are being dropped
            await asyncio.sleep(0.005)
            is_clean = await client.reset_prefix_cache()
    if compat.has_encoder(client.model_config):
        await client.reset_encoder_cache()


def vllm_arguments(names: Sequence[str], tuning: Tuning, applied: Sequence[AppliedAdapter]) -> Iterator[str]:
    """Returns the arguments for `vllm serve`. The user's take precedence, except where flashd depends on its own."""
    yield from ("--disable-log-stats", "--max-model-len", "auto")
    if not compat.is_cpu():
        # Limits the number of sizes for which graphs are captured, which takes most of the start.
        yield from ("--max-num-seqs", str(MOST_SEQUENCES))
    if tuning.kv_cache_bytes:
        yield from ("--kv-cache-memory-bytes", str(tuning.kv_cache_bytes))
        if not compat.is_cpu():
            # It has no effect on sizes here, but vLLM refuses to start unless this share is free, and other models
            # are in memory.
            yield from ("--gpu-memory-utilization", "0.01")
    yield from adapters.arguments(applied)
    yield from tuning.arguments
    yield from ("--model", _MODEL, "--served-model-name", *names)
    yield from ("--load-format", LOAD_FORMAT, "--worker-extension-cls", _EXTENSION)
    yield from ("--model-loader-extra-config", json.dumps({"handover": rank_server.SOCKET}))
    if compat.is_cpu():
        # Compiled code would contain the packed weights of the first model, and go on using them.
        yield "--enforce-eager"
    else:
        yield "--enable-sleep-mode"  # releases the KV cache while the engine is parked
    if compat.is_cuda():
        yield from ("--worker-cls", _GPU_WORKER)


def _ranks(given: GivenWeights, fds: Sequence[int]) -> list[Parcel[RankShare]]:
    """Returns the shares for vLLM's ranks: an image for each, or one checkpoint for all."""
    return [
        Parcel(RankShare(arena.arena_bytes, arena.layout, given.is_image, given.wants_image), (fd,))
        for arena, fd in zip(given.arenas, fds, strict=False)
    ]


def _check(ranks: Sequence[Parcel[RankShare]]) -> None:
    """Checks layouts and arenas before any change. Raises if one is invalid or does not fit."""
    for rank in ranks:
        arena_bytes, size_bytes = rank.message.arena_bytes, os.fstat(rank.fds[0]).st_size
        _check_layout(rank.message.layout, arena_bytes)
        # The driver checks the size of GPU memory when it is mapped.
        if not rank.message.is_image and size_bytes < arena_bytes:
            raise EngineFailed(f"the arena has {size_bytes} bytes, but its layout {arena_bytes}")


@functools.lru_cache(maxsize=32)  # cached: fine-tunes share a layout, and parsing it takes longer than mapping an image
def _check_layout(layout: str, arena_bytes: int) -> None:
    header.parse(layout.encode(), data_bytes=arena_bytes, path="the layout")


def _die(why: str) -> None:
    """Ends the process after writing `why`, because the daemon reports the last line of our log."""
    print(" ".join(why.split("\n")), file=sys.stderr, flush=True)
    os._exit(1)


def _refusal(error: BaseException) -> Refusal:
    """Explains in one line why the engine did not start."""
    said = error.message if isinstance(error, FlashdError) else _one_line(str(error)) or type(error).__name__
    if not isinstance(error, FlashdError) and any(word in said for word in _NO_CAUSE):
        said = _root_cause(0) or said
    return Refusal(
        f"vLLM {compat.VERSION}: {said}",
        error.hint if isinstance(error, FlashdError) else _BUSY_HINT if _BUSY in said else "",
        unsupported=isinstance(error, Unsupported) or "are not supported for now" in said,
        out_of_memory=lacks_memory(said),
    )


def _log_bytes() -> int:
    """Returns the length of the log, to which we and vLLM's processes write."""
    return os.fstat(2).st_size


def _root_cause(since: int) -> str:
    """Returns the first error in the log after `since` bytes. Later errors of vLLM's processes only refer to it."""
    with contextlib.suppress(OSError):
        said = os.pread(
            2, _LOG_BYTES, since
        )  # by its descriptor, because the file may belong to another user, the daemon's
        for line in said.decode(errors="replace").splitlines():
            is_error = not _NO_ERROR.search(line) and not any(word in line for word in _NO_CAUSE)
            if is_error and (found := _CAUSE.search(line)):
                return f"{found[1].rsplit('.', 1)[-1]}: {found[2]}"
    return ""


def _one_line(text: str) -> str:
    """Shortens an error to one line. pydantic's errors have several, of which the second or third has the message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        return " ".join(lines[1:]).split(" [type=", 1)[0]
    return lines[0] if lines else ""
