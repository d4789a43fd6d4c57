# SPDX-License-Identifier: Apache-2.0
"""Makes text safe for the desktop, because names, errors and details come from outside.

All text in the menu, tooltips, windows and notifications passes through here, after names were inserted into sentences.
Underscores need no escape, because our labels have no access keys.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

from flashd.legible import legible

LINE_CHARACTERS = (
    160  # as wide as a small screen; the middle is removed, because names of fine-tunes differ at their ends
)


def line(text: str) -> str:
    """Makes one legible line, short enough for a menu."""
    return legible(" ".join(text.split("\n")), LINE_CHARACTERS)


def paragraph(text: str) -> str:
    """Legible text of bounded length with its line breaks, as for a window."""
    return legible(text, keep="\n")


def markup(text: str) -> str:
    """Escapes a paragraph for programs that interpret markup, such as notification daemons."""
    return escape(paragraph(text))
