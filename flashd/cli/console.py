# SPDX-License-Identifier: Apache-2.0
"""Terminal output with rich: consoles, coloured labels, tables and progress bars.

Importing rich takes longer than most commands do, so flashd/cli/output.py imports this module only for a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from flashd.legible import legible

MAX_CHARACTERS = 100_000


class _Console(Console):
    """A console that interprets no text as markup, since names and messages come from outside.

    Colours are given with `style`, or as a `Text`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        plain = legible(text, MAX_CHARACTERS, keep="\n")
        return super().render_str(plain, **{**options, "markup": False, "emoji": False})


def console() -> Console:
    """A console on standard output. In a pipe lines are never folded, because programs read them line by line."""
    return _Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def messages() -> Console:
    """A console on standard error."""
    return _Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def labelled(text: str, *, label: str = "", style: str = "") -> Text:
    """Returns the label in its style, followed by the text."""
    between = " " if label and text else ""
    return Text.assemble((legible(label), style), between + legible(text, MAX_CHARACTERS, keep="\n"))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> Table:
    made = Table(*columns, title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        made.add_row(*row)
    return made


class Bar:
    """A progress bar on standard error."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._progress = progress
        self._task = progress.add_task(legible(what), total=None)

    def show(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Shows progress. `total_bytes` is 0 while it is unknown."""
        self._progress.update(self._task, description=legible(what), completed=done_bytes, total=total_bytes or None)


@contextmanager
def bar(what: str, *, spins: bool) -> Iterator[Bar]:
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    spinner = [SpinnerColumn()] if spins else []
    to = messages()
    with Progress(*spinner, *columns, console=to, transient=True, disable=not to.is_terminal) as progress:
        yield Bar(progress, what)
