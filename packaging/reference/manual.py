# SPDX-License-Identifier: Apache-2.0
"""The manual pages: flash(1), flashd(8), flashd-gateway(8), flashd-inbox(1), flashd.toml(5) and
org.flashd1(5), as roff."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

import sources
from sources import Command, Entry

from flashd import user_inbox
from flashd._version import __version__
from flashd.config.paths import ENGINE_STATE, Scope, default_paths
from flashd.daemon import main as daemon
from flashd.dbus import wire
from flashd.gateway import main as gateway


def pages() -> dict[str, str]:
    """Returns the text of every page by the name of its file."""
    return {
        "flash.1": flash_page(),
        "flashd.8": daemon_page(),
        "flashd-gateway.8": gateway_page(),
        "flashd-inbox.1": inbox_page(),
        "flashd.toml.5": settings_page(),
        "org.flashd1.5": interfaces_page(),
    }


def flash_page() -> str:
    flash = sources.flash()
    lines = [
        *head("flash", 1, "hold models and switch between them"),
        *synopsis(["flash", "[OPTION]...", "COMMAND", "[ARGUMENT]..."]),
        ".SH DESCRIPTION",
        text(flash.help),
        ".SH OPTIONS",
        *items(flash.parameters),
        ".SH COMMANDS",
        *(line for command in flash.commands for line in command_section(command)),
        ".SH EXIT STATUS",
        text(flash.epilog.removeprefix("Exit status: ")),
        *see_also(("flashd", 8), ("flashd.toml", 5), ("org.flashd1", 5)),
    ]
    return document(lines)


def command_section(command: Command) -> Iterator[str]:
    yield f".SS {text(command.name)} {text(command.usage)}".rstrip()
    yield text(command.help)
    yield from items(command.parameters)
    for inner in command.commands:
        yield from command_section(inner)


def daemon_page() -> str:
    paths = default_paths(Scope.SYSTEM)
    lines = [
        *head("flashd", 8, "daemon that holds models and switches between them"),
        *from_argparse(daemon.parser()),
        ".SH THE SYSTEM DAEMON",
        text(
            "As a systemd service, flashd runs as the user flashd on the system bus. "
            "Enable it with systemctl enable --now flashd; otherwise the first call on the bus starts it. "
            "Members of the group flashd and the user at the machine's screen may use and manage models; every other "
            "change asks for an administrator's password (polkit, actions org.flashd1.use, org.flashd1.manage and "
            "org.flashd1.administer). A model belongs to the user who made it: only that user and administrators may "
            "change it, and only they can see it if it is private (flash import --private)."
        ),
        text(
            "Engines run as the user flashd-engine, in instances of flashd-engine@.service: one for each process that "
            "engines are forked from, started by a connection to flashd-engine.socket. They keep running while the "
            "daemon is restarted, upgraded or killed. They end when the daemon is stopped, because the service manager "
            "then closes their control channels. To limit their memory, use systemctl edit flashd-engine@."
        ),
        ".SH FILES",
        *items(
            [
                Entry(str(paths.config), "The configuration; see flashd.toml(5)."),
                Entry(f"{paths.drop_ins}/*.toml", "Drop-ins, read after it in order of name."),
                Entry(
                    str(paths.models),
                    "Sources dropped here become models. Members of the group flashd may write to it.",
                ),
                Entry(f"{paths.state}/store", "Converted models."),
                Entry(f"{paths.state}/environments", "Environments made by flash engine install; engines read them."),
                Entry(
                    str(ENGINE_STATE),
                    "Compilation caches of engines; may be removed while no engine is running.",
                ),
                Entry(
                    f"{paths.runtime}/openai.sock",
                    "Where the active model answers OpenAI-style HTTP requests from members of the group flashd. "
                    "While a private model is active, nobody can connect to it directly: users who may use the model "
                    "get a connection from the method OpenEndpoint, as flash run does.",
                ),
            ]
        ),
        *see_also(("flash", 1), ("flashd-inbox", 1), ("flashd.toml", 5), ("org.flashd1", 5)),
    ]
    return document(lines)


def gateway_page() -> str:
    lines = [
        *head("flashd-gateway", 8, "one HTTP address for all models"),
        *from_argparse(gateway.parser()),
        ".SH NOTES",
        text(
            "Requests name their model, in OpenAI's HTTP interface; a model that does not serve yet is loaded. On the "
            "machine it runs as the user flashd-gateway on the system bus: enable it with systemctl enable --now "
            "flashd-gateway.socket. It then listens at http://127.0.0.1:8434, where every local program may use the "
            "models that are not private, and at /run/flashd-gateway.sock, for members of the group flashd. Another "
            "address is set by systemctl edit flashd-gateway.socket."
        ),
        *see_also(("flash", 1), ("flashd", 8)),
    ]
    return document(lines)


def inbox_page() -> str:
    lines = [
        *head("flashd-inbox", 1, "hand sources in your models folder to flashd"),
        *from_argparse(user_inbox.parser()),
        ".SH NOTES",
        text(
            "The system daemon cannot read homes. This program runs as you, opens sources in ~/models when their "
            "writes have stopped, and hands them over as file descriptors. It is a service of every user's systemd: "
            "systemctl --user status flashd-inbox shows what it did. It reads the section [inbox] of your own "
            "~/.config/flashd/flashd.toml. When the source of one of your models changes, the model is replaced; a "
            "model that another user made never is."
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
            "A TOML file. Settings come from the defaults, the file, its drop-ins in order of name, and the command "
            "line; each overrides the one before. An unknown key or a value of the wrong type is an error. "
            'Sizes are written with their unit, for example "64GB". flash config shows the settings in force, and '
            "flash config KEY VALUE writes a drop-in. Settings of a single model have a section of their own, "
            '[models."Qwen/Qwen3-0.6B"]; in a key, its name replaces NAME: '
            "flash config models.Qwen/Qwen3-0.6B.engine vllm."
        ),
        ".SH SETTINGS",
    ]
    for setting in sources.settings():
        when = "Takes effect at once." if setting.is_live else "Takes effect after a restart."
        meaning = f"{setting.meaning.rstrip('.')}. Default: {setting.default}. {when}"
        lines += items([Entry(setting.key, meaning)])
    lines += see_also(("flash", 1), ("flashd", 8))
    return document(lines)


def interfaces_page() -> str:
    lines = [
        *head(wire.BUS_NAME, 5, "D-Bus interface of flashd"),
        ".SH DESCRIPTION",
        text(
            f"The system daemon is {wire.BUS_NAME} on the system bus; its root object is {wire.ROOT_PATH}. "
            "The same text, as introspection XML, is in /usr/share/dbus-1/interfaces."
        ),
        ".SH COMPATIBILITY",
        text(
            f"As long as the name is {wire.BUS_NAME}, everything documented here stays: members keep their names, "
            "signatures and meanings. New interfaces, methods, properties, signals, options, keys in dictionaries, "
            "values of states and errors may appear: ignore those you do not know. An incompatible change would get "
            "a new name, org.flashd2, and both would be served for a time."
        ),
    ]
    for interface in sources.interfaces():
        lines += [f".SH {text(interface.name).upper()}", text(interface.meaning)]
        for member in interface.members:
            kind = "" if member.kind == "method" else f"{member.kind} "
            lines += [f".SS {text(kind + member.signature)}", text(member.meaning)]
            lines += items(Entry(argument.name, argument.meaning) for argument in member.arguments)
    lines += see_also(("flash", 1), ("flashd", 8), ("busctl", 1))
    return document(lines)


# -- roff ------------------------------------------------------------------------------------------------------------


def head(name: str, section: int, purpose: str) -> list[str]:
    title = f'.TH {text(name).upper()} {section} "" "flashd {__version__}"'
    return [title, ".SH NAME", f"{text(name)} \\- {text(purpose)}"]


def synopsis(words: Iterable[str]) -> list[str]:
    program, *rest = words
    return [".SH SYNOPSIS", f"{bold(program)} {' '.join(text(word) for word in rest)}"]


def from_argparse(parser: argparse.ArgumentParser) -> list[str]:
    usage = " ".join(parser.format_usage().split()).removeprefix("usage: ").split(" ")
    described = [".SH DESCRIPTION", text(parser.description or "")]
    return [*synopsis(usage), *described, ".SH OPTIONS", *items(sources.options(parser))]


def items(entries: Iterable[Entry]) -> Iterator[str]:
    for entry in entries:
        yield from (".TP", bold(entry.term), text(entry.meaning))


def see_also(*others: tuple[str, int]) -> list[str]:
    return [
        ".SH SEE ALSO",
        ",\n".join(f".BR {text(name)} ({section})" for name, section in others).replace(",\n", " ,\n"),
    ]


def bold(words: str) -> str:
    return f"\\fB{text(words)}\\fR"


def text(words: str) -> str:
    """Returns text as roff: escaped, in one line, and never taken for a request."""
    plain = sources.plain(words).replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + plain if plain.startswith((".", "'")) else plain


def document(lines: Iterable[str]) -> str:
    return '.\\" SPDX-License-Identifier: Apache-2.0\n' + "\n".join(line for line in lines if line) + "\n"
