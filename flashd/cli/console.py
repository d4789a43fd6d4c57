# SPDX-License-Identifier: Apache-2.0
"""Terminal output with rich: consoles, coloured labels, tables and progress bars.

Importing rich takes longer than most commands do, so flashd/cli/output.py imports this module only for a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from flashd.legible import legible
from flashd.units import format_bytes

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


def coloured(parts: Iterable[tuple[str, str]]) -> Text:
    """Returns texts, each in its style, as one."""
    return Text.assemble(*((legible(text), style) for text, style in parts))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> Table:
    made = Table(*columns, title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        made.add_row(*row)
    return made


class _BarOfKnown(BarColumn):
    """A bar for work of a known amount; nothing for other work, which has its spinner."""

    def render(self, task: Task) -> Any:
        return super().render(task) if task.total is not None else Text()


class _Bytes(ProgressColumn):
    """The bytes done, of how many if that is known, and their rate; nothing until there are any."""

    def render(self, task: Task) -> Text:
        if task.total is None and not task.completed:
            return Text()
        of_all = f" of {format_bytes(int(task.total))}" if task.total is not None else ""
        rate = f", {format_bytes(int(task.speed))}/s" if task.speed else ""
        return Text(f"{format_bytes(int(task.completed))}{of_all}{rate}", style="progress.download")


class _Rounds(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"round {int(task.completed)} of {int(task.total)}" if task.total is not None else "")


def progress(to: Console, *, of_rounds: bool = False) -> Progress:
    """Returns a display of progress, in bytes or in rounds, which leaves nothing behind on a terminal."""
    amount = _Rounds() if of_rounds else _Bytes()
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), _BarOfKnown(), amount)
    return Progress(*columns, console=to, transient=True, disable=not to.is_terminal)


class Bar:
    """A progress bar on standard error."""

    def __init__(self, shown: Progress, what: str) -> None:
        self._progress = shown
        self._task = shown.add_task(legible(what), total=None)

    def show(self, what: str, done: int, total: int) -> None:
        """Shows progress in bytes or rounds. `total` is 0 while it is unknown."""
        self._progress.update(self._task, description=legible(what), completed=done, total=total or None)


@contextmanager
def bar(what: str, *, of_rounds: bool = False) -> Iterator[Bar]:
    with progress(messages(), of_rounds=of_rounds) as shown:
        yield Bar(shown, what)
