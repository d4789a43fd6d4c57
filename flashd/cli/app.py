# SPDX-License-Identifier: Apache-2.0
"""The `flash` command: its options, its commands, and what its exit status means."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated

import typer

import flashd
from flashd import errors
from flashd.cli import bench, doctor, engines, familiar, machine, models, output, report, serving
from flashd.cli.session import Session


def _statuses() -> str:
    """The exit statuses, from the classes that define them."""
    meanings = [
        "0 done", "1 something else", "2 wrong usage", "3 not found", "4 already exists", "5 not authorised", "6 busy",
        "7 bad source", "8 corrupt checkpoint", "9 store full", "10 out of memory", "11 I/O error", "12 engine failed",
        "13 not there: the daemon, the hub, an engine's software", "14 cancelled", "15 a GPU refused",
        "16 limit exceeded", "70 a defect of flashd",
    ]  # fmt: skip
    return "Exit status: " + ", ".join(meanings) + "."


app = typer.Typer(
    name="flash",
    help="Holds models and switches between them. Drop a model into the models folder; flash run NAME asks it.",
    epilog=_statuses(),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"flash {flashd.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    bus: Annotated[str | None, typer.Option(metavar="BUS", help="session, system or a D-Bus address.")] = None,
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")] = False,
) -> None:
    context.obj = context.with_resource(Session(bus))


serving.register(app)
models.register(app)
familiar.register(app)
machine.register(app)
engines.register(app)
doctor.register(app)
report.register(app)
bench.register(app)


def run() -> None:
    """Runs the command line, and turns errors into a message and a status."""
    try:
        app()
    except errors.FlashdError as error:
        output.show_error(error)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has seen enough. Without this, flushing at exit would complain a second time.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
