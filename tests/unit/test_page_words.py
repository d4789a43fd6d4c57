# SPDX-License-Identifier: Apache-2.0
"""The languages of the gateway's page: each catalogue has the sentences that the code has, and no others."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

STATIC = Path(__file__).parents[2] / "flashd" / "gateway" / "page" / "static"
_TEXT = r'("(?:[^"\\]|\\.)*")'
_CALLS = (re.compile(rf"\b_\(\s*{_TEXT}"), re.compile(rf"\bmany\(\s*{_TEXT},\s*{_TEXT}"))
_PLACE = re.compile(r"\{\w+\}")
CATALOGUES = sorted(STATIC.glob("words.*.json"))


def sentences() -> set[str]:
    """What the code asks translations for."""
    code = "\n".join(path.read_text() for path in STATIC.glob("*.js") if path.name != "words.js")
    code += 'many("never", "just now")'  # of words.js, which defines the functions
    found = {ast.literal_eval(text) for call in _CALLS for match in call.finditer(code) for text in match.groups()}
    assert len(found) > 100
    return found


def test_there_are_the_languages_of_the_tray() -> None:
    assert [path.name for path in CATALOGUES] == ["words.de.json", "words.zh.json"]


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: path.name)
def test_a_catalogue_is_complete(path: Path) -> None:
    catalogue = json.loads(path.read_text())
    assert sentences() - catalogue.keys() == set(), "these are not translated"
    assert catalogue.keys() - sentences() == set(), "the page no longer says these"
    for sentence, said in catalogue.items():
        missing = set(_PLACE.findall(said)) ^ set(_PLACE.findall(sentence))
        assert said and not missing - {"{count}"}, sentence


def test_every_text_of_the_page_can_be_translated() -> None:
    """No element gets a sentence that is not passed to a function of words.js."""
    bare = re.compile(r'h\("[\w.]+", (?:\{[^{}]*\}|null), "([^"]*[a-z]{3,} [a-z]{2,}[^"]*)"')
    for path in STATIC.glob("*.js"):
        assert bare.findall(path.read_text()) == [], path.name
