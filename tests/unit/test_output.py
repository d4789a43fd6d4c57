# SPDX-License-Identifier: Apache-2.0
"""Text from outside is shown literally and cannot control the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Group

from flashd.cli import console, output
from flashd.errors import NotFound

CLI = Path(output.__file__).parent
HOSTILE = "x[/bold] [red]y[/red] :fire: \x1b[2J\u202e\u200b\x9b2J"
SHOWN = r"x[/bold] [red]y[/red] :fire: \x1b[2J\u202e\u200b\x9b2J"


def test_everything_that_is_said_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    output.say(HOSTILE)
    output.say(HOSTILE, label="failed", style="red")
    output.show_error(NotFound(HOSTILE, hint=HOSTILE))
    console.messages().print(Group(HOSTILE, HOSTILE))
    said = capsys.readouterr().err
    assert said.count(SHOWN) == 6 and "\x1b" not in said and "\u202e" not in said


def test_tables_keep_their_rows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    output.print_table(["a", "b"], [[HOSTILE, "one\ttwo\nthree"]])
    assert capsys.readouterr().out == f"{SHOWN}\tone\\ttwo\\nthree\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    output.print_table(["a", "b"], [[HOSTILE, "plain"]])
    assert SHOWN in capsys.readouterr().out


def test_json_stays_json() -> None:
    written = output.as_json([HOSTILE, "\ud800", "\U000e0041"])
    assert written.replace("\n", "").isprintable()
    assert json.loads(written) == [HOSTILE, "\ud800", "\U000e0041"]


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.name)
def test_only_one_module_makes_consoles_and_text(path: Path) -> None:
    """So that nothing meets the terminal in another way."""
    source = path.read_text()
    if path.name != "console.py":
        for name in ("rich.console import Console", "rich.text", "rich.markup", "rich import print", "from_markup"):
            assert name not in source
