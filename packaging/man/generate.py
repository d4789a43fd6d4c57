# SPDX-License-Identifier: Apache-2.0
"""Writes the manual pages into a folder: flash(1), flashd(8), flashd-inbox(1), flashd.toml(5) and org.flashd1(5).

    python packaging/man/generate.py FOLDER

Everything in them comes from what the programs themselves use: the commands of typer, the parsers of argparse, the
settings, and the interface XML. So they cannot say anything else than those.
"""

from __future__ import annotations

import argparse
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tomli_w
import typer.main

import flashd
from flashd import config, handover, wire
from flashd.cli.app import app
from flashd.daemon import main as daemon

DOC = "org.gtk.GDBus.DocString"


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Every page by the name of its file."""
    return {
        "flash.1": flash_page(),
        "flashd.8": daemon_page(),
        "flashd-inbox.1": inbox_page(),
        "flashd.toml.5": settings_page(),
        "org.flashd1.5": interfaces_page(),
    }


def flash_page() -> str:
    command: Any = typer.main.get_command(app)
    context = command.make_context("flash", [], resilient_parsing=True)
    lines = [
        *head("flash", 1, "hold models and switch between them"),
        *synopsis(["flash", "[OPTION]...", "COMMAND", "[ARGUMENT]..."]),
        ".SH DESCRIPTION",
        text(command.help),
        ".SH OPTIONS",
        *parameters(command.params, context),
        ".SH COMMANDS",
    ]
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        if inner.hidden:
            continue
        usage = " ".join(inner.collect_usage_pieces(context))
        lines += [
            f".SS flash {text(name)} {text(usage)}".rstrip(),
            text(inner.help or ""),
            *parameters(inner.params, context),
        ]
    lines += [".SH EXIT STATUS", text(command.epilog.removeprefix("Exit status: "))]
    lines += see_also(("flashd", 8), ("flashd.toml", 5), ("org.flashd1", 5))
    return document(lines)


def daemon_page() -> str:
    paths = config.default_paths(config.Scope.SYSTEM)
    lines = [
        *head("flashd", 8, "daemon that holds models and switches between them"),
        *from_argparse(daemon.parser()),
        ".SH THE MACHINE'S DAEMON",
        text(
            "As a systemd service, flashd runs as the user flashd on the system bus. "
            "Enable it with systemctl enable --now flashd; without that, the first call on the bus starts it. "
            "Members of the group flashd and the user at the machine's screen may use and manage models; whatever "
            "else changes something asks for an administrator's password (polkit, actions org.flashd1.use, "
            "org.flashd1.manage and org.flashd1.administer). What somebody made belongs to them: others change it only "
            "as administrators, and do not see it if it is private (flash import --private)."
        ),
        text(
            "Engines run as the user flashd-engine, in instances of flashd-engine@.service: one for each process that "
            "engines are forked from, which a connection to flashd-engine.socket starts. They go on while the daemon "
            "is restarted, upgraded or killed, and end when it is stopped, since the service manager then lets go of "
            "their control channels. systemctl edit flashd-engine@ changes how much memory they may take."
        ),
        ".SH FILES",
        *items(
            [
                (str(paths.config), "The configuration; see flashd.toml(5)."),
                (f"{paths.drop_ins}/*.toml", "Drop-ins, read after it in order of name."),
                (str(paths.models), "Sources dropped here become models. Members of the group flashd may write."),
                (f"{paths.state}/store", "Converted models."),
                (f"{paths.state}/environments", "What flash engine install made; engines read it."),
                (str(config.ENGINE_STATE), "What engines compiled for themselves; it may be removed while none runs."),
                (
                    f"{paths.runtime}/openai.sock",
                    "Where the active model answers HTTP requests in OpenAI's style, to members of the group flashd; "
                    "nobody connects here while it is a private one. Whoever may use it and cannot connect gets a "
                    "connection from the method OpenEndpoint, as flash run does.",
                ),
            ]
        ),
        *see_also(("flash", 1), ("flashd-inbox", 1), ("flashd.toml", 5), ("org.flashd1", 5)),
    ]
    return document(lines)


def inbox_page() -> str:
    lines = [
        *head("flashd-inbox", 1, "hand what is dropped into your models folder to flashd"),
        *from_argparse(handover.parser()),
        ".SH NOTES",
        text(
            "The machine's daemon cannot read homes. This program runs as you, opens what has settled in ~/models, and "
            "hands it over as file descriptors. It is a service of every user's systemd: "
            "systemctl --user status flashd-inbox shows what it did. The section [inbox] of your own "
            "~/.config/flashd/flashd.toml counts for it. A model of yours is replaced when its source changes; "
            "one that somebody else made never is."
        ),
        *see_also(("flash", 1), ("flashd", 8), ("flashd.toml", 5)),
    ]
    return document(lines)


def settings_page() -> str:
    lines = [
        *head("flashd.toml", 5, "configuration of flashd"),
        ".SH SYNOPSIS",
        ".nf",
        "/etc/flashd/flashd.toml",
        "/etc/flashd/flashd.toml.d/*.toml",
        "~/.config/flashd/flashd.toml",
        "~/.config/flashd/flashd.toml.d/*.toml",
        ".fi",
        ".SH DESCRIPTION",
        text(
            "TOML. Settings come, each overriding the one before, from the defaults, the file, its drop-ins in order "
            "of name, and the command line. A key that is not known, or a value of the wrong type, is an error. "
            'Sizes are written with their unit, for example "64GB". flash config shows what is in force, and '
            "flash config KEY VALUE writes a drop-in. What one model has different stands in a section of its own: "
            '[models."Qwen/Qwen3-0.6B"], and in a key its name stands for NAME: '
            "flash config models.Qwen/Qwen3-0.6B.engine vllm."
        ),
        ".SH SETTINGS",
    ]
    for setting in config.settings():
        value = tomli_w.dumps({"value": setting.default}).removeprefix("value = ").strip()
        default = "" if "Default:" in setting.doc else f" Default: {value}"
        when = "A change is in force at once." if setting.live else "A change is in force after a restart."
        lines += items([(setting.key, f"{setting.doc}{default}. {when}".replace("..", "."))])
    lines += see_also(("flash", 1), ("flashd", 8))
    return document(lines)


def interfaces_page() -> str:
    lines = [
        *head(wire.BUS_NAME, 5, "D-Bus interface of flashd"),
        ".SH DESCRIPTION",
        text(
            f"The machine's daemon is {wire.BUS_NAME} on the system bus; its root object is {wire.ROOT_PATH}. "
            "The same text, as introspection XML, is in /usr/share/dbus-1/interfaces."
        ),
        ".SH COMPATIBILITY",
        text(
            f"What is documented here stays as long as the name {wire.BUS_NAME} does: members keep their names, "
            "signatures and meanings. New interfaces, methods, properties, signals, options, keys in dictionaries, "
            "values of states and errors may appear: ignore what you do not know. What must change in another way gets "
            "a new name, org.flashd2, and both are served for a time."
        ),
    ]
    for name in wire.INTERFACES:
        (interface,) = ET.fromstring(wire.interface_xml(name)).iter("interface")
        lines += [f".SH {text(name).upper()}", text(docs(interface))]
        for member in interface:
            if member.tag == "method":
                lines += [f".SS {text(signature(member))}", text(docs(member))]
                lines += items((argument.get("name", ""), docs(argument)) for argument in member.iter("arg"))
            elif member.tag == "signal":
                lines += [f".SS {text('signal ' + signature(member))}", text(docs(member))]
                lines += items((argument.get("name", ""), docs(argument)) for argument in member.iter("arg"))
            elif member.tag == "property":
                kind = f"{member.get('name')} : {member.get('type')} ({member.get('access')})"
                lines += [f".SS {text('property ' + kind)}", text(docs(member))]
    lines += see_also(("flash", 1), ("flashd", 8), ("busctl", 1))
    return document(lines)


# -- roff ------------------------------------------------------------------------------------------------------------


def head(name: str, section: int, purpose: str) -> list[str]:
    title = f'.TH {text(name).upper()} {section} "" "flashd {flashd.__version__}"'
    return [title, ".SH NAME", f"{text(name)} \\- {text(purpose)}"]


def synopsis(words: Iterable[str]) -> list[str]:
    program, *rest = words
    return [".SH SYNOPSIS", f"{bold(program)} {' '.join(text(word) for word in rest)}"]


def from_argparse(parser: argparse.ArgumentParser) -> list[str]:
    usage = " ".join(parser.format_usage().split()).removeprefix("usage: ").split(" ")
    rows = []
    for action in parser._actions:
        value = action.metavar or ("|".join(action.choices) if action.choices else "")
        rows.append((f"{', '.join(action.option_strings)} {value}".strip(), action.help or ""))
    return [*synopsis(usage), ".SH DESCRIPTION", text(parser.description or ""), ".SH OPTIONS", *items(rows)]


def parameters(params: Iterable[Any], context: Any) -> Iterator[str]:
    for param in params:
        record = None if param.hidden else param.get_help_record(context)
        if record is not None:
            yield from items([record])


def items(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for term, meaning in rows:
        yield from (".TP", bold(term), text(meaning))


def see_also(*others: tuple[str, int]) -> list[str]:
    return [
        ".SH SEE ALSO",
        ",\n".join(f".BR {text(name)} ({section})" for name, section in others).replace(",\n", " ,\n"),
    ]


def bold(words: str) -> str:
    return f"\\fB{text(words)}\\fR"


def text(words: str) -> str:
    """Any text as roff: escaped, without markup of terminals, no line taken for a request."""
    plain = re.sub(r"\[/?(bold|dim|green|red|yellow|cyan)\]", "", words).strip()
    plain = re.sub(r"\s*\n\s*", " ", plain)
    plain = plain.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + plain if plain.startswith((".", "'")) else plain


def signature(member: ET.Element) -> str:
    def listed(direction: str) -> str:
        found = [a for a in member.iter("arg") if a.get("direction", "in") == direction]
        return ", ".join(f"{a.get('name')}: {a.get('type')}" for a in found)

    returned = listed("out")
    return f"{member.get('name')} ({listed('in')})" + (f" -> ({returned})" if returned else "")


def docs(element: ET.Element) -> str:
    return next((a.get("value", "") for a in element.findall("annotation") if a.get("name") == DOC), "")


def document(lines: Iterable[str]) -> str:
    return '.\\" SPDX-License-Identifier: Apache-2.0\n' + "\n".join(line for line in lines if line) + "\n"


if __name__ == "__main__":
    main()
