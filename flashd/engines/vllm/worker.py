# SPDX-License-Identifier: Apache-2.0
"""What does one vLLM engine do? It serves vLLM's OpenAI server behind our gate, and does what the daemon says.

This process is the server; vLLM runs its scheduler and each rank in processes below it, which end with it. The event
loop runs in the main thread (vLLM forks from there, and a child ends with the thread that forked it), the control
channel in a second.
"""

from __future__ import annotations

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from flashd import config, sandbox
from flashd.checkpoint import header
from flashd.checkpoint.files import WEIGHTS
from flashd.engines.control import Channel, Frame, close_all
from flashd.engines.gate import Gate
from flashd.engines.surroundings import OwnMemory, lacks_memory, read_all
from flashd.engines.vllm import adapters, folder, handover, versions
from flashd.engines.vllm.adapters import AppliedAdapter
from flashd.engines.vllm.guard import Guard
from flashd.engines.vllm.handover import Handover
from flashd.engines.vllm.plugin import LOAD_FORMAT
from flashd.errors import EngineFailed, FlashdError, Unsupported
from flashd.units import MiB

# The model's folder, in the scratch folder, which is the working directory. The path is a part of the key under
# which vLLM keeps what it compiled: one that stays, or nothing is found again.
_MODEL = "./model"
_EXTENSION = "flashd.engines.vllm.extension.Extension"
_MOST_SEQUENCES = "32"
_LOOK_S = 0.5  # how often we look whether the engine core lives
_RESET_S = 10.0
_LOG_BYTES = 4 * MiB
_CAUSE = re.compile(r"(?:^|[\s)])((?:\w+\.)*\w*(?:Error|Exception|Interrupt)|flashd\.errors\.\w+): (.+)$")
_NO_ERROR = re.compile(r"\b(?:WARNING|INFO|DEBUG) \d\d-\d\d ")  # vLLM tells what it gets along without, too
_BUSY = "busy or unavailable"  # CUDA, when a GPU has not even the memory for a context
_BUSY_HINT = "others may have all of its memory, or all of it to themselves: nvidia-smi shows them"
_NO_CAUSE = ("root cause", "EngineDeadError", "Engine core initialization failed")  # errors about errors


def main(channel: Channel, listener: socket.socket) -> int:
    """Runs until the daemon closes the channel. Returns the exit status."""
    sandbox.restrict(network=True, writes=True)  # ranks find each other over the loopback interface
    os.umask(0o077)
    os.register_at_fork(after_in_child=lambda: _child(channel, listener))
    frame = channel.receive()
    return asyncio.run(_Worker(channel, listener, frame.content).run(frame))


def _child(channel: Channel, listener: socket.socket) -> None:
    """vLLM's processes end with the one that forked them, however that ends, and have no say on our sockets."""
    sandbox.end_with_parent(signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)  # it ended before we asked
    for end in (channel.socket, listener):
        with contextlib.suppress(OSError):
            end.close()


class _Http(uvicorn.Server):  # type: ignore[misc]
    """uvicorn, without its signal handlers: only the daemon ends us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Worker:
    def __init__(self, channel: Channel, listener: socket.socket, options: dict[str, Any]) -> None:
        self._channel = channel
        self._listener = listener
        self._options = options
        self._gate = Gate()
        self._memory = OwnMemory()
        self._binding = options["binding"]  # what the daemon calls what we hold, or held before we were parked
        tempfile.tempdir = str(Path.cwd())  # what vLLM leaves behind is removed with our folder
        self._handover = Handover(Path(handover.SOCKET))
        os.register_at_fork(after_in_child=self._handover.forsake)
        self._client: Any = None
        self._app: Any = None
        self._is_starting = False
        self._adapters: list[AppliedAdapter] = []

    async def run(self, first: Frame) -> int:
        """Returns only if the engine cannot start: hanging up and dying end the process on the spot."""
        self._loop = asyncio.get_running_loop()
        # From here on the daemon's hanging up ends us, also while vLLM starts, which takes its time.
        watch = threading.Thread(target=self._leave_with_the_daemon, daemon=True, name="start")
        try:
            arguments = self._prepare(first)
            versions.fork_processes()
            self._is_starting = True
            watch.start()
            async with versions.engine_client(arguments) as client:
                self._client = client
                self._app = await versions.application(client, arguments)
                await self._offer_adapters(first.content["names"])
                self._handover.drop()
                await self._serve()
            return 0
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- the boundary of starting: vLLM raises what it likes
            traceback.print_exc()
            self._is_starting = False
            self._channel.send(_refusal(error))
            return 1

    def _leave_with_the_daemon(self) -> None:
        """No order comes before `start` is answered: what can be read meanwhile is the end."""
        while self._is_starting:
            ready, _, _ = select.select([self._channel.socket], [], [], 0.1)
            if ready and self._is_starting:
                os._exit(0)

    async def _serve(self) -> None:
        settings = uvicorn.Config(
            Guard(self._app, self._gate), log_level="warning", access_log=False, timeout_keep_alive=60
        )
        http = self._app.state.server = _Http(settings)  # where vLLM looks for it when its engine dies
        serving = asyncio.create_task(http.serve(sockets=[self._listener]))
        while not http.started and not serving.done():  # noqa: ASYNC110 -- uvicorn has no event for it
            await asyncio.sleep(0.005)
        self._gate.open()
        self._is_starting = False
        self._reply({})
        threading.Thread(target=self._obey, daemon=True, name="control").start()
        written = _log_bytes()
        while not serving.done():
            if self._client.errored:
                _die(_root_cause(written) or "vLLM's engine core has died")
            written = _log_bytes()
            await asyncio.wait({serving}, timeout=_LOOK_S)

    def _obey(self) -> None:
        """The control thread: one order at a time, until the daemon hangs up."""
        try:
            while True:
                frame = self._channel.receive()
                self._reply(self._answer(frame))
        except (EOFError, ConnectionError):
            os._exit(0)  # whatever is being generated, nobody is left to want it

    def _reply(self, content: dict[str, Any]) -> None:
        """With the image that was made meanwhile, if one was."""
        made = self._handover.take_made()
        fds = [fd for rank in made for fd in rank.fds]
        self._channel.send({**content, "made": [rank.content for rank in made]} if made else content, fds)
        close_all(fds)

    def _answer(self, frame: Frame) -> dict[str, Any]:
        try:
            return asyncio.run_coroutine_threadsafe(self._do(frame), self._loop).result() or {}
        except FlashdError as error:
            return {"error": error.message, "hint": error.hint, "unsupported": isinstance(error, Unsupported)}
        except Exception as error:  # noqa: BLE001 -- the boundary of an order
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            close_all(frame.fds)

    async def _do(self, frame: Frame) -> dict[str, Any] | None:
        match frame.content["op"]:
            case "wake" | "rebind":
                await self._take(frame)
                self._gate.open()
            case "drain":
                await self._gate.drain(frame.content["timeout_s"])
            case "resume":
                self._gate.open()
            case "park":
                self._gate.park()
                await self._client.collective_rpc("flashd_park")
            case "state":
                return {"binding": self._binding, "gate": self._gate.state}
            case "stats":
                return {
                    "active_requests": self._gate.active,
                    "memory_bytes": self._memory.last_bytes(),
                    "seen_requests": self._gate.seen,
                }
            case op:
                return {"error": f"an engine cannot {op}"}
        return None

    def _prepare(self, frame: Frame) -> Any:
        """The model's folder and vLLM's arguments. Raises EngineFailed if vLLM does not know one of them."""
        content = frame.content
        if devices := content["devices"]:
            config.show_gpus([int(device.removeprefix("cuda:")) for device in devices])
        ranks = _ranks(frame)
        Path(_MODEL).mkdir()
        for name, fd in zip(content["side_files"], frame.fds[len(ranks) :], strict=True):
            (Path(_MODEL) / name).write_bytes(read_all(fd))
        _check(ranks)
        tensors = folder.listed(content["checkpoint_layout" if content["is_image"] else "layout"])
        (Path(_MODEL) / WEIGHTS).write_bytes(header.framed(json.dumps(tensors)))
        self._adapters = [AppliedAdapter.read(setting) for setting in self._options["adapters"]]
        self._handover.hold(ranks)
        close_all(frame.fds)
        try:
            arguments = versions.parse([*vllm_arguments(content["names"], self._options, self._adapters)])
        except ValueError as error:
            hint = "see engines.vllm.arguments, and arguments of the model itself"
            raise EngineFailed(str(error), hint=hint) from None
        versions.tell_apart(arguments, folder.digest(tensors))
        return arguments

    async def _take(self, frame: Frame) -> None:
        """Other weights, in place. What is wrong with them in itself is found before anything is touched; where
        vLLM fails half-way, the process ends rather than answer from half of each."""
        ranks = _ranks(frame)
        _check(ranks)
        written = _log_bytes()
        try:
            self._handover.hold(ranks)
            # Both at once, since each is a way to the engine core and back. Nothing is answered meanwhile.
            _, is_reset = await asyncio.gather(
                self._client.collective_rpc("flashd_take"), self._client.reset_prefix_cache()
            )
            await forget(self._client, is_reset=is_reset)
            versions.rename(self._app, frame.content["names"], _MODEL)
            await self._offer_adapters(frame.content["names"])
            self._binding = frame.content["binding"]
        except Exception as error:  # noqa: BLE001 -- whatever it is, the engine holds half of two models now
            why = _root_cause(written)
            traceback.print_exc()
            _die(why or f"{type(error).__name__}: {error}")
        finally:
            self._handover.drop()

    async def _offer_adapters(self, names: Sequence[str]) -> None:
        """Those of the model that is called so. One that vLLM does not take is left out, and the log says why."""
        offered = {adapter.name: str(adapter.folder) for adapter in self._adapters if adapter.is_of(names)}
        for name, why in (await versions.offer_adapters(self._app, offered)).items():
            print(f"the adapter {name} is not applied: {why}", file=sys.stderr, flush=True)


async def forget(client: Any, *, is_reset: bool) -> None:
    """What other weights have made of prompts, if it is not yet, and of pictures. Raises TimeoutError."""
    async with asyncio.timeout(_RESET_S):
        while not is_reset:  # cut requests are being dropped
            await asyncio.sleep(0.005)
            is_reset = await client.reset_prefix_cache()
    if versions.has_encoder(client.model_config):
        await client.reset_encoder_cache()


def vllm_arguments(
    names: Sequence[str], options: Mapping[str, Any], applied: Sequence[AppliedAdapter]
) -> Iterator[str]:
    """For `vllm serve`. What the user said comes later and wins, but for what the engine's being ours depends on."""
    yield from ("--disable-log-stats", "--max-model-len", "auto")
    if not versions.is_cpu():
        # Graphs are captured for as many sizes as this allows, which is most of what a start takes.
        yield from ("--max-num-seqs", _MOST_SEQUENCES)
    if kv_cache_bytes := options["kv_cache_bytes"]:
        yield from ("--kv-cache-memory-bytes", str(kv_cache_bytes))
        if not versions.is_cpu():
            # Decides no size then, and yet vLLM refuses to start unless so much is free: other models are resident.
            yield from ("--gpu-memory-utilization", "0.01")
    yield from adapters.arguments(applied)
    yield from options["arguments"]
    yield from ("--model", _MODEL, "--served-model-name", *names)
    yield from ("--load-format", LOAD_FORMAT, "--worker-extension-cls", _EXTENSION)
    yield from ("--model-loader-extra-config", json.dumps({"handover": handover.SOCKET}))
    if versions.is_cpu():
        # Compiled code has the packed weights of the first model built in, and would go on using them.
        yield "--enforce-eager"
    else:
        yield "--enable-sleep-mode"  # which releases the KV cache while it is parked


def _ranks(frame: Frame) -> list[Frame]:
    """What vLLM's processes need of what the daemon said: each rank its own image, or all of them one checkpoint."""
    said = frame.content
    options = {name: said[name] for name in ("is_image", "wants_image")}
    arenas = [{name: arena[name] for name in ("arena_bytes", "layout")} for arena in (said, *said["further"])]
    return [Frame({**arena, **options}, (fd,)) for arena, fd in zip(arenas, frame.fds, strict=False)]


def _check(ranks: Sequence[Frame]) -> None:
    """Raises before anything is touched: a layout that does not fit its arena, an arena that is none."""
    for rank in ranks:
        arena_bytes, size_bytes = rank.content["arena_bytes"], os.fstat(rank.fds[0]).st_size
        _check_layout(rank.content["layout"], arena_bytes)
        # Of a GPU's memory its driver checks the size when it is shown.
        if not rank.content["is_image"] and size_bytes < arena_bytes:
            raise EngineFailed(f"the arena has {size_bytes} bytes, and its layout says {arena_bytes}")


@functools.lru_cache(maxsize=32)  # fine-tunes have one layout, and parsing it takes longer than showing an image
def _check_layout(layout: str, arena_bytes: int) -> None:
    header.parse(layout.encode(), data_bytes=arena_bytes, path="the layout")


def _die(why: str) -> None:
    """The daemon takes the last line for our last words."""
    print(" ".join(why.split("\n")), file=sys.stderr, flush=True)
    os._exit(1)


def _refusal(error: BaseException) -> dict[str, Any]:
    """Why the engine did not start, in one line, for whoever asked for it."""
    said = error.message if isinstance(error, FlashdError) else _one_line(str(error)) or type(error).__name__
    if not isinstance(error, FlashdError) and any(word in said for word in _NO_CAUSE):
        said = _root_cause(0) or said
    is_unsupported = isinstance(error, Unsupported) or "are not supported for now" in said
    hint = error.hint if isinstance(error, FlashdError) else _BUSY_HINT if _BUSY in said else ""
    return {
        "error": f"vLLM {versions.VERSION}: {said}",
        "hint": hint,
        "unsupported": is_unsupported,
        "out_of_memory": lacks_memory(said),
    }


def _log_bytes() -> int:
    """How long the log is that vLLM's processes and we write."""
    return os.fstat(2).st_size


def _root_cause(since: int) -> str:
    """The first error that one of vLLM's processes wrote after that much of the log; later ones only say that there was
    one."""
    with contextlib.suppress(OSError):
        said = os.pread(2, _LOG_BYTES, since)  # by its descriptor: the file is the daemon's, which may be another user
        for line in said.decode(errors="replace").splitlines():
            is_error = not _NO_ERROR.search(line) and not any(word in line for word in _NO_CAUSE)
            if is_error and (found := _CAUSE.search(line)):
                return f"{found[1].rsplit('.', 1)[-1]}: {found[2]}"
    return ""


def _one_line(text: str) -> str:
    """pydantic spreads its errors over lines: the second or third has the words."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        return " ".join(lines[1:]).split(" [type=", 1)[0]
    return lines[0] if lines else ""
