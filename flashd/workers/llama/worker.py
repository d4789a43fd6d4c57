# SPDX-License-Identifier: Apache-2.0
"""The engine process that answers with llama.cpp. It passes requests on to a llama-server, its child.

Another model is another llama-server, which starts beside the one that answers: if it fails, that one goes on. A parked
engine has none. The death of the child is that of the engine.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import sys

from flashd.checkpoint.gguf.traits import SIDE_FILE, Traits
from flashd.engines.control import Channel, Parcel
from flashd.engines.messages import GivenWeights, Start, Taken
from flashd.engines.process_info import read_all
from flashd.errors import EngineFailed
from flashd.io import sandbox
from flashd.workers.guard import Guard
from flashd.workers.llama import program
from flashd.workers.llama.program import Server
from flashd.workers.llama.proxy import Bound, Proxy, session_to
from flashd.workers.worker import Worker, receive_start


def main(channel: Channel, listener: socket.socket) -> int:
    """Runs until the daemon closes the channel. Returns the exit status."""
    sandbox.restrict(writes=True)  # llama-server's socket is in the engine's own folder
    os.umask(0o077)
    return asyncio.run(_serve(channel, listener, receive_start(channel)))


async def _serve(channel: Channel, listener: socket.socket, first: Parcel[Start]) -> int:
    worker = _Worker(channel, first.message)
    http = worker.http(Guard(worker.proxy, worker.gate), lifespan="off")
    worker.obey(first)
    await http.serve(sockets=[listener])
    return 0


class _Worker(Worker):
    def __init__(self, channel: Channel, start: Start) -> None:
        super().__init__(channel, passes_on=start.passes_on)
        self.proxy = Proxy(self.gate)
        self._tuning = start.tuning
        self._numbers = itertools.count(1)
        self._server: Server | None = None

    def take(self, given: GivenWeights, fds: tuple[int, ...]) -> Parcel[Taken]:
        arena_fd, *files = fds
        side_files = dict(zip(given.side_files, files, strict=True))
        if SIDE_FILE not in side_files:
            raise EngineFailed("these weights are no GGUF file")
        traits = Traits.from_json(read_all(side_files[SIDE_FILE]))
        address = f"llama-{next(self._numbers)}.sock"
        found = program.find(self._tuning.program)
        command = [found, *program.arguments(arena_fd, address, given.model_name, traits, self._tuning)]
        server = Server(command, arena_fd, address, self._die)
        server.wait_until_ready()
        former, self._server = self._server, server
        context = program.context_length(traits, self._tuning)
        self.on_loop(self._announce(given, address, context))
        if former is not None:
            former.stop()
        self.binding = given.binding
        return Parcel(Taken())

    def let_go(self) -> None:
        server, self._server = self._server, None
        self.on_loop(self._forget())
        if server is not None:
            server.stop()

    async def _announce(self, given: GivenWeights, address: str, context_length: int) -> None:
        await self._forget()
        names = frozenset(given.names)
        self.proxy.bound = Bound(given.model_name, names, context_length, session_to(address))
        self.open_gate()

    async def _forget(self) -> None:
        bound, self.proxy.bound = self.proxy.bound, None
        if bound is not None:
            await bound.session.close()

    def _die(self) -> None:
        """Ends this process after its child, because the daemon reports the last line of our log."""
        server = self._server
        why = server.last_words() if server is not None else f"{program.NAME} ended"
        print(f"{program.NAME} died: {why}", file=sys.stderr, flush=True)
        os._exit(1)
