# SPDX-License-Identifier: Apache-2.0
"""How does `flash` speak? Tables and colours on a terminal, plain lines in a pipe, JSON when asked.

What was asked for goes to standard output, everything else to standard error, so that output can be piped.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn
from rich.table import Table

from flashd.client import Job
from flashd.errors import FlashdError


def console() -> Console:
    """Standard output. Lines are never folded in a pipe: what reads them counts lines."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def messages() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def say(text: str) -> None:
    """Tells a person something that is not the output."""
    messages().print(text)


def show_error(error: FlashdError) -> None:
    to = messages()
    to.print(f"[red]flash: {_escaped(error.message)}[/]")
    if error.hint:
        to.print(f"       {_escaped(error.hint)}")


def print_json(content: Any) -> None:
    print(json.dumps(_plain(content), indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """A table for a terminal; tab-separated lines without a heading for a pipe."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    table = Table(*columns, title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(_escaped(cell) for cell in row))
    console().print(table)


@contextmanager
def job_progress(what: str) -> Iterator[Callable[[Job], None]]:
    """A progress bar on standard error, if that is a terminal, fed with a job as it goes."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    to = messages()
    with Progress(*columns, console=to, transient=True, disable=not to.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def show(job: Job) -> None:
            description = f"{what}: {job.phase}" if job.phase else what
            progress.update(task, description=description, completed=job.done_bytes, total=job.total_bytes or None)

        yield show


def wait(begin: Callable[[], Job], what: str) -> Any:
    """Begins a job and waits for it with a progress bar. Ctrl-C cancels the job, and says what became of it.

    Also when it comes while the job is being asked for: it is obeyed when we know which one to cancel.
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
        return job.wait()


@contextmanager
def _first_interrupt_held_back() -> Iterator[Callable[[], bool]]:
    interrupts = 0

    def note(_number: int, _frame: object) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:  # somebody is in earnest
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: interrupts > 0
    finally:
        signal.signal(signal.SIGINT, before)


def ago(seconds_since_epoch: float) -> str:
    """`never`, `12 s ago`, `3 h ago`, `5 days ago`."""
    if not seconds_since_epoch:
        return "never"
    seconds = max(0, int(time.time() - seconds_since_epoch))
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds // size} {unit} ago"
    return f"{seconds // 86400} days ago"


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def _plain(content: Any) -> Any:
    if dataclasses.is_dataclass(content) and not isinstance(content, type):
        return dataclasses.asdict(content)
    if isinstance(content, Job):
        return {name: value for name, value in vars(content).items() if not name.startswith("_")}
    if isinstance(content, list | tuple):
        return [_plain(item) for item in content]
    return content


@contextmanager
def bytes_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error for work done in this process."""
    to = messages()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=to, transient=True, disable=not to.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)
