# SPDX-License-Identifier: Apache-2.0
"""Removes secrets, identities, paths and names of models from a report.

Known names (of models, the user, the machine) are replaced by a word for what they name; other secrets are recognised
by their form. In doubt, text is removed, because a person can ask about what is missing from a report.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import quote

from flashd.dbus import wire
from flashd.legible import legible

_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # The value after any word for a secret, to the end of the line, because it may contain spaces.
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
        # Long words with upper case, lower case and digits, as in keys; checkpoints are lower-case hexadecimal.
        (r"(?=[\w+/=-]*[a-z])(?=[\w+/=-]*[A-Z])(?=[\w+/=-]*\d)[\w+/=-]{32,}", "[secret]"),
    )
)
# Quotations and file names in a sentence: they may be names of models that no longer exist, so are not known.
_QUOTED = re.compile(r"""(?<!\w)(?:'(?:\\.|[^'\\\n])+'|"(?:\\.|[^"\\\n])+")(?!\w)""")
_SET_ASIDE = re.compile(r"/[^\n]*\.damaged\b")
_FILE = re.compile(
    r"([^\s/\"'(),;:\[\]]+)(\.(?:safetensors|bin|pth?|ckpt|gguf|h5|onnx|json|txt|toml|jinja|part|aria2|crdownload))\b"
)
_USUAL_FILE = re.compile(
    r"(?:model|pytorch_model|adapter_model|consolidated)(?:[-.]\d+(?:-of-\d+)?)?(?:\.safetensors|\.bin)?(?:\.index)?"
    r"|(?:generation_|adapter_|tokenizer_|preprocessor_)?config|tokenizer|special_tokens_map|added_tokens|vocab|merges"
    r"|modules|chat_template|manifest|flashd|dismissed|limits"
)
_OUR_WORD = re.compile(r"['\"](?:\w+-\d+|\[\w+\]|[^'\"]*\.py)['\"]")  # substitutes for names, and our own source files
_SHORTEST_WORD = 2  # for a user called x, every x would be replaced


class Redactor:
    """Replaces what is `known` by its substitutes, and removes what looks like a secret."""

    def __init__(self, known: Mapping[str, str]) -> None:
        words = sorted((word for word in known if len(word) >= _SHORTEST_WORD), key=len, reverse=True)
        self._known = {form: known[word] for word in words for form in _forms(word)}
        forms = "|".join(re.escape(form) for form in sorted(self._known, key=len, reverse=True))
        self._words = re.compile(rf"(?<!\w)(?:{forms})(?!\w)") if forms else None

    def clean(self, text: str) -> str:
        if self._words is not None:
            text = self._words.sub(lambda found: self._known[found[0]], text)
        for shape, replacement in _SHAPES:
            text = shape.sub(replacement, text)
        return text

    def clean_sentences(self, text: str) -> str:
        """Cleans as `clean` does, and removes quotations and file names, except those that every model has."""
        text = _SET_ASIDE.sub("[path].damaged", self.clean(text))
        text = _QUOTED.sub(lambda found: found[0] if _OUR_WORD.fullmatch(found[0]) else "[quoted]", text)
        return _FILE.sub(lambda found: found[0] if _USUAL_FILE.fullmatch(found[1]) else f"[file]{found[2]}", text)


def _forms(word: str) -> Iterator[str]:
    """Yields a name in both Unicode normal forms, as it appears in a sentence, an object path and a record's name."""
    for spelled in (word, unicodedata.normalize("NFC", word), unicodedata.normalize("NFD", word)):
        yield from (spelled, legible(spelled), wire.escape(spelled))
        yield quote(spelled, safe=" ()+,@", errors="replace")


def numbered(names: Iterable[str], noun: str) -> dict[str, str]:
    """Assigns `model-1` and so on to names and to their parts between slashes, the same throughout a report."""
    known: dict[str, str] = {}
    for number, name in enumerate(dict.fromkeys(names), start=1):
        for part in (name, *name.split("/")):
            known.setdefault(part, f"{noun}-{number}")
    return known
