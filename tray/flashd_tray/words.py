# SPDX-License-Identifier: Apache-2.0
"""In which language do we speak? gettext, with the catalogs beside this file.

`tray/translations` extracts the strings and compiles the catalogs.
"""

from __future__ import annotations

import gettext
from collections.abc import Sequence
from pathlib import Path

DOMAIN = "flashd-tray"
CATALOGS = Path(__file__).parent / "locale"


class Words:
    """One language. Called with an English sentence, it gives the translated one."""

    def __init__(self, languages: Sequence[str] | None = None) -> None:
        """The languages to try, best first; by default those of the desktop (LANGUAGE, LC_ALL, LC_MESSAGES, LANG)."""
        self._catalog = gettext.translation(DOMAIN, CATALOGS, languages, fallback=True)

    def __call__(self, sentence: str, **values: object) -> str:
        """`values` go where the sentence says {name}, wherever the translation puts that."""
        translated = self._catalog.gettext(sentence)
        return translated.format(**values) if values else translated

    def many(self, one: str, more: str, count: int, **values: object) -> str:
        """With the plural of the language; {count} stands for the number."""
        return self._catalog.ngettext(one, more, count).format(count=count, **values)
