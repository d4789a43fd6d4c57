# SPDX-License-Identifier: Apache-2.0
"""Compiles one catalog of translations, for the build, which must not need gettext: compile_catalog.py IN.po OUT.mo

The formats are those of GNU gettext's manual, "The Format of PO Files" and "The Format of GNU MO Files". Contexts are
refused; `tray/translations --check`, which uses gettext, refuses entries that are fuzzy or not translated.
"""

from __future__ import annotations

import ast
import os
import re
import struct
import sys
from pathlib import Path

_MAGIC = 0x950412DE
_HEAD = struct.Struct("<7I")  # magic, version, entries, where both tables begin, and a hash table that we leave out
_FIELD = re.compile(r'(msgid|msgid_plural|msgstr(?:\[\d+\])?)?\s*(".*")')


def messages(po: str) -> dict[str, str]:
    """Parses messages and their translations. Plural forms are joined by NUL, as in the compiled catalog."""
    found: dict[str, str] = {}
    sentence: list[str] = []
    translation: list[str] = []
    for line in [*po.splitlines(), 'msgid ""']:
        if not line or line.startswith("#"):
            continue
        matched = _FIELD.fullmatch(line)
        if matched is None:
            raise ValueError(f"{line!r} is not a line of a catalog")
        field, text = matched[1], ast.literal_eval(matched[2])
        if field == "msgid":
            if any(translation):
                found["\0".join(sentence)] = "\0".join(translation)
            sentence, translation = [text], []
        elif field == "msgid_plural":
            sentence.append(text)
        elif field is not None:
            translation.append(text)
        else:
            (translation or sentence)[-1] += text
    return found


def compiled(po: str) -> bytes:
    pairs = sorted((sentence.encode(), said.encode()) for sentence, said in messages(po).items())
    keys_at = _HEAD.size
    values_at = keys_at + 8 * len(pairs)
    text_at = values_at + 8 * len(pairs)
    tables, text = b"", b""
    for column in (0, 1):
        for pair in pairs:
            tables += struct.pack("<2I", len(pair[column]), text_at + len(text))
            text += pair[column] + b"\0"
    return _HEAD.pack(_MAGIC, 0, len(pairs), keys_at, values_at, 0, text_at) + tables + text


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    partial = target.with_suffix(f".{os.getpid()}")  # a tray may be reading the catalog
    partial.write_bytes(compiled(source.read_text(encoding="utf-8")))
    partial.rename(target)
