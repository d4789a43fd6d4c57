# SPDX-License-Identifier: Apache-2.0
"""The connection of one run of `flash` to the daemon, opened on first use."""

from __future__ import annotations

import re
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

from flashd.cli.parameters import Argument, Context, Option

if TYPE_CHECKING:
    from flashd.client.client import Client


_PLAIN_IN_SHELLS = re.compile(r"[\w./+-]+")


class Session:
    """The connection of this run. A command that needs no daemon opens none."""

    def __init__(self, bus: str | None) -> None:
        self.bus = bus
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        if self._client is None:
            from flashd.client.client import connect

            self._client = connect(self.bus)
        return self._client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._client is not None:
            self._client.close()


def session(context: Context) -> Session:
    found = context.obj
    assert isinstance(found, Session)
    return found


def _complete(incomplete: str) -> list[str]:
    """Returns model names that complete a word in the shell. Never fails, because an error would disturb the shell.

    Shells split, expand or evaluate completions (bash at blanks, colons and brackets, zsh even `$(...)`), so only names
    without special characters of any shell are offered.
    """
    from flashd.client.client import connect
    from flashd.errors import FlashdError

    try:
        with connect() as client:
            names = [name for model in client.models() for name in (model.name, *model.aliases)]
    except FlashdError:
        return []
    return [name for name in names if name.startswith(incomplete) and _PLAIN_IN_SHELLS.fullmatch(name)]


ModelName = Annotated[str, Argument(metavar="MODEL", help="A name from flash list.", autocompletion=_complete)]
Json = Annotated[bool, Option("--json", help="Print JSON, for programs.")]
