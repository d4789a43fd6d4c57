# SPDX-License-Identifier: Apache-2.0
"""The language of the tray: gettext, with the catalogs beside this file.

`tray/translations` extracts the strings; the build compiles the catalogs (native/CMakeLists.txt).
"""

from __future__ import annotations

import gettext
from collections.abc import Sequence
from pathlib import Path

from flashd.units import format_bytes, format_seconds

DOMAIN = "flashd-tray"
CATALOGS = Path(__file__).parent / "locale"


class Words:
    """A language. Called with an English sentence, it returns the translation."""

    def __init__(self, languages: Sequence[str] | None = None) -> None:
        """`languages` are tried in order; by default those of the desktop (LANGUAGE, LC_ALL, LC_MESSAGES, LANG)."""
        self._catalog = gettext.translation(DOMAIN, CATALOGS, languages, fallback=True)

    def __call__(self, sentence: str, **values: object) -> str:
        """Translates a sentence, and inserts `values` for each {name} in the translation."""
        translated = self._catalog.gettext(sentence)
        return translated.format(**values) if values else translated

    def size(self, size_bytes: int) -> str:
        """Formats a size such as `16.4 GB`, with the decimal sign of the language."""
        return self._localised(format_bytes(size_bytes))

    def duration(self, seconds: float) -> str:
        """Formats a duration such as `1.25 s`, with the decimal sign of the language."""
        return self._localised(format_seconds(max(0.0, seconds)))

    def _localised(self, number: str) -> str:
        _ = self
        # TRANSLATORS: the decimal sign, as in 1.5
        return number.replace(".", _("."))

    def many(self, one: str, more: str, count: int, **values: object) -> str:
        """Translates with the plural of the language; {count} stands for the number."""
        return self._catalog.ngettext(one, more, count).format(count=count, **values)
