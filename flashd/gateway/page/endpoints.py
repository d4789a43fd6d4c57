# SPDX-License-Identifier: Apache-2.0
"""The page at `/` and its files, and what it asks for under /flashd/v1."""

from __future__ import annotations

import dataclasses
import json
from contextlib import aclosing
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from flashd.errors import InvalidArgument, LimitExceeded, NotAuthorized, NotFound
from flashd.gateway.access import ACCESS
from flashd.gateway.answering import Answer, Asked, Endpoint, Sending
from flashd.gateway.dialects.flashd import Flashd
from flashd.gateway.directory import Connect
from flashd.gateway.dispatch import Dispatcher
from flashd.gateway.exchange import BodyBudget, parse_object
from flashd.gateway.page import settings
from flashd.gateway.page.actions import Actions
from flashd.gateway.page.feed import Feed
from flashd.gateway.page.files import FOLDER, SECURE, PageFiles
from flashd.gateway.waiting import EVENTS

STATE, STREAM, DISPLACED = "/flashd/v1/state", "/flashd/v1/events", "/flashd/v1/would-displace"
SETTINGS, ACTION = "/flashd/v1/settings", "/flashd/v1/actions/"
# A form of another page cannot send it, and a script only where the answer to a preflight request permits, as ours
# never does.
HEADER = b"x-flashd-page"
_MOST_STREAMS = 64
_MOST_BODY_BYTES = 64 << 10
_HEADERS = {**SECURE, "cache-control": "no-store"}
_OFF = "the setting gateway.page is false"


class PageEndpoints:
    """What answers."""

    def __init__(self, dispatcher: Dispatcher, connect: Connect, feed: Feed) -> None:
        self._dispatcher = dispatcher
        self._feed = feed
        self._files = PageFiles()
        self._streams = 0
        self.actions = Actions(dispatcher, connect, feed)

    def routes(self, budget: BodyBudget) -> list[BaseRoute]:
        def route(path: str, answer: Answer, method: str = "GET") -> Route:
            return Route(path, Endpoint(Flashd(), self._unless_off(answer), budget), methods=[method])

        return [
            Route("/", self._root),
            Route(FOLDER + "{version}/{name:path}", self._file),
            route(STATE, self._state),
            route(STREAM, self._events),
            route(DISPLACED, self._displaced),
            route(SETTINGS, self._settings),
            route(ACTION + "{action}", self._act, "POST"),
        ]

    def _unless_off(self, answer: Answer) -> Answer:
        async def answered(asked: Asked, send: Sending) -> None:
            if not self._dispatcher.settings.page:
                raise NotFound("there is no page here", hint=_OFF)
            await answer(asked, send)

        return answered

    async def _root(self, request: Request) -> Response:
        """The page for browsers. Programs recognise Ollama's interface by these words."""
        if self._dispatcher.settings.page and "text/html" in request.headers.get("accept", ""):
            return self._files.page(request)
        return PlainTextResponse("Ollama is running", headers={"vary": "accept"})

    async def _file(self, request: Request) -> Response:
        return self._files.other(request.path_params["version"], request.path_params["name"])

    async def _state(self, _: Asked, send: Sending) -> None:
        await send.json(self._feed.state(), headers=_HEADERS)

    async def _events(self, _: Asked, send: Sending) -> None:
        if self._streams >= _MOST_STREAMS:
            raise LimitExceeded(f"{_MOST_STREAMS} streams of events are open", hint="close pages that nobody looks at")
        self._streams += 1
        try:
            await send.begin_stream(EVENTS)
            kind = "state"
            async with aclosing(self._feed.changes()) as changes:
                async for said in changes:
                    if said is None:
                        await send.piece(b": nothing new\n\n")
                        continue
                    text = json.dumps(said, ensure_ascii=False, separators=(",", ":"))
                    await send.piece(f"event: {kind}\ndata: {text}\n\n".encode(errors="replace"))
                    kind = "change"
            await send.end_stream()
        finally:
            self._streams -= 1

    async def _displaced(self, asked: Asked, send: Sending) -> None:
        query = parse_qs(asked.scope["query_string"].decode("latin-1"))
        if not (model := query.get("model", [""])[0]):
            raise InvalidArgument("`model` is missing", hint=f"ask {DISPLACED}?model=NAME")
        await send.json({"models": await self.actions.displaced(model)}, headers=_HEADERS)

    async def _settings(self, _: Asked, send: Sending) -> None:
        models, shows_all = self._dispatcher.directory.models, ACCESS.get().sees_private
        found = settings.shown(await self.actions.config(), models, shows_all=shows_all)
        await send.json({"settings": [dataclasses.asdict(each) for each in found]}, headers=_HEADERS)

    async def _act(self, asked: Asked, send: Sending) -> None:
        if not asked.header(HEADER):
            name = HEADER.decode()
            raise NotAuthorized(f"a change needs the header {name}", hint=f"send {name}: 1, as pages of others cannot")
        if len(asked.body) > _MOST_BODY_BYTES:
            raise InvalidArgument(f"an action is at most {_MOST_BODY_BYTES >> 10} KiB")
        action = asked.scope["path"].removeprefix(ACTION)
        await send.json(await self.actions.run(action, parse_object(asked.body)), headers=_HEADERS)
