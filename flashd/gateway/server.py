# SPDX-License-Identifier: Apache-2.0
"""Runs the gateway's application behind uvicorn."""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from flashd.client import client as clients
from flashd.client.client import Client
from flashd.config.environment import (
    notify_socket,
    state_directory,
    trace_service_name,
    traces_are_wanted,
    watchdog_s,
)
from flashd.gateway.app import OnceSettled, application, paths
from flashd.gateway.directory import Watches
from flashd.gateway.dispatch import Dispatcher
from flashd.gateway.guard import Guard
from flashd.gateway.listening import Opened
from flashd.gateway.metrics.daemon_news import DaemonNews
from flashd.gateway.metrics.measures import Measures
from flashd.gateway.metrics.observing import Observing
from flashd.gateway.page.endpoints import PageEndpoints
from flashd.gateway.page.feed import Feed
from flashd.gateway.page.history import History
from flashd.gateway.permitted_pages import PermittedPages
from flashd.gateway.tokens import TokenFile
from flashd.service_manager import ServiceManager, Watchdog
from flashd.tasks import end

if TYPE_CHECKING:
    from flashd.gateway.tracing import Tracing

log = logging.getLogger(__name__)

_BACKLOG = 1024
_KEEP_ALIVE_S = 75
_FINISH_S = 10  # for answers
_TELL_S = 2  # for the clients of those that have not finished to take the news


async def serve(options: argparse.Namespace, opened: Opened, tokens: TokenFile) -> None:
    """Answers at the opened sockets until SIGTERM or SIGINT; then requests in progress may finish for a few seconds.

    `options` are those of `main.parser`.
    """

    def connect(activates: bool) -> Client:
        return clients.connect(options.bus, interactive=False, activate=activates)

    measures = Measures()
    news = DaemonNews(measures)
    watches = Watches([news])
    dispatcher = Dispatcher(connect, measures, watches)
    history = History(options.history or _history_file(), lambda: dispatcher.settings.history)
    feed = Feed(dispatcher, news, options.bus or "", history)
    watches.append(feed.jobs)
    page = PageEndpoints(dispatcher, connect, feed)
    inside = application(dispatcher, connect, measures, news, opened, page)
    guarded = Guard(inside, tokens, lambda: dispatcher.settings, socket_is_ours=options.bus != "system")
    permitting = PermittedPages(guarded, lambda: dispatcher.settings)
    tracing = _tracing(news)
    begin_trace = tracing.begin if tracing is not None else None
    config = uvicorn.Config(
        Observing(
            *(OnceSettled(permitting, dispatcher), measures, feed.requests),
            paths=paths(inside),
            begin_trace=begin_trace,
        ),
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each malformed form
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of clients that leave

    def stop_waiting() -> None:
        feed.close()
        dispatcher.stop_waiting()

    server = _Server(config, stop_waiting)
    dispatcher.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, functools.partial(server.handle_exit, number, None))
    watchdog = Watchdog(server.manager, watchdog_s(), lambda: f"{len(dispatcher.directory.models)} models")
    watchdog.start()
    lingering = asyncio.create_task(_end_when_alone(dispatcher, options.linger, server))
    try:
        await server.serve(list(opened.sockets))
    finally:
        server.manager.tell("STOPPING=1")
        await end(lingering)
        await watchdog.close()
        await page.actions.close()
        await dispatcher.close()
        await asyncio.to_thread(history.close)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)


class _Server(uvicorn.Server):  # type: ignore[misc]
    """uvicorn, which tells the service manager when it answers, and the requests that wait when it ends."""

    def __init__(self, config: uvicorn.Config, stop_waiting: Callable[[], None]) -> None:
        super().__init__(config)
        self.manager = ServiceManager(notify_socket())
        self._stop_waiting = stop_waiting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.manager.tell("READY=1")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for answers for as long as they may take, and has the others say that they are cut.

        The limit of uvicorn would do the same, but log it as an error.
        """
        self._stop_waiting()
        finishing = asyncio.ensure_future(super().shutdown(sockets))
        for limit_s in (_FINISH_S, _TELL_S):
            await asyncio.wait({finishing}, timeout=limit_s)
            for unfinished in list(self.server_state.tasks):
                unfinished.cancel()
        await end(finishing)


async def _end_when_alone(dispatcher: Dispatcher, linger_s: float | None, server: uvicorn.Server) -> None:
    """Ends the server when there has been no daemon for so long."""
    await dispatcher.settled()
    seen_s = time.monotonic()
    while linger_s is not None and not server.should_exit:
        await asyncio.sleep(min(1.0, linger_s))
        if dispatcher.is_connected:
            seen_s = time.monotonic()
        if time.monotonic() - seen_s > linger_s:
            server.should_exit = True  # and never False, which would undo a signal


def _history_file() -> Path | None:
    """The file below the state directory that a service manager gives us."""
    folder = state_directory()
    return folder / "history.sqlite" if folder is not None else None


def _tracing(news: DaemonNews) -> Tracing | None:
    """Traces, if the environment says where to."""
    if not traces_are_wanted():
        return None
    try:
        from flashd.gateway.tracing import Tracing
    except ImportError as error:
        log.warning("no traces: %s is missing; install it: pip install 'flashd[traces]'", error.name)
        return None
    return Tracing(news, trace_service_name())
