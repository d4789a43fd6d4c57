# SPDX-License-Identifier: Apache-2.0
"""Parses plain command lines without typer, whose import alone takes longer than most commands do.

A plain line has the name of a command, options with their full names, and valid arguments. Everything else is left to
typer: help, completion, spellings such as `--no-explain`, and all errors. Both parse a plain line in the same way
(tests/unit/test_command_line.py).
"""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from flashd.cli.commands import HOMES, found
from flashd.cli.parameters import Argument, Context, Group, Option

_INTEGER = re.compile(r"\d{1,15}", re.ASCII)
_NUMBER = re.compile(r"\d{1,15}(\.\d{1,15})?", re.ASCII)


class _NotPlain(Exception):
    """Raised for a command line that typer has to parse."""


@dataclass(frozen=True, slots=True)
class Call:
    """A command and its parameters. `bus` is the value of --bus."""

    function: Callable[..., None]
    bus: str | None
    context_name: str  # name of the parameter that takes the context; empty if there is none
    values: dict[str, object]


@dataclass(frozen=True, slots=True)
class _Parameter:
    name: str
    kind: Any  # the type of one value
    is_list: bool
    described: Option | Argument


def read(words: Sequence[str]) -> Call | None:
    """Parses a command line. Returns None if it is not plain."""
    try:
        bus = None
        if words[:1] == ["--bus"] and len(words) > 2 and not words[1].startswith("-"):
            bus, words = words[1], words[2:]
        function, rest = _command(words)
        return _call(function, bus, rest)
    except _NotPlain:
        return None


def _command(words: Sequence[str]) -> tuple[Callable[..., None], Sequence[str]]:
    if not words or words[0] not in HOMES:
        raise _NotPlain
    command = found(words[0])
    if isinstance(command, Group):
        if len(words) < 2 or words[1] not in command.commands:
            raise _NotPlain
        return command.commands[words[1]], words[2:]
    return command, words[1:]


def _call(function: Callable[..., None], bus: str | None, words: Sequence[str]) -> Call:
    context_name = ""
    options: dict[str, _Parameter] = {}
    arguments = []
    for name, hint in typing.get_type_hints(function, include_extras=True).items():
        if hint is Context:
            context_name = name
        elif name != "return":
            parameter = _parameter(name, hint)
            if isinstance(parameter.described, Argument):
                arguments.append(parameter)
            else:
                options.update((spelling, parameter) for spelling in _spellings(parameter))
    values, positional = _options(options, words)
    values.update(_arguments(arguments, positional, function))
    return Call(function, bus, context_name, values)


def _parameter(name: str, hint: Any) -> _Parameter:
    kind, described = typing.get_args(hint)
    if isinstance(kind, types.UnionType):
        (kind,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
    is_list = typing.get_origin(kind) is list
    return _Parameter(name, typing.get_args(kind)[0] if is_list else kind, is_list, described)


def _spellings(parameter: _Parameter) -> Iterator[str]:
    """Yields the spellings of an option, except pairs such as `--raw/--no-raw`, which are left to typer."""
    names = parameter.described.names
    if names:
        yield from (name for name in names if "/" not in name)
    elif parameter.kind is not bool:
        yield "--" + parameter.name.replace("_", "-")


def _options(options: dict[str, _Parameter], words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Separates the values of options from the other words."""
    values: dict[str, Any] = {}
    positional = []
    pending = list(reversed(words))
    while pending:
        word = pending.pop()
        if word == "-" or not word.startswith("-"):
            positional.append(word)
            continue
        name, equals, text = word.partition("=") if word.startswith("--") else (word, "", "")
        parameter = options.get(name)
        if parameter is None or (parameter.name in values and not parameter.is_list):
            raise _NotPlain
        if parameter.kind is bool:
            if equals:
                raise _NotPlain
            values[parameter.name] = True
            continue
        if not equals:
            if not pending or pending[-1].startswith("-"):
                raise _NotPlain
            text = pending.pop()
        value = _value(parameter, text)
        if parameter.is_list:
            values.setdefault(parameter.name, []).append(value)
        else:
            values[parameter.name] = value
    return values, positional


def _arguments(
    arguments: Sequence[_Parameter], words: Sequence[str], function: Callable[..., None]
) -> Iterator[tuple[str, object]]:
    rest = list(words)
    # Only the last parameters have defaults.
    code = function.__code__
    optional = set(code.co_varnames[code.co_argcount - len(function.__defaults__ or ()) : code.co_argcount])
    for argument in arguments:
        if argument.is_list and rest:
            if argument is not arguments[-1]:
                raise _NotPlain
            yield argument.name, [_value(argument, word) for word in rest]
            rest = []
        elif rest:
            yield argument.name, _value(argument, rest.pop(0))
        elif argument.name not in optional:
            raise _NotPlain
    if rest:
        raise _NotPlain


def _value(parameter: _Parameter, text: str) -> object:
    settings = parameter.described.settings
    value: object
    if parameter.kind is str:
        value = text
    elif parameter.kind is int and _INTEGER.fullmatch(text):
        value = int(text)
    elif parameter.kind is float and _NUMBER.fullmatch(text):
        value = float(text)
    elif parameter.kind is Path and text:
        value = Path(text)
        is_unfit = not os.access(value, os.F_OK) or (settings.get("file_okay") is False and not value.is_dir())
        if settings.get("exists") and is_unfit:
            raise _NotPlain
    elif isinstance(parameter.kind, type) and issubclass(parameter.kind, StrEnum) and text in set(parameter.kind):
        value = parameter.kind(text)
    else:
        raise _NotPlain
    if "min" in settings and value < settings["min"]:
        raise _NotPlain
    return value
