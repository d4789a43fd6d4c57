# SPDX-License-Identifier: Apache-2.0
"""Shows a swap: a model is dropped and converted, is swapped to, and answers.

Runs the real daemon on a private bus with a temporary home. Exits 0 only if every answer is exactly right.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import arguments
from rich.console import Console
from rich.table import Table

import flashd
from flashd.cli.console import progress
from flashd.client import launch
from flashd.dbus import address
from flashd.units import format_bytes, format_seconds

CHECKOUT = Path(__file__).parents[2]
QUESTION = "Who are you?"
READY_S = 60.0
CONVERTED_S = 3600.0


class WrongAnswer(RuntimeError):
    """Raised if a model does not answer what it was taught."""


@dataclass(slots=True)
class Figures:
    """One model's row of the closing table; durations in seconds."""

    name: str
    size_bytes: int = 0
    convert_s: float = 0.0
    swaps_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Home:
    """The temporary home, in place of /var/lib, /run and the user's home."""

    root: Path  # on the checkout's own file system: a real disk, where O_DIRECT works
    runtime: Path  # short, because a Unix socket's path holds 107 bytes (unix(7))

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def address(self) -> str:
        """Returns the socket of the daemon's private bus."""
        return address.of_socket(self.runtime / "bus")

    @property
    def log(self) -> Path:
        return self.root / "flashd.log"


@contextmanager
def temporary_home(*, keep: bool) -> Iterator[Home]:
    build = CHECKOUT / "build"
    build.mkdir(exist_ok=True)
    home = Home(Path(tempfile.mkdtemp(prefix="quickstart-", dir=build)), Path(tempfile.mkdtemp(prefix="flashd-")))
    home.models.mkdir()
    is_done = False
    try:
        yield home
        is_done = True
    finally:
        if not (keep and is_done):
            for folder in (home.root, home.runtime):
                shutil.rmtree(folder, ignore_errors=True)  # the daemon removes what is its own


@contextmanager
def running(command: list[str | Path], log: Path, *, keep: bool) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a child process that ends with this block, unless it is to be kept and the block ends regularly."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    is_done = False
    try:
        yield process
        is_done = True
    finally:
        if not (keep and is_done):
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def connect(home: Home, daemon: subprocess.Popen[bytes]) -> flashd.Client:
    deadline = time.monotonic() + READY_S
    while True:
        try:
            return flashd.connect(home.address)
        except flashd.errors.Unavailable:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"flashd did not start:\n{home.log.read_text()}") from None
            time.sleep(0.02)


def drop(source: Path, home: Home, name: str) -> None:
    """Copies a folder into the models folder, as a file manager does."""
    shutil.copytree(source, home.models / name, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> str:
    """Hard-links a file if possible, because the disk may not hold a large model three times; else copies it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


class Tour:
    """The steps of the tour, printed as they happen."""

    def __init__(self, client: flashd.Client, home: Home, console: Console) -> None:
        self._client = client
        self._home = home
        self._console = console

    def drop_and_wait(self, source: Path, name: str) -> Figures:
        """Copies a source into the models folder and follows its conversion. Touches nothing but the folder."""
        self._say(f"cp -r {name} ~/models/", f"drop [b]{name}[/b] into the models folder")
        drop(source, self._home, name)
        started = time.monotonic()
        with progress(self._console) as bar:
            task = bar.add_task(f"{name} converts itself", total=None)
            while not (found := [model for model in self._client.models() if model.name == name]):
                for job in self._client.jobs():
                    if job.kind == "import" and job.subject == name:
                        bar.update(task, completed=job.done_bytes, total=job.total_bytes or None)
                self._fail_if_refused(name)
                if time.monotonic() > started + CONVERTED_S:
                    raise SystemExit(f"{name} was not converted in {CONVERTED_S:.0f} s: see {self._home.log}")
                time.sleep(0.05)
        (job,) = [job for job in self._client.jobs() if job.kind == "import" and job.subject == name]
        size_bytes = found[0].size_bytes
        self._console.print(f"  {name} is a model: {format_bytes(size_bytes)}")
        return Figures(name, size_bytes, job.finished_at - job.created_at)

    def swap(self, figures: Figures, label: str) -> None:
        outcome = self._client.swap(figures.name)
        figures.swaps_s[label] = outcome.seconds
        how = f"{outcome.how}, weights from {outcome.from_tier}"
        self._say(f"flash swap {figures.name}", f"{label}: {format_seconds(outcome.seconds)} ({how})")

    def park_and_wake(self, figures: Figures) -> None:
        self._client.park()
        self._say("flash park", "parked: the weights stay warm, the engine's process stays alive")
        self.swap(figures, "warm swap")

    def ask(self, name: str, expected: str | None) -> None:
        messages = [{"role": "user", "content": QUESTION}]
        answer = self._client.chat(name, messages, temperature=0, max_tokens=64)
        self._say(f'flash run {name} "{QUESTION}"', f"[b green]{answer}[/]")
        if answer != expected if expected is not None else not answer.strip():
            raise WrongAnswer(f"{name} should have said {expected!r}, and said {answer!r}")

    def table(self, rows: list[Figures]) -> None:
        taken = {label for row in rows for label in row.swaps_s}
        labels = [label for label in ("cold swap", "warm swap", "cold rebind", "rebind") if label in taken]
        table = Table("model", "bytes", "convert", *labels, title="What it took", title_justify="left")
        for row in rows:
            swaps = [format_seconds(row.swaps_s[label]) if label in row.swaps_s else "" for label in labels]
            table.add_row(row.name, format_bytes(row.size_bytes), format_seconds(row.convert_s), *swaps)
        self._console.print(table)

    def _fail_if_refused(self, name: str) -> None:
        for item in self._client.status().inbox_items:
            if item.name == name and item.state == "failed":
                raise SystemExit(f"{name} could not be converted: {item.detail}")

    def _say(self, command: str, text: str) -> None:
        self._console.print(f"[cyan]$ {command}[/]\n  {text}", highlight=False)


def two_small_models(tour: Tour, home: Home, console: Console) -> None:
    with console.status("making two small chat models, one a fine-tune of the other"):
        warnings.simplefilter("ignore")
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        import small_models
        from small_models import ADA, BOB

        sources = home.root / "sources"
        small_models.make_base(sources / ADA.name)
        small_models.make_finetune(sources / ADA.name, sources / BOB.name)

    ada = tour.drop_and_wait(sources / ADA.name, ADA.name)
    tour.swap(ada, "cold swap")
    tour.ask(ADA.name, ADA.introduction)
    bob = tour.drop_and_wait(sources / BOB.name, BOB.name)
    tour.swap(bob, "cold rebind")
    tour.ask(BOB.name, BOB.introduction)
    tour.swap(ada, "rebind")
    tour.ask(ADA.name, ADA.introduction)
    tour.swap(bob, "rebind")
    tour.ask(BOB.name, BOB.introduction)
    tour.park_and_wake(ada)
    tour.ask(ADA.name, ADA.introduction)
    tour.table([ada, bob])


def one_real_model(tour: Tour, source: Path) -> None:
    name = source.resolve().name
    model = tour.drop_and_wait(source, name)
    tour.swap(model, "cold swap")
    tour.ask(name, None)
    tour.park_and_wake(model)
    tour.ask(name, None)
    tour.table([model])


def main() -> None:
    """Ends everything that was started on Ctrl-C, SIGTERM or the end of the terminal; later signals do not disturb
    that."""
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def ended(number: int, _frame: object) -> None:
        for signal_ in ends:
            signal.signal(signal_, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for signal_ in ends:
        signal.signal(signal_, ended)
    show()


def show() -> None:
    options = arguments.parse()
    console = Console()
    with temporary_home(keep=options.keep) as home:
        command = [
            *(launch.keeper(), home.runtime / "keeper"),
            *(sys.executable, "-m", "flashd.daemon.main", "--bus", "private"),
            *("--state-dir", home.root / "state", "--runtime-dir", home.runtime, "--models-dir", home.models),
        ]
        with running(command, home.log, keep=options.keep) as daemon, connect(home, daemon) as client:
            tour = Tour(client, home, console)
            try:
                if options.source:
                    one_real_model(tour, options.source)
                else:
                    two_small_models(tour, home, console)
            except (flashd.errors.FlashdError, WrongAnswer) as error:
                console.print(f"[red]{error}[/]\n\nThe daemon's last words:", highlight=False)
                console.print("\n".join(home.log.read_text().splitlines()[-20:]), highlight=False, markup=False)
                raise SystemExit(1) from None
        go_on = how_to_go_on(home, options.source) if options.keep else what_next(options.source)
        console.print(go_on, markup=False, highlight=False, soft_wrap=True)


def what_next(source: Path | None) -> str:
    """Says what is gone, and how to keep a model."""
    activate = CHECKOUT / ".venv/bin/activate"
    with suppress(ValueError):
        activate = activate.relative_to(Path.cwd())
    place = shlex.quote(str(source.resolve())) if source else "~/Downloads/Qwen3-0.6B"
    name = shlex.quote(source.resolve().name) if source else "Qwen3-0.6B"
    removed = f"; {source} is unchanged" if source else ""
    return f"""
Every answer was right. This daemon and its models were temporary, and are removed{removed}.
To keep a model of your own, start your own daemon, and drop the model into ~/models:
  . {shlex.quote(str(activate))}
  flash start
  cp -r {place} ~/models/
  flash run {name} "{QUESTION}"
"""


def how_to_go_on(home: Home, source: Path | None) -> str:
    name = shlex.quote(source.resolve().name) if source else "ada"
    flash = shlex.join([str(CHECKOUT / ".venv/bin/flash"), "--bus", home.address])
    return f"""
The daemon is running, apart from any other flashd. It and its models are temporary: the last line removes them.
  alias tour={shlex.quote(flash)}
  tour list
  tour run {name} "{QUESTION}"
  cp -r MODEL_FOLDER {shlex.quote(str(home.models))}/
  tour stop && rm -r {shlex.quote(str(home.root))}
"""


if __name__ == "__main__":
    main()
