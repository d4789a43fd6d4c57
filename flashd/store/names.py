# SPDX-License-Identifier: Apache-2.0
"""Checks names of models, which must be safe in a path, a log and a terminal."""

from __future__ import annotations

import unicodedata
from urllib.parse import quote

from flashd.errors import InvalidArgument

MAX_NAME_BYTES = 200  # percent-quoting may triple it, and the limit of file systems is 255


def check_name(text: str) -> str:
    """Returns the name in its normal form (NFC), for example `Qwen/Qwen3-0.6B`. Raises InvalidArgument."""
    name = unicodedata.normalize("NFC", text).strip()
    hint = "use letters, digits, spaces and . _ - + ( ), with / between an owner and a name"
    if not name.isprintable():  # nor are lone surrogates, which stand for bytes that are not UTF-8
        raise InvalidArgument(f"{text[:80]!r} has unprintable characters", hint=hint)
    if not name or len(quote(name, safe="").encode()) > MAX_NAME_BYTES:
        raise InvalidArgument(f"{text[:80]!r} is empty or too long for the name of a model", hint=hint)
    for segment in name.split("/"):
        if not segment or segment in {".", ".."} or segment.startswith("-") or segment != segment.strip():
            raise InvalidArgument(f"{text[:80]!r} is not a name: {segment!r} cannot be a part of it", hint=hint)
    return name


def file_name(name: str) -> str:
    """Returns a unique file name for a model's name."""
    quoted = quote(name, safe=" ()+,@")
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted
