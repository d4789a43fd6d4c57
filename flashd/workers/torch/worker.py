# SPDX-License-Identifier: Apache-2.0
"""The engine process that runs transformers. The model computes in a third thread."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from flashd.engines.control import Channel, Parcel
from flashd.engines.messages import GivenWeights, Start, Taken
from flashd.io import sandbox
from flashd.workers.templates import Renderer
from flashd.workers.torch.model import Model, SideFile, Weights
from flashd.workers.torch.server import Bound, Server
from flashd.workers.worker import Worker, receive_start


def main(channel: Channel, listener: socket.socket) -> int:
    """Runs until the daemon closes the channel. Returns the exit status."""
    sandbox.restrict(writes=True)  # tokenizers are read from files here
    os.umask(0o077)
    Renderer().take_over()
    first = receive_start(channel)
    torch.set_num_threads(first.message.tuning.threads or max(1, len(os.sched_getaffinity(0))))
    return asyncio.run(_serve(channel, listener, first))


async def _serve(channel: Channel, listener: socket.socket, first: Parcel[Start]) -> int:
    worker = _Worker(channel, first.message)
    http = worker.http(worker.server.application(), lifespan="off")
    worker.obey(first)
    await http.serve(sockets=[listener])
    return 0


class _Worker(Worker):
    def __init__(self, channel: Channel, start: Start) -> None:
        super().__init__(channel, passes_on=start.passes_on)
        turns = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.server = Server(self.gate, turns, start.tuning.max_tokens_default)
        self._model: Model | None = None

    def take(self, given: GivenWeights, fds: tuple[int, ...]) -> Parcel[Taken]:
        arena_fd, *files = fds
        side_files = {
            name: SideFile(digest, fd) for (name, digest), fd in zip(given.side_files.items(), files, strict=True)
        }
        weights = Weights(arena_fd, given.first.arena_bytes, given.first.layout, side_files)
        if self._model is None:
            self._model = Model(weights, Path.cwd())
        else:
            self._model.bind(weights)
        bound = Bound(self._model, given.model_name, frozenset(given.names), int(time.time()))

        def announce() -> None:
            self.server.bound = bound
            self.open_gate()

        self.call_on_loop(announce)
        self.binding = given.binding
        return Parcel(Taken())

    def let_go(self) -> None:
        if self._model is not None:
            self._model.unbind()
