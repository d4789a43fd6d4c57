# SPDX-License-Identifier: Apache-2.0
"""Keeps web pages away, and other machines without a token.

A page of another site can make its visitor's browser send requests here, and by DNS rebinding even read the answers.
Its requests give themselves away by the site they come from (`Origin`, `Sec-Fetch-Site`) or by the name that they
were sent to (`Host`). Programs send neither of the first two, and the name that they were told.

Other machines need a token, which no page has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import ip_address

from flashd.config.settings import GatewayConfig
from flashd.errors import NotAuthorized
from flashd.gateway.access import ACCESS, Access
from flashd.gateway.dialects.by_path import dialect_of
from flashd.gateway.exchange import Message, Receive, Send, send_json
from flashd.gateway.page.files import FOLDER
from flashd.gateway.tokens import PREFIX, TokenFile

Application = Callable[[Message, Receive, Send], Awaitable[None]]

_OF_THE_PAGE = ("/flashd/", FOLDER)
_CHALLENGE = {"WWW-Authenticate": "Bearer"}


class _NoToken(NotAuthorized):
    """A request needs a token, and has none that is known."""


class Guard:
    """An ASGI application around another."""

    def __init__(
        self,
        inside: Application,
        tokens: TokenFile,
        settings: Callable[[], GatewayConfig] = GatewayConfig,
        *,
        socket_is_ours: bool = False,
    ) -> None:
        """With `socket_is_ours`, only the user whose daemon this is can connect to the Unix socket."""
        self._inside = inside
        self._tokens = tokens
        self._settings = settings
        self._socket_is_ours = socket_is_ours

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # uvicorn closes what nobody has accepted
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        try:
            access = self._access(scope, headers)
        except _NoToken as error:
            await send_json(send, dialect_of(scope["path"]).described(error), status=401, headers=_CHALLENGE)
        except NotAuthorized as error:
            await send_json(send, dialect_of(scope["path"]).described(error), status=403)
        else:
            ACCESS.set(access)
            await self._inside(scope, receive, send)

    def _access(self, scope: Message, headers: Mapping[bytes, str]) -> Access:
        """What the request may use. Raises NotAuthorized if that is nothing."""
        secret = _secret(headers)
        token = self._tokens.find(secret) if secret.startswith(PREFIX) else None
        if not secret and self._settings().page and _says_nothing(scope["path"]) and not _is_from_here(scope):
            return Access(sees_private=False, may_change_models=False, is_over_socket=False)
        if token is None and (secret.startswith(PREFIX) or not _is_from_here(scope)):
            what = "the token is unknown, or was revoked" if secret else "a token is needed here"
            raise _NoToken(what, hint="the machine's administrator makes one: flash token new NAME")
        if token is not None:
            return Access(
                sees_private=False,
                models=token.models,
                may_change_models=False,
                is_over_socket=_is_over_unix(scope),
                has_right_to_change=token.changes,
            )
        if why := self._refusal(scope, {name: value.lower() for name, value in headers.items()}):
            raise NotAuthorized(why)
        is_over_socket = _is_over_unix(scope)
        return Access(sees_private=self._socket_is_ours and is_over_socket, is_over_socket=is_over_socket)

    def _refusal(self, scope: Message, headers: Mapping[bytes, str]) -> str:
        origin, host = headers.get(b"origin", ""), headers.get(b"host", "")
        is_our_host = self._is_ours(_host(host))
        is_same_site = headers.get(b"sec-fetch-site", "none") in {"none", "same-origin"}
        is_our_page = is_our_host and is_same_site and origin.partition("://")[2] == host
        is_of_the_page = scope["path"].startswith(_OF_THE_PAGE)
        # Sites that may use models may not change them: only our own page asks for that.
        is_permitted_page = not is_of_the_page and is_permitted(origin, self._settings())
        if origin and not is_our_page and not is_permitted_page:
            return f"pages of {origin[:200]} may not ask here: see the setting gateway.origins"
        if not origin and not is_same_site:
            return "pages of other sites may not ask here: see the setting gateway.origins"
        # A browser reaches the Unix socket through a forwarded port, which DNS rebinding reaches as well.
        if (is_of_the_page or not _is_over_unix(scope)) and not is_our_host:
            return f"this address is not known as {host[:200]!r}: see the setting gateway.hosts"
        return ""

    def _is_ours(self, host: str) -> bool:
        with contextlib.suppress(ValueError):
            if ip_address(host.strip("[]")).is_loopback:
                return True
        return host == "localhost" or host in {known.lower() for known in self._settings().hosts}


def is_permitted(origin: str, settings: GatewayConfig) -> bool:
    """Tells whether the pages of a site, by its `Origin`, may use the gateway without a token."""
    return bool(origin) and origin.lower().rstrip("/") in {known.lower().rstrip("/") for known in settings.origins}


def _secret(headers: Mapping[bytes, str]) -> str:
    """The token of a request, or whatever else its program was told to send as one."""
    kind, _, secret = headers.get(b"authorization", "").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else headers.get(b"x-api-key", "").strip()


def _says_nothing(path: str) -> bool:
    """True for what browsers ask for before a person can give them a token: it says nothing of this machine."""
    return path == "/" or path.startswith(FOLDER)


def _is_from_here(scope: Message) -> bool:
    """True for what came to the Unix socket or a loopback address, where other machines cannot connect."""
    return _is_over_unix(scope) or ip_address(scope["server"][0].partition("%")[0]).is_loopback


def _is_over_unix(scope: Message) -> bool:
    return scope.get("server") is None or scope["server"][1] is None


def _host(value: str) -> str:
    """The name in a Host header, without its port."""
    if value.startswith("["):
        return value.partition("]")[0] + "]"
    return value.partition(":")[0]
