# SPDX-License-Identifier: Apache-2.0
"""The generated parts of packaging/docs, as Markdown: each replaces the text between two marks in its page."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import sources
from capabilities import CAPABILITIES
from sources import Command, Entry, Interface, Member

from flashd import user_inbox
from flashd.daemon import main as daemon
from flashd.gateway.dialects import ollama_requests as ollama
from flashd.gateway.metrics import names as metric_names
from flashd.gateway.page import schema
from flashd.gateway.page.rights import ACTIONS
from flashd.workers.torch import fields

_BEGIN = "<!-- generated: {}, by packaging/reference -->"
_END = "<!-- end of {} -->"
_PIPE = "&#124;"
_SECTIONS = {
    "store": "Where checkpoints are kept.",
    "inbox": "The watched folders, whose sources become models.",
    "memory": "Budgets for weights in host and GPU memory.",
    "streamer": "How bytes get from disk to memory.",
    "engines": "The processes that answer.",
    "engines.torch": "The engine built on PyTorch and transformers.",
    "engines.vllm": "The engine built on vLLM.",
    "engines.llama": "The engine built on llama.cpp, for GGUF models.",
    "models.NAME": "Settings of the model NAME; `default` means the value in `[engines]`.",
    "limits": "The most one user may have at once; of what ends with a connection, one connection has half at most.",
    "gateway": "The HTTP address of all models.",
    "bus": "How the daemon is reached.",
}


def generated(folder: Path) -> dict[Path, str]:
    """Returns the whole text of each page that has generated parts."""
    found = {}
    for name, parts in _PARTS.items():
        page = folder / name
        text = page.read_text(encoding="utf-8")
        for part, lines in parts.items():
            text = _replaced(text, part, "\n".join(lines()), name)
        found[page] = text
    return found


def _replaced(text: str, part: str, middle: str, page: str) -> str:
    begin, end = _BEGIN.format(part), _END.format(part)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{page} needs the line {begin!r}, and {end!r} after it, exactly once")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{middle.strip()}\n\n{end}{after}"


# -- configuration.md ------------------------------------------------------------------------------------------------


def settings() -> Iterator[str]:
    by_section: dict[str, list[sources.Setting]] = {}
    for setting in sources.settings():
        by_section.setdefault(setting.section, []).append(setting)
    if by_section.keys() != _SECTIONS.keys():
        raise SystemExit(f"pages.py describes the sections {list(_SECTIONS)}, and there are {list(by_section)}")
    for section, those in by_section.items():
        yield from ("", f"### {section}", "", _SECTIONS[section], "")
        rows = [
            [code(s.key), s.values, literal(s.default), escaped(s.meaning), "no" if s.is_live else "yes"] for s in those
        ]
        yield from table(["setting", "value", "default", "meaning", "restart"], rows)


def daemon_options() -> Iterator[str]:
    yield from entries(sources.options(daemon.parser()), "option")


# -- cli.md ----------------------------------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    flash = sources.flash()
    by_group: dict[str, list[Command]] = {}
    for command in flash.commands:
        by_group.setdefault(command.group, []).append(command)
    yield from ("## Options of flash itself", "", *entries(flash.parameters, "option"))
    for group, those in by_group.items():
        yield from ("", f"## {group}" if group else "## Commands")
        for command in those:
            yield from command_section(command, "###")


def command_section(command: Command, level: str) -> Iterator[str]:
    usage = f"{command.name} {command.usage}".strip()
    yield from ("", f"{level} {command.name}", "", "```text", usage, "```", "", escaped(command.help))
    shown = [entry for entry in command.parameters if entry.term != "--help"]
    if shown:
        yield from ("", *entries(shown, "argument or option"))
    for inner in command.commands:
        yield from command_section(inner, level + "#")


def exit_statuses() -> Iterator[str]:
    yield from table(["status", "meaning"], [[entry.term, escaped(entry.meaning)] for entry in sources.exit_statuses()])


def inbox_options() -> Iterator[str]:
    yield from entries(sources.options(user_inbox.parser()), "option")


# -- dbus.md ---------------------------------------------------------------------------------------------------------


def interfaces() -> Iterator[str]:
    for interface in sources.interfaces():
        yield from ("", f"## {interface.name}", "", escaped(interface.meaning))
        methods = [member for member in interface.members if member.kind != "property"]
        properties = [member for member in interface.members if member.kind == "property"]
        for member in methods:
            yield from member_section(interface, member)
        if properties:
            yield from ("", f"### Properties of {interface.short_name}", "")
            rows = [[code(p.name), code(p.type), escaped(p.meaning)] for p in properties]
            yield from table(["property", "type", "meaning"], rows)


def member_section(interface: Interface, member: Member) -> Iterator[str]:
    kind = " (signal)" if member.kind == "signal" else ""
    yield from ("", f"### {interface.short_name}.{member.name}{kind}")
    yield from ("", "```text", member.signature, "```", "", escaped(member.meaning))
    if member.permission:
        yield from ("", f"Permission on the system bus: {code(member.permission)}.")
    if member.arguments:
        rows = [
            [
                code(argument.name),
                escaped(argument.meaning) + (f" Limits: {argument.limits}." if argument.limits else ""),
            ]
            for argument in member.arguments
        ]
        yield from ("", *table(["argument", "meaning"], rows))


def errors() -> Iterator[str]:
    rows = [[code(e.bus_name), str(e.exit_status), escaped(e.meaning)] for e in sources.bus_errors()]
    yield from table(["error", "exit status of `flash`", "meaning"], rows)


# -- python.md --------------------------------------------------------------------------------------------------------


def python_api() -> Iterator[str]:
    yield from table(
        ["function", "meaning"], [[code(f.term), docstring(f.meaning)] for f in sources.python_functions()]
    )
    for each in sources.python_classes():
        yield from ("", f"### flashd.{each.name}", "", docstring(each.meaning))
        if each.fields:
            yield from ("", f"Fields: {', '.join(map(code, each.fields))}.")
        if each.methods:
            yield from ("", *table(["method", "meaning"], [[code(m.term), docstring(m.meaning)] for m in each.methods]))


# -- http.md ---------------------------------------------------------------------------------------------------------


def request_fields() -> Iterator[str]:
    short = {fields.CHAT: "chat", fields.COMPLETION: "completion", fields.EMBEDDING: "embedding"}
    rows = [
        [code(field.name), ", ".join(word for path, word in short.items() if path in field.paths), escaped(field.does)]
        for field in fields.TABLE.values()
    ]
    yield from table(["field", "requests", "effect"], rows)


def ollama_fields() -> Iterator[str]:
    requests = {
        "chat": ollama.CHAT,
        "generate": ollama.GENERATE,
        "embed": ollama.EMBED,
        "embeddings": ollama.EMBEDDINGS,
    }
    known = {name: field for fields_ in requests.values() for name, field in fields_.items()}
    rows = [
        [
            code(name),
            ", ".join(word for word, has in requests.items() if name in has),
            code(field.becomes),
            escaped(field.does),
        ]
        for name, field in known.items()
    ]
    rows += [
        [code(f"options.{field.name}"), "all", code(field.becomes), escaped(field.does)]
        for field in ollama.OPTIONS.values()
    ]
    yield from table(["field", "requests", "for the engine", "notes"], rows)


# -- metrics.md ------------------------------------------------------------------------------------------------------


def metrics() -> Iterator[str]:
    rows = [
        [code(metric.name), metric.kind, ", ".join(map(code, metric.labels)), escaped(metric.meaning)]
        for metric in metric_names.METRICS
    ]
    yield from table(["metric", "kind", "labels", "meaning"], rows)


def metric_labels() -> Iterator[str]:
    yield from table(["label", "value"], [[code(name), docstring(does)] for name, does in metric_names.LABELS.items()])


# -- page.md ---------------------------------------------------------------------------------------------------------


def page_actions() -> Iterator[str]:
    rows = [
        [code(name), ", ".join(map(code, each.fields.split(", "))), code(each.right), docstring(each.meaning)]
        for name, each in ACTIONS.items()
    ]
    yield from table(["action", "fields", "right", "what it does"], rows)


def page_state() -> Iterator[str]:
    for kind in schema.PARTS.values():
        name, _, meaning = (kind.__doc__ or "").partition(": ")
        yield from ("", f"{name}: {' '.join(meaning.split())}", "")
        rows = [[code(field.name), docstring(field.metadata["doc"])] for field in dataclasses.fields(kind)]
        yield from table(["field", "value"], rows)


# -- clients.md ------------------------------------------------------------------------------------------------------


def capabilities() -> Iterator[str]:
    rows = [[each.name, each.asked_by, each.torch, each.vllm, each.llama] for each in CAPABILITIES.values()]
    yield from table(["", "asked for by", "PyTorch", "vLLM", "llama.cpp"], rows)


# -- Markdown --------------------------------------------------------------------------------------------------------


def entries(those: Iterable[Entry], what: str) -> Iterator[str]:
    yield from table([what, "meaning"], [[code(entry.term), escaped(entry.meaning)] for entry in those])


def table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "| " + " | ".join("---" for _ in head) + " |"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", _PIPE) for cell in row) + " |"


def code(words: str) -> str:
    if "|" in words:  # GitHub and MkDocs differ in how a pipe in code is written in a table
        return f"<code>{html.escape(words).replace('|', _PIPE)}</code>"
    return f"`{words}`" if words else ""


def literal(default: str) -> str:
    """Returns a default as Markdown: TOML as code, words unchanged."""
    is_toml = re.fullmatch(r'".*"|\[.*\]|[\d.]+|true|false', default) is not None
    return code(default) if is_toml else default


def escaped(words: str) -> str:
    """Returns text escaped for Markdown, except underscores within words, which are no markup."""
    return re.sub(r"([*<>\[\]`]|\b_|_\b)", r"\\\1", words)


def docstring(words: str) -> str:
    """Returns text escaped for Markdown, except code in backquotes."""
    parts = re.split(r"(`[^`]*`)", words)
    parts[::2] = map(escaped, parts[::2])
    return "".join(parts)


_PARTS: Mapping[str, Mapping[str, Callable[[], Iterator[str]]]] = {
    "configuration.md": {"settings": settings, "options of flashd": daemon_options},
    "cli.md": {"commands": commands, "exit statuses": exit_statuses, "options of flashd-inbox": inbox_options},
    "python.md": {"API": python_api},
    "dbus.md": {"errors": errors, "interfaces": interfaces},
    "clients.md": {"capabilities": capabilities},
    "http.md": {"request fields": request_fields, "Ollama's fields": ollama_fields},
    "page.md": {"actions": page_actions, "state": page_state},
    "metrics.md": {"metrics": metrics, "labels": metric_labels},
}
