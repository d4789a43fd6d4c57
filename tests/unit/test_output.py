# SPDX-License-Identifier: Apache-2.0
"""Text from outside is shown literally and cannot control the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console, Group

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


def shown(done: int, total: int, *, of_rounds: bool = False) -> str:
    """What a terminal shows of a job."""
    progress = console.progress(Console(file=io.StringIO(), force_terminal=True), of_rounds=of_rounds)
    console.Bar(progress, "work").show("work: reading", done, total)
    page = Console(file=io.StringIO(), width=100, color_system=None)
    with page.capture() as captured:
        page.print(progress.get_renderable())
    return " ".join(captured.get().split()[1:])  # without the spinner


def test_progress_without_a_total_has_a_spinner_and_what_is_known() -> None:
    assert shown(0, 0) == "work: reading"
    assert shown(12_000_000, 0) == "work: reading 12 MB"


def test_progress_with_a_total_has_a_bar() -> None:
    assert shown(12_000_000, 24_000_000).endswith("━ 12 MB of 24 MB")
    assert shown(3, 7, of_rounds=True).endswith("━ round 3 of 7")


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.name)
def test_only_one_module_makes_consoles_and_text(path: Path) -> None:
    """So that nothing meets the terminal in another way."""
    source = path.read_text()
    if path.name != "console.py":
        for name in ("rich.console import Console", "rich.text", "rich.markup", "rich import print", "from_markup"):
            assert name not in source
