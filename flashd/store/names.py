# SPDX-License-Identifier: Apache-2.0
"""Which names may a model have? Those that people write, and that are safe in a path, a log and a terminal."""

from __future__ import annotations

import unicodedata
from urllib.parse import quote

from flashd.errors import InvalidArgument

MAX_NAME_BYTES = 200  # percent-quoting may triple it, and file systems stop at 255


def check_name(text: str) -> str:
    """The name in its normal form (NFC), for example `Qwen/Qwen3-0.6B`. Raises InvalidArgument."""
    name = unicodedata.normalize("NFC", text).strip()
    hint = "use letters, digits, spaces and . _ - + ( ), with / between an owner and a name"
    if not name.isprintable():  # nor are lone surrogates, which stand for bytes that are no UTF-8
        raise InvalidArgument(f"{text[:80]!r} has unprintable characters", hint=hint)
    if not name or len(quote(name, safe="").encode()) > MAX_NAME_BYTES:
        raise InvalidArgument(f"{text[:80]!r} is empty or too long for the name of a model", hint=hint)
    for segment in name.split("/"):
        if not segment or segment in {".", ".."} or segment.startswith("-") or segment != segment.strip():
            raise InvalidArgument(f"{text[:80]!r} is not a name: {segment!r} cannot stand in it", hint=hint)
    return name


def file_name(name: str) -> str:
    """A name of a file for it; different names have different ones."""
    quoted = quote(name, safe=" ()+,@")
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted
