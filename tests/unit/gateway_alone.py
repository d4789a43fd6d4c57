# SPDX-License-Identifier: Apache-2.0
"""A gateway without a daemon, with a stand-in engine that records requests with recordings."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from waiting import PATIENCE_S, eventually

from flashd.client.results import Engine, Model
from flashd.errors import Unavailable
from flashd.gateway.app import application, paths
from flashd.gateway.directory import Directory
from flashd.gateway.dispatch import Dispatcher
from flashd.gateway.listening import Opened
from flashd.gateway.metrics.daemon_news import DaemonNews
from flashd.gateway.metrics.measures import Measures
from flashd.gateway.metrics.observing import BeginTrace, Observing
from flashd.gateway.page.endpoints import PageEndpoints
from flashd.gateway.page.feed import Feed


class Hears:
    """An engine that notes what it gets, and says the size of a recording."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []

    async def answer(self, request: Request) -> Response:
        self.bodies.append(await request.body())
        self.headers.append(dict(request.headers))
        async with request.form() as found:
            if found["model"] != "whisper":
                error = {"message": "no such model", "type": "NotFoundError", "param": "model", "code": 404}
                return JSONResponse({"error": error}, status_code=404)
            text = f"{len(await found['file'].read())} bytes"  # type: ignore[union-attr]
            if found.get("stream"):
                said = [f'data: {{"choices":[{{"delta":{{"content":"{word}"}}}}]}}\n\n' for word in text.split()]
                return StreamingResponse(iter([*said, "data: [DONE]\n\n"]), media_type="text/event-stream")
        usage = {"type": "tokens", "input_tokens": 5, "output_tokens": 2, "total_tokens": 7}
        return JSONResponse({"text": text, "usage": usage})


@contextlib.asynccontextmanager
async def serving(engine: Hears, path: Path) -> AsyncIterator[None]:
    routes = [
        Route(f"/v1/audio/{each}", engine.answer, methods=["POST"]) for each in ("transcriptions", "translations")
    ]
    config = uvicorn.Config(Starlette(routes=routes), uds=str(path), lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    task = asyncio.ensure_future(server.serve())

    async def has_started() -> bool:
        return bool(server.started)

    try:
        await eventually(has_started)
        yield
    finally:
        server.should_exit = True
        await task


def connect(_: bool) -> Any:
    raise Unavailable("there is no daemon in this test")


WHISPER = Model(
    "whisper", ("ears",), "c", "Whisper", "bf16", 1, 1, "host", (), False, False, 0, 0, 0, 0, "", "/m/w", serving=True
)


@contextlib.asynccontextmanager
async def gateway(
    socket_path: Path, kind: str = "vllm", begin_trace: BeginTrace | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway whose engine, of this kind, has a socket here."""
    measures = Measures()
    news = DaemonNews(measures)
    dispatcher = Dispatcher(connect, measures, news)
    engine = Engine(kind, "serving", "whisper", "Whisper", str(socket_path), 1, 0, 0, 0, "", 0, "/e/1")
    known = Directory(models={"whisper": WHISPER}, active="whisper", engines={engine.path: engine})
    dispatcher._note(replace(known, is_connected=True, is_settled=True))
    page = PageEndpoints(dispatcher, connect, Feed(dispatcher, news, ""))
    inside = application(dispatcher, connect, measures, news, Opened([]), page)
    inside = Observing(inside, measures, paths=paths(inside), begin_trace=begin_trace)
    transport = httpx.ASGITransport(app=inside)  # type: ignore[arg-type]
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=PATIENCE_S) as client:
            yield client
    finally:
        await dispatcher._connections.close()
