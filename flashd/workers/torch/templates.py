# SPDX-License-Identifier: Apache-2.0
"""Selects a model's chat template, and prepares messages in the form that it takes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flashd.errors import EngineFailed
from flashd.workers.torch.requests import BadRequest

_FILE, _NEWER = "chat_template.json", "chat_template.jinja"
_DEFAULT = "default"
_MOST_CHARACTERS = 500  # characters of a template's refusal


def beside(folder: Path) -> str | dict[str, str] | None:
    """Reads chat_template.json, which multimodal models have. None without it, or if there is the newer
    chat_template.jinja.
    """
    if not (folder / _FILE).exists() or (folder / _NEWER).exists():
        return None
    try:
        found = json.loads((folder / _FILE).read_bytes())
        return named(found["chat_template"])
    except (ValueError, KeyError, TypeError, RecursionError):
        hint = "write an object with the template as chat_template"
        raise EngineFailed(f"{_FILE} cannot be read", hint=hint) from None


def named(found: Any) -> str | dict[str, str]:
    """Returns one template, or several by name. Raises ValueError, KeyError or TypeError for other values."""
    if isinstance(found, str):
        return found
    pairs = found.items() if isinstance(found, dict) else [(entry["name"], entry["template"]) for entry in found]
    templates = dict(pairs)
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise TypeError
    return templates


def chosen(templates: str | Mapping[str, str] | None) -> str:
    """Returns the template for plain conversations. Raises BadRequest if there is none."""
    if not templates:
        raise BadRequest("this model has no chat template: use /v1/completions", param="messages")
    if isinstance(templates, str):
        return templates
    if _DEFAULT in templates or len(templates) == 1:
        return templates.get(_DEFAULT) or next(iter(templates.values()))
    names = ", ".join(sorted(templates))[:_MOST_CHARACTERS]
    message = f"this model has several chat templates ({names}), but no default: use /v1/completions"
    raise BadRequest(message, param="messages")


def prepared(messages: Sequence[Mapping[str, object]], template: str) -> list[dict[str, object]]:
    """Converts messages, whose contents are lists of texts, to the template's form.

    Raises BadRequest for parts that the template would ignore.
    """
    if "tool_calls" not in template and any("tool_calls" in message for message in messages):
        raise BadRequest("this model's chat template does not support tool_calls", param="messages")
    is_of_parts = takes_parts(template)
    return [{**message, "content": _content(message["content"], is_of_parts)} for message in messages]


def _content(texts: object, is_of_parts: bool) -> object:
    assert isinstance(texts, list)
    return [{"type": "text", "text": text} for text in texts] if is_of_parts else "\n".join(texts)


@functools.lru_cache(maxsize=8)
def takes_parts(template: str) -> bool:
    """Tells whether a template loops over the content of messages, which is then a list of parts, not a text."""
    try:
        tree = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(template)
    except (jinja2.TemplateSyntaxError, RecursionError):
        return False  # rendering reports the error
    contents = {
        target.name
        for assignment in tree.find_all(nodes.Assign)
        if isinstance(target := assignment.target, nodes.Name) and _is_content(assignment.node, ())
    }
    return any(_is_content(loop.iter, contents) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node, names: Iterable[str]) -> bool:
    while isinstance(node, nodes.Filter | nodes.CondExpr | nodes.Test):
        node = node.expr1 if isinstance(node, nodes.CondExpr) else node.node  # type: ignore[assignment]
    match node:
        case nodes.Getattr(attr="content") | nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Name():
            return node.name in names
    return False


class _Generation(jinja2.ext.Extension):
    """The block with which some templates mark the assistant's messages."""

    tags = {"generation"}  # noqa: RUF012 -- declared like this in jinja2

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
