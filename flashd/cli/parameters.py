# SPDX-License-Identifier: Apache-2.0
"""Descriptions of the parameters of commands: `Annotated[str, Option(help="...")]`.

Both parsers of the command line use them: typer (flashd/cli/app.py), which also writes the help and completes words,
and the quick parser (flashd/cli/quick.py), which exists because importing typer takes longer than most commands do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol


class _Described:
    """Description of a parameter. `names` and `settings` are those of typer.Option and typer.Argument."""

    def __init__(self, *names: str, **settings: Any) -> None:
        self.names = names
        self.settings = settings


class Option(_Described):
    """A parameter with a name on the command line. A parameter of type bool is a flag."""


class Argument(_Described):
    """A positional parameter of the command line."""


class Context(Protocol):
    """State that all commands of one run share. `obj` is the session."""

    @property
    def obj(self) -> Any: ...


class Group:
    """A group of subcommands, such as `flash engine install`."""

    def __init__(self, *, help: str) -> None:  # noqa: A002 -- as typer calls it
        self.help = help
        self._commands: dict[str, Callable[..., None]] = {}

    @property
    def commands(self) -> Mapping[str, Callable[..., None]]:
        return self._commands

    def command(self, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Returns a decorator that adds a function as a subcommand."""

        def added(function: Callable[..., None]) -> Callable[..., None]:
            self._commands[name] = function
            return function

        return added
