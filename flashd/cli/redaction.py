# SPDX-License-Identifier: Apache-2.0
"""What must a report that strangers read not contain? Secrets, who and where its writer is, and what models are called.

What is known beforehand (names of models, of the user, of the machine) is replaced by what it is; the rest is
recognised by its shape. When in doubt it goes: a report that says too little can be asked about.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from flashd import wire

_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # The value of whatever calls itself a secret: to the end of the line, for it may have spaces.
        (
            r"(?i)\b([\w-]*(?:token|secret|passw(?:or)?d|api[_-]?key|credential|authorization|cookie)[\w-]*"
            r"[\"']?\s*(?:[=:]|\s)\s*).+",
            r"\1[secret]",
        ),
        (r"(?i)\b(bearer|basic)\s+[\w.~+/=-]+", r"\1 [secret]"),
        (r"(?s)-----BEGIN [^-]+-----.*?(?:-----END [^-]+-----|\Z)", "[secret]"),
        (
            r"\b(?:hf|sk|pk|rk|gh[pousr]|github_pat|glpat|xox[abprs]|nvapi|AKIA|ASIA|AIza|eyJ)[-_]?[\w.-]{8,}",
            "[secret]",
        ),
        (r"(\w+://)[^\s/@]+@", r"\1[secret]@"),
        (r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b", "[address]"),
        (r"\b\d{1,3}(?:\.\d{1,3}){3}\b", "[address]"),
        (r"\b(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}\b", "[address]"),
        (r"(?:/home|/Users|/root|/var/home|/run/user|/media|/mnt)(?:/[^\s\"'<>|:]*)?", "[path]"),
        # Long and with letters of both cases and digits, as keys are; checkpoints are lower-case hexadecimal.
        (r"(?=[\w+/=-]*[a-z])(?=[\w+/=-]*[A-Z])(?=[\w+/=-]*\d)[\w+/=-]{32,}", "[secret]"),
    )
)
_SHORTEST_WORD = 2  # a user called x would take every x with them


class Redactor:
    """Takes out what is `known`, by what stands in its place, and what looks like a secret."""

    def __init__(self, known: Mapping[str, str]) -> None:
        words = sorted((word for word in known if len(word) >= _SHORTEST_WORD), key=len, reverse=True)
        # Of a name, the form in an object path as well.
        self._known = {form: known[word] for word in words for form in (word, wire.escape(word))}
        forms = "|".join(re.escape(form) for form in sorted(self._known, key=len, reverse=True))
        self._words = re.compile(rf"(?<!\w)(?:{forms})(?!\w)") if forms else None

    def clean(self, text: str) -> str:
        if self._words is not None:
            text = self._words.sub(lambda found: self._known[found[0]], text)
        for shape, replacement in _SHAPES:
            text = shape.sub(replacement, text)
        return text


def numbered(names: Iterable[str], noun: str) -> dict[str, str]:
    """`model-1` and so on, the same for the same name throughout a report."""
    return {name: f"{noun}-{number}" for number, name in enumerate(dict.fromkeys(names), start=1)}
