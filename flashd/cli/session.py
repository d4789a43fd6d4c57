# SPDX-License-Identifier: Apache-2.0
"""One run of `flash`: which daemon it speaks to, connected to when first needed."""

from __future__ import annotations

from types import TracebackType
from typing import Annotated, Self

import typer

import flashd
from flashd.client import Client
from flashd.errors import FlashdError


class Session:
    """The connection of this run; a command that needs no daemon makes none."""

    def __init__(self, bus: str | None) -> None:
        self.bus = bus
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        if self._client is None:
            self._client = flashd.connect(self.bus)
        return self._client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._client is not None:
            self._client.close()


def session(context: typer.Context) -> Session:
    found = context.obj
    assert isinstance(found, Session)
    return found


def _complete(incomplete: str) -> list[str]:
    """Model names for the shell; a shell that completes must never see an error."""
    try:
        with flashd.connect() as client:
            names = [name for model in client.models() for name in (model.name, *model.aliases)]
    except FlashdError:
        return []
    return [name for name in names if name.startswith(incomplete)]


ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A name as flash list shows it.", autocompletion=_complete)
]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
