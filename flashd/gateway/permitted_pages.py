# SPDX-License-Identifier: Apache-2.0
"""Lets pages of permitted sites (`gateway.origins`) read answers, which browsers otherwise keep from them (CORS)."""

from __future__ import annotations

from collections.abc import Callable

from starlette.middleware.cors import CORSMiddleware

from flashd.config.settings import GatewayConfig
from flashd.gateway.exchange import Message, Receive, Send
from flashd.gateway.guard import Application, is_permitted


class PermittedPages(CORSMiddleware):  # type: ignore[misc]
    """An ASGI application around the guard, which refuses the pages of all other sites."""

    def __init__(self, inside: Application, settings: Callable[[], GatewayConfig]) -> None:
        super().__init__(inside, allow_methods=["*"], allow_headers=["*"], expose_headers=["Retry-After"])
        self._settings = settings

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = scope["headers"] if scope["type"] == "http" else ()
        origin = next((value.decode("latin-1") for name, value in headers if name == b"origin"), "")
        if self.is_allowed_origin(origin):
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def is_allowed_origin(self, origin: str) -> bool:
        return is_permitted(origin, self._settings())
