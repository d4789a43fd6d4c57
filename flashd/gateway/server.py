# SPDX-License-Identifier: Apache-2.0
"""Runs the gateway's application behind uvicorn."""

from __future__ import annotations

import argparse
import asyncio
import functools
import signal
import socket

import uvicorn

from flashd.client import client as clients
from flashd.client.client import Client
from flashd.gateway.app import application
from flashd.gateway.dispatch import Dispatcher
from flashd.gateway.guard import Guard
from flashd.gateway.tokens import TokenFile

_BACKLOG = 1024
_KEEP_ALIVE_S = 75
_FINISH_S = 10


async def serve(options: argparse.Namespace, sockets: list[socket.socket], tokens: TokenFile) -> None:
    """Answers at these sockets until SIGTERM or SIGINT; then requests in progress may finish for a few seconds.

    `options` are those of `main.parser`.
    """

    def connect(activates: bool) -> Client:
        return clients.connect(options.bus, interactive=False, activate=activates)

    dispatcher = Dispatcher(connect, turn_s=2.0, max_waiting=256)
    config = uvicorn.Config(
        Guard(
            application(dispatcher, connect, may_change_models=options.may_change_models),
            tokens=tokens,
            hosts=options.host,
            origins=options.origin,
            socket_is_ours=options.bus != "system",
        ),
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_FINISH_S,
    )
    server = uvicorn.Server(config)
    dispatcher.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, functools.partial(server.handle_exit, number, None))
    try:
        await server.serve(sockets)
    finally:
        await dispatcher.close()
