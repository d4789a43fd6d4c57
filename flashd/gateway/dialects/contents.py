# SPDX-License-Identifier: Apache-2.0
"""The content of messages, in dialects whose parts are of more kinds than engines with OpenAI's chats alone read."""

from __future__ import annotations

from collections.abc import Collection

from flashd.errors import InvalidArgument

_SHOWN = 80


def texts(content: object, where: str, kinds: Collection[str], harmless: Collection[str]) -> str | list[dict[str, str]]:
    """A text, or a list of parts of these `kinds`, as the content of a message in OpenAI's chats.

    A part may have `harmless` fields, which say nothing to the model. Raises InvalidArgument for others.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise InvalidArgument(f"{where} has no text and no list of parts as its content")
    found = []
    for part in content:
        kind, text = part.get("type"), part.get("text")
        if kind not in kinds or not isinstance(text, str):
            shown = kind[:_SHOWN] if isinstance(kind, str) else "no type"
            hint = "engines of vLLM read more kinds"
            raise InvalidArgument(f"{where} has a part of {shown!r}; this engine reads only text", hint=hint)
        if unknown := [name for name in part if part[name] and name not in ("type", "text", *harmless)]:
            raise InvalidArgument(f"{where} has a part with {unknown[0][:_SHOWN]!r}, which this engine cannot read")
        found.append({"type": "text", "text": text})
    return found[0]["text"] if len(found) == 1 else found
