# SPDX-License-Identifier: Apache-2.0
"""Output of `flash`: tables and colours on a terminal, plain lines in a pipe, JSON on request.

Results go to standard output, everything else to standard error, so that output can be piped.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from flashd.legible import legible

if TYPE_CHECKING:
    from flashd.client.client import Job
    from flashd.errors import FlashdError

_MAX_CHARACTERS = 100_000


def say(text: str, *, label: str = "", style: str = "") -> None:
    """Prints a message on standard error, after a coloured label if there is one."""
    _print_labelled(sys.stderr, text, label, style)


def print_labelled(text: str, *, label: str = "", style: str = "") -> None:
    """Prints a line of the output, after a coloured label if there is one."""
    _print_labelled(sys.stdout, text, label, style)


def _print_labelled(to: TextIO, text: str, label: str, style: str) -> None:
    if to.isatty():
        from flashd.cli import console

        made = console.console() if to is sys.stdout else console.messages()
        made.print(console.labelled(text, label=label, style=style))
        return
    between = " " if label and text else ""
    print(legible(label) + between + legible(text, _MAX_CHARACTERS, keep="\n"), file=to)


def show_error(error: FlashdError) -> None:
    say("", label=f"flash: {error.message}", style="red")
    if error.hint:
        say(f"       {error.hint}")


def confirm(question: str, *, on_stderr: bool = False) -> None:
    """Asks a yes-or-no question, and ends the program unless the answer is yes."""
    import typer

    with _ends_where_aborted():
        typer.confirm(question, abort=True, err=on_stderr)


def ask_secret(question: str) -> str:
    """Asks for a secret, which is not shown while it is typed."""
    import typer

    with _ends_where_aborted():
        return str(typer.prompt(question, hide_input=True, err=True))


@contextmanager
def _ends_where_aborted() -> Iterator[None]:
    import typer

    try:
        yield
    except typer.Abort:
        say("", label="Aborted.", style="red")
        sys.exit(1)


def print_json(content: object) -> None:
    print(as_json(content))


def as_json(content: object, *, indent: int | None = 2) -> str:
    """Formats as JSON. Characters that do not print are escaped; they occur in strings only."""
    text = json.dumps(_plain(content), indent=indent, ensure_ascii=False)
    return "".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1] for c in text)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """Prints a table on a terminal, or tab-separated lines without a heading in a pipe."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(legible(cell, _MAX_CHARACTERS) for cell in row))
        return
    from flashd.cli import console

    console.console().print(console.table(columns, rows, title=title))


@contextmanager
def job_progress(what: str) -> Iterator[Callable[[Job], None]]:
    """Shows a progress bar on standard error, if that is a terminal. Yields a function that takes the changed job."""
    if not sys.stderr.isatty():
        yield lambda job: None
        return
    from flashd.cli import console

    with console.bar(what) as bar:
        yield lambda job: bar.show(f"{what}: {job.phase}" if job.phase else what, job.done_bytes, job.total_bytes)


def wait(begin: Callable[[], Job], what: str) -> Any:
    """Begins a job and waits for it with a progress bar.

    Ctrl-C cancels the job and reports its end; a job that others have asked for as well goes on. If Ctrl-C comes while
    the job is being requested, it takes effect as soon as the job is known.
    """
    with _first_interrupt_held_back() as was_interrupted:
        job = begin()
    try:
        if was_interrupted():
            raise KeyboardInterrupt
        with job_progress(what) as show:
            return job.wait(show)
    except KeyboardInterrupt:
        job.cancel()
        job.refresh()
        if job.askers and not job.finished:
            from flashd.errors import Cancelled

            raise Cancelled(
                f"{what}: the job goes on, because others have asked for it too", hint="flash jobs shows it"
            ) from None
        return job.wait()


@contextmanager
def _first_interrupt_held_back() -> Iterator[Callable[[], bool]]:
    interrupts = 0

    def note(_number: int, _frame: object) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:  # a second Ctrl-C ends the program at once
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: interrupts > 0
    finally:
        signal.signal(signal.SIGINT, before)


def ago(seconds_since_epoch: float) -> str:
    """Formats a time as `never`, `12 s ago`, `3 h ago` or `5 days ago`."""
    if not seconds_since_epoch:
        return "never"
    seconds = max(0, int(time.time() - seconds_since_epoch))
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds // size} {unit} ago"
    return f"{seconds // 86400} days ago"


def _plain(content: object) -> object:
    import dataclasses

    from flashd.client.client import Job

    if dataclasses.is_dataclass(content) and not isinstance(content, type):
        return dataclasses.asdict(content)
    if isinstance(content, Job):
        return {name: value for name, value in vars(content).items() if not name.startswith("_")}
    if isinstance(content, list | tuple):
        return [_plain(item) for item in content]
    return content


@contextmanager
def own_progress(what: str, *, of_rounds: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Shows progress on standard error, if that is a terminal, of work done in this process: in bytes or in rounds."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from flashd.cli import console

    with console.bar(what, of_rounds=of_rounds) as bar:
        yield lambda done, total: bar.show(what, done, total)
