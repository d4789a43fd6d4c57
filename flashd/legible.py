# SPDX-License-Identifier: Apache-2.0
"""Makes text from outside (file names, a user's or a model's words) safe to send, log and show.

Unprintable characters are escaped as in Python: control characters and terminal sequences (`\\x1b`), marks that reorder
or hide text (`\\u202e`, `\\u200b`), NUL, which D-Bus does not carry, and bytes that are not UTF-8 (`\\xff`), which
cannot be encoded. Legible text is unchanged, so escaping twice has no further effect.
"""

from __future__ import annotations

MAX_CHARACTERS = 1000  # about half a screen
# Letters by their Unicode category, but invisible (DerivedCoreProperties.txt, Default_Ignorable_Code_Point).
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")


def legible(text: str, limit: int = MAX_CHARACTERS, *, keep: str = "") -> str:
    """Returns the text with unprintable characters escaped, except those in `keep`.

    The middle of a text longer than `limit` characters is left out.
    """
    text = _shortened(text, limit)
    if _is_plain(text):
        return text
    escaped = "".join(c if c in keep or (c.isprintable() and c not in _INVISIBLE) else _escape(c) for c in text)
    return _shortened(escaped, limit)


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _escape(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # a byte that is not UTF-8, as os.fsdecode represents it (PEP 383)
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 2
    return f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"
