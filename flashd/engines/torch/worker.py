# SPDX-License-Identifier: Apache-2.0
"""What does one engine process do? It serves HTTP on its socket, and does what the daemon says on its control channel.

The event loop runs in the main thread, the control channel in a second, the model in a third: a token that takes long
to compute holds up neither an answer about health nor the order to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
import traceback
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import uvicorn

from flashd import sandbox
from flashd.engines.control import Channel, Frame, close_all
from flashd.engines.gate import Gate
from flashd.engines.surroundings import OwnMemory, lacks_memory
from flashd.engines.torch.model import Model, SideFile, Weights
from flashd.engines.torch.server import Bound, Server
from flashd.errors import FlashdError, Unsupported

T = TypeVar("T")


def main(channel: Channel, listener: socket.socket) -> int:
    """Runs until the daemon closes the channel. Returns the exit status."""
    sandbox.restrict(writes=True)  # a tokenizer is read from files
    os.umask(0o077)
    frame = channel.receive()
    options = frame.content
    torch.set_num_threads(options["threads"] or max(1, len(os.sched_getaffinity(0))))
    return asyncio.run(_Worker(channel, options).run(frame, listener))


class _Http(uvicorn.Server):  # type: ignore[misc]
    """uvicorn, without its signal handlers: only the daemon ends us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Worker:
    def __init__(self, channel: Channel, options: dict[str, Any]) -> None:
        self._channel = channel
        self._turns = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._gate = Gate()
        self._memory = OwnMemory()
        self._server = Server(self._gate, self._turns, options["max_tokens_default"])
        self._model: Model | None = None
        self._binding = ""  # what the daemon calls what we hold, or held before we were parked

    async def run(self, first: Frame, listener: socket.socket) -> int:
        self._loop = asyncio.get_running_loop()
        config = uvicorn.Config(self._server.application(), log_level="warning", lifespan="off", access_log=False)
        http = _Http(config)
        orders = threading.Thread(target=self._obey, args=(first,), daemon=True, name="control")
        orders.start()
        await http.serve(sockets=[listener])
        return 0

    def _obey(self, first: Frame) -> None:
        """The control thread: one order at a time, until the daemon hangs up."""
        frame = first
        try:
            while True:
                self._channel.send(self._answer(frame))
                frame = self._channel.receive()
        except (EOFError, ConnectionError):
            os._exit(0)  # whatever is being generated, nobody is left to want it

    def _answer(self, frame: Frame) -> dict[str, Any]:
        try:
            return self._do(frame) or {}
        except FlashdError as error:
            return {"error": error.message, "hint": error.hint, "unsupported": isinstance(error, Unsupported)}
        except Exception as error:  # noqa: BLE001 -- the boundary of an order: transformers raises what it likes
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
            return {"error": said, "out_of_memory": lacks_memory(said)}
        finally:
            close_all(frame.fds)

    def _do(self, frame: Frame) -> dict[str, Any] | None:
        match frame.content["op"]:
            case "start" | "wake" | "rebind":
                self._take(frame)
            case "drain":
                self._on_loop(self._gate.drain(frame.content["timeout_s"]))
            case "resume":
                self._loop.call_soon_threadsafe(self._gate.open)
            case "park":
                self._park()
            case "state":
                return {"binding": self._binding, "gate": self._on_loop(self._gate_state())}
            case "stats":
                return {
                    "active_requests": self._gate.active,
                    "memory_bytes": self._memory.last_bytes(),
                    "seen_requests": self._gate.seen,
                }
            case op:
                return {"error": f"an engine cannot {op}"}
        return None

    def _take(self, frame: Frame) -> None:
        content = frame.content
        digests = content["side_files"]
        side_files = {
            name: SideFile(digest, fd) for (name, digest), fd in zip(digests.items(), frame.fds[1:], strict=True)
        }
        weights = Weights(frame.fds[0], content["arena_bytes"], content["layout"], side_files)
        if self._model is None:
            self._model = Model(weights, Path.cwd())
        else:
            self._model.bind(weights)
        bound = Bound(self._model, content["model_name"], frozenset(content["names"]), int(time.time()))

        def announce() -> None:
            self._server.bound = bound
            self._gate.open()

        self._loop.call_soon_threadsafe(announce)
        self._binding = content["binding"]

    def _park(self) -> None:
        self._loop.call_soon_threadsafe(self._gate.park)
        if self._model is not None:
            self._model.unbind()

    async def _gate_state(self) -> str:
        return self._gate.state

    def _on_loop(self, step: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(step, self._loop).result()
