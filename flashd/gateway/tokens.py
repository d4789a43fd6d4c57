# SPDX-License-Identifier: Apache-2.0
"""The tokens by which programs on other machines may use models, and which models each may use.

Only digests are kept, in a file that `flash token` changes and the gateway reads again when it has changed. A token is
256 random bits, so that a plain digest of it is as good as a slow one.
"""

from __future__ import annotations

import contextlib
import grp
import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from flashd.config.paths import Scope, default_paths
from flashd.durable import read_toml, replace_file
from flashd.errors import AlreadyExists, InvalidArgument, NotAuthorized, NotFound, Unavailable

log = logging.getLogger(__name__)

PREFIX = "flashd-"
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
_MOST_BYTES = 1 << 20
_GROUP = "flashd-gateway"  # whom the machine's gateway runs as (systemd/sysusers.conf)


@dataclass(frozen=True, slots=True)
class Token:
    """A token without its secret. `models` are those that it may use, empty for all; `changes` is whether it may also
    change them, as the page does."""

    name: str
    digest: str  # SHA-256 of the secret, in hexadecimal
    created_at: int
    models: tuple[str, ...] = ()
    changes: bool = False


def default_file(scope: Scope) -> Path:
    """Where the tokens of a user's gateway are, or the machine's."""
    if scope is Scope.SYSTEM:
        return default_paths(scope).config.with_name("gateway-tokens.toml")
    return default_paths(scope).state / "gateway-tokens.toml"


class TokenFile:
    """The tokens in a file; none if there is no such file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_at: tuple[int, int, int] | None = None
        self._known: Mapping[str, Token] = {}  # by digest

    def find(self, secret: str) -> Token | None:
        """The token that was given out as this secret, if it was not revoked."""
        return self._current().get(_digest(secret))

    def all(self) -> list[Token]:
        return sorted(self._current().values(), key=lambda token: token.name)

    def new(self, name: str, models: Sequence[str] = (), *, changes: bool = False) -> str:
        """Makes a token and returns its secret, which is kept nowhere. Raises InvalidArgument, AlreadyExists, or
        NotAuthorized where this user may not change the file."""
        if not _NAME.fullmatch(name):
            raise InvalidArgument(f"{name!r} is no name for a token", hint="use letters, digits and . _ - @")
        tokens = self._read()
        if any(token.name == name for token in tokens):
            raise AlreadyExists(f"there is a token {name}", hint=f"revoke it first: flash token revoke {name}")
        secret = PREFIX + secrets.token_urlsafe(32)
        self._write([*tokens, Token(name, _digest(secret), int(time.time()), tuple(models), changes)])
        return secret

    def revoke(self, name: str) -> None:
        """Raises NotFound, or NotAuthorized where this user may not change the file."""
        tokens = self._read()
        if not any(token.name == name for token in tokens):
            raise NotFound(f"there is no token {name!r}", hint="flash token list shows them")
        self._write([token for token in tokens if token.name != name])

    def _current(self) -> Mapping[str, Token]:
        """What the file holds now; what it held last if it is damaged, but nothing if it is gone."""
        try:
            status = self._path.stat()
            read_at = (status.st_mtime_ns, status.st_size, status.st_ino)
        except OSError:
            self._read_at, self._known = None, {}
            return self._known
        if read_at != self._read_at:
            try:
                self._known = {token.digest: token for token in self._read()}
            except Unavailable as error:
                log.warning("%s", error.message)
            self._read_at = read_at
        return self._known

    def _read(self) -> list[Token]:
        try:
            content = read_toml(self._path, _MOST_BYTES)
            return [
                Token(
                    *(name, str(each["digest"]), int(each["created_at"]), tuple(map(str, each.get("models", ())))),
                    changes=each.get("changes") is True,
                )
                for name, each in content.items()
            ]
        except FileNotFoundError:
            return []
        except PermissionError:
            raise NotAuthorized(
                f"{self._path} is not yours to read", hint="ask as its owner: sudo flash token"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unavailable(f"{self._path} is damaged: {error!r}", hint="remove it, and make tokens anew") from None

    def _write(self, tokens: Sequence[Token]) -> None:
        content: dict[str, dict[str, Any]] = {
            token.name: {"digest": token.digest, "created_at": token.created_at, "models": list(token.models)}
            for token in tokens
        }
        for token in tokens:
            if token.changes:
                content[token.name]["changes"] = True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, tomli_w.dumps(content).encode())
            self._path.chmod(0o640)  # digests only; nobody else need know which tokens there are
            with contextlib.suppress(KeyError, PermissionError):  # a user's own gateway runs as that user
                os.chown(self._path, -1, grp.getgrnam(_GROUP).gr_gid)
        except OSError as error:
            hint = "the machine's tokens are the administrator's: sudo flash token"
            raise NotAuthorized(f"{self._path} cannot be written: {error.strerror}", hint=hint) from None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
