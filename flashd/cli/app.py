# SPDX-License-Identifier: Apache-2.0
"""The whole command line in typer: help, completion, all spellings of options, and messages about usage errors."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from flashd._version import __version__
from flashd.cli.commands import HOMES, found
from flashd.cli.near_paths import exists, why_missing
from flashd.cli.parameters import Argument, Context, Group, Option
from flashd.cli.session import Session


class _Commands(MutableMapping[str, Any]):
    """typer's commands by name, each created on first use."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = _command(name)
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(HOMES)

    def __len__(self) -> int:
        return len(HOMES)


def _command(name: str) -> Any:
    panel = HOMES[name].panel
    command = found(name)
    alone = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="rich")
    if isinstance(command, Group):
        inner = typer.Typer(help=command.help, no_args_is_help=True)
        for below, function in command.commands.items():
            inner.command(below)(_for_typer(function))
        alone.add_typer(inner, name=name, rich_help_panel=panel)
    else:
        alone.command(name, hidden=not panel, rich_help_panel=panel)(_for_typer(command))
    return typer.main.get_group(alone).commands[name]


def _for_typer(function: Callable[..., None]) -> Callable[..., None]:
    """The function with its parameters described in typer's own terms."""

    @functools.wraps(function)
    def called(*given: object, **named: object) -> None:
        function(*given, **named)

    hints = {name: _hint(hint) for name, hint in typing.get_type_hints(function, include_extras=True).items()}
    signature = inspect.signature(function)
    parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in signature.parameters.values()]
    called.__annotations__ = hints
    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return called


def _hint(hint: Any) -> Any:
    if hint is Context:
        return typer.Context
    if typing.get_origin(hint) is not Annotated:
        return hint
    kind, described = typing.get_args(hint)
    makers = {Option: typer.Option, Argument: typer.Argument}
    settings = dict(described.settings)
    if settings.pop("exists", False):
        settings["callback"] = _existing
    return Annotated[kind, makers[type(described)](*described.names, **settings)]


def _existing(path: Path | None) -> Path | None:
    """In place of typer's own check, which does not say what is there."""
    if path is not None and not exists(path):
        raise typer.BadParameter(why_missing(path))
    return path


class _Group(typer.core.TyperGroup):
    def __init__(self, **described: Any) -> None:
        super().__init__(**{**described, "commands": _Commands()})


def _statuses() -> str:
    """The exit statuses, from the classes that define them."""
    meanings = [
        "0 done", "1 something else", "2 wrong usage", "3 not found", "4 already exists", "5 not authorised", "6 busy",
        "7 bad source", "8 corrupt checkpoint", "9 store full", "10 out of memory", "11 I/O error", "12 engine failed",
        "13 unavailable: the daemon, the hub, an engine's software", "14 cancelled", "15 GPU error",
        "16 limit exceeded", "70 a bug in flashd",
    ]  # fmt: skip
    return "Exit status: " + ", ".join(meanings) + "."


app = typer.Typer(
    name="flash",
    cls=_Group,
    help="Keeps models in memory and switches between them. Drop a model into the models folder, then flash run NAME.",
    epilog=_statuses(),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"flash {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    bus: Annotated[str | None, typer.Option(metavar="BUS", help="session, system or a D-Bus address.")] = None,
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    context.obj = context.with_resource(Session(bus))
