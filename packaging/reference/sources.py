# SPDX-License-Identifier: Apache-2.0
"""The documentation in the programs, the settings and the interfaces, for any output format."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import types
import typing
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w
import typer.main

import flashd
from flashd import errors
from flashd.cli.app import app
from flashd.config import loading
from flashd.config.settings import Config
from flashd.daemon.access import authorization
from flashd.dbus import wire

_DOC = "org.gtk.GDBus.DocString"
_LIMITS = {
    "org.flashd1.MaxLength": "texts of at most {} bytes",
    "org.flashd1.MaxItems": "at most {} entries",
    "org.flashd1.MaxValue": "numbers up to {}",
}
_WORDS = {int: "number", float: "number", bool: "`true` or `false`", str: "text", Path: "path"}
_PLURAL = {str: "texts", Path: "paths"}
_DEFAULT_IN_WORDS = re.compile(r"\s*Default: (.*?)\.?$")


@dataclass(frozen=True, slots=True)
class Entry:
    """A term and its meaning: an option, an argument, a file."""

    term: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command of `flash`, or `flash` itself, with the commands below it."""

    name: str
    usage: str
    help: str
    epilog: str
    group: str
    parameters: tuple[Entry, ...]
    commands: tuple[Command, ...]


def flash() -> Command:
    """Returns the whole command line of `flash`, without hidden commands and options."""
    command: Any = typer.main.get_command(app)
    return _command(command, command.make_context("flash", [], resilient_parsing=True))


def _command(command: Any, context: Any) -> Command:
    inner = []
    if hasattr(command, "list_commands"):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if not found.hidden:
                below = found.make_context(name, [], parent=context, resilient_parsing=True)
                inner.append(_command(found, below))
    return Command(
        name=context.command_path,
        usage=" ".join(command.collect_usage_pieces(context)),
        help=plain(command.help or ""),
        epilog=plain(command.epilog or ""),
        group=getattr(command, "rich_help_panel", None) or "",
        parameters=tuple(_parameters(command.params, context)),
        commands=tuple(inner),
    )


def _parameters(params: Iterable[Any], context: Any) -> Iterator[Entry]:
    for param in params:
        record = None if getattr(param, "hidden", False) else param.get_help_record(context)
        if record is not None:
            # Independent of the machine on which this is generated.
            yield Entry(record[0], plain(record[1]).replace(sys.executable, "the one that runs flash"))


def exit_statuses() -> list[Entry]:
    """Returns the exit statuses of `flash`, as its help lists them."""
    listed = flash().epilog.removeprefix("Exit status: ").removesuffix(".")
    return [Entry(*part.split(" ", 1)) for part in re.split(r", (?=\d+ )", listed)]


def options(parser: argparse.ArgumentParser) -> list[Entry]:
    """Returns the options of a program that parses its command line with argparse."""
    found = []
    for action in parser._actions:
        value = action.metavar or ("|".join(action.choices) if action.choices else "")
        found.append(Entry(f"{', '.join(action.option_strings)} {value}".strip(), action.help or ""))
    return found


@dataclass(frozen=True, slots=True)
class Setting:
    """A key of flashd.toml. `values` describes its values; `default` is TOML, or words if it depends on the machine."""

    key: str
    values: str
    default: str
    meaning: str
    is_live: bool

    @property
    def section(self) -> str:
        return self.key.rpartition(".")[0]


def settings() -> list[Setting]:
    values = dict(_values(Config, ""))
    found = []
    for setting in loading.settings():
        default = tomli_w.dumps({"value": setting.default}).removeprefix("value = ").strip()
        meaning = setting.doc
        if in_words := _DEFAULT_IN_WORDS.search(meaning):
            meaning, default = meaning[: in_words.start()], in_words[1]
        found.append(Setting(setting.key, values[setting.key], default, meaning, setting.live))
    return found


def _values(section: type, prefix: str) -> Iterator[tuple[str, str]]:
    """Yields the keys of a section and of those below it, with their values by the types of the fields."""
    for name, hint in typing.get_type_hints(section).items():
        if typing.get_origin(hint) is Mapping:
            yield from _values(typing.get_args(hint)[1], f"{prefix}{name}.NAME.")
        elif dataclasses.is_dataclass(hint):
            yield from _values(hint, f"{prefix}{name}.")
        else:
            key = name.removesuffix("_bytes")
            *others, last = _alternatives(name, hint)
            yield prefix + key, f"{', '.join(others)} or {last}" if others else last


def _alternatives(name: str, hint: Any) -> Iterator[str]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        for one in typing.get_args(hint):
            yield from _alternatives(name, one)
    elif typing.get_origin(hint) is Literal:
        for value in typing.get_args(hint):
            yield f"`{tomli_w.dumps({'v': value}).removeprefix('v = ').strip()}`"
    elif typing.get_origin(hint) is tuple:
        yield f"list of {_PLURAL[typing.get_args(hint)[0]]}"
    elif name.endswith("_bytes"):
        yield "size"
    elif name.endswith("_s"):
        yield "seconds"
    else:
        yield _WORDS[hint]


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a method or a signal. `limits` states its greatest size."""

    name: str
    type: str
    is_result: bool
    meaning: str
    limits: str


@dataclass(frozen=True, slots=True)
class Member:
    """A method, a signal or a property of an interface. `permission` is the polkit action that a method requires."""

    kind: str
    name: str
    type: str
    access: str
    meaning: str
    permission: str
    arguments: tuple[Argument, ...]

    @property
    def signature(self) -> str:
        """Returns the call for readers: Swap (model: s, options: a{sv}) -> (job: o)."""

        def listed(*, results: bool) -> str:
            return ", ".join(f"{a.name}: {a.type}" for a in self.arguments if a.is_result is results)

        if self.kind == "property":
            return f"{self.name} : {self.type} ({self.access})"
        returned = listed(results=True)
        return f"{self.name} ({listed(results=False)})" + (f" -> ({returned})" if returned else "")


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface of the bus."""

    name: str
    meaning: str
    members: tuple[Member, ...]

    @property
    def short_name(self) -> str:
        return self.name.rpartition(".")[2]


def interfaces() -> list[Interface]:
    """Returns all interfaces, from the XML that the daemon serves as its introspection."""
    found = []
    for name in wire.INTERFACES:
        (element,) = ET.fromstring(wire.interface_xml(name)).iter("interface")
        members = tuple(_member(name, child) for child in element if child.tag != "annotation")
        found.append(Interface(name, _annotation(element, _DOC), members))
    return found


def _member(interface: str, element: ET.Element) -> Member:
    action = authorization.ACTIONS.get((interface, element.get("name", "")), authorization.Action.READ)
    return Member(
        kind=element.tag,
        name=element.get("name", ""),
        type=element.get("type", ""),
        access=element.get("access", ""),
        meaning=_annotation(element, _DOC),
        permission="" if action is authorization.Action.READ else f"{wire.BUS_NAME}.{action.name.lower()}",
        arguments=tuple(_argument(child) for child in element.iter("arg")),
    )


def _argument(element: ET.Element) -> Argument:
    limits = [words.format(_annotation(element, name)) for name, words in _LIMITS.items() if _annotation(element, name)]
    return Argument(
        name=element.get("name", ""),
        type=element.get("type", ""),
        is_result=element.get("direction", "in") == "out",
        meaning=_annotation(element, _DOC),
        limits=", ".join(limits),
    )


def _annotation(element: ET.Element, name: str) -> str:
    return next((a.get("value", "") for a in element.findall("annotation") if a.get("name") == name), "")


@dataclass(frozen=True, slots=True)
class Error:
    """An error of the bus, the command line and the Python API."""

    name: str
    bus_name: str
    exit_status: int
    meaning: str


def bus_errors() -> list[Error]:
    """Returns all errors, with their meanings from the tree at the top of flashd/errors.py."""
    meanings = dict(re.findall(r"^[\s│├└─]*(\w+) +\d+ +(.+)$", errors.__doc__ or "", re.MULTILINE))
    classes = _subclasses(errors.FlashdError)
    return [Error(c.__name__, c.bus_name(), c.exit_status, meanings[c.__name__]) for c in classes]


def _subclasses(cls: type[errors.FlashdError]) -> list[type[errors.FlashdError]]:
    direct = [child for child in cls.__subclasses__() if child.__module__ == errors.__name__]
    return [found for child in direct for found in (child, *_subclasses(child))]


def plain(words: str) -> str:
    """Returns text in one line, without terminal markup."""
    without = re.sub(r"\[/?(bold|dim|green|red|yellow|cyan)\]", "", words)
    return re.sub(r"\s*\n\s*", " ", without).strip()


@dataclass(frozen=True, slots=True)
class Class:
    """A class of the Python API: its description, fields and method signatures."""

    name: str
    meaning: str
    fields: tuple[str, ...]
    methods: tuple[Entry, ...]


def python_functions() -> list[Entry]:
    """Returns the functions of the package."""
    found = [(name, getattr(flashd, name)) for name in flashd.__all__]
    return [_called(name, each) for name, each in found if inspect.isfunction(each)]


def python_classes() -> list[Class]:
    """Returns the classes of the package, without its errors."""
    found = [getattr(flashd, name) for name in flashd.__all__]
    classes = [each for each in found if inspect.isclass(each) and not issubclass(each, Exception)]
    return sorted((_class(each) for each in classes), key=lambda each: (not each.methods, each.name))


def _class(described: type) -> Class:
    members = [(name, member) for name, member in vars(described).items() if not name.startswith("_")]
    fields = dataclasses.fields(described) if dataclasses.is_dataclass(described) else ()
    return Class(
        name=described.__name__,
        meaning=_first_paragraph(described),
        fields=tuple(field.name for field in fields if not field.name.startswith("_")),
        methods=tuple(_called(name, member) for name, member in members if inspect.isfunction(member)),
    )


def _called(name: str, function: Any) -> Entry:
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=p.empty) for p in parameters if p.name != "self"]
    return Entry(f"{name}{inspect.Signature(bare)}", _first_paragraph(function))


def _first_paragraph(documented: Any) -> str:
    return plain((inspect.getdoc(documented) or "").partition("\n\n")[0])
