# SPDX-License-Identifier: Apache-2.0
"""`flash bench`: how fast is it here, and how fast could it be?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashd.bench import stream
from flashd.cli import output
from flashd.cli.session import Json


def register(app: typer.Typer) -> None:
    benches = typer.Typer(help="How fast is it here, and how fast could it be?", no_args_is_help=True)
    benches.command("stream")(stream_)
    app.add_typer(benches, name="bench", rich_help_panel="Machine")


def stream_(
    path: Annotated[Path, typer.Argument(exists=True, help="A safetensors file, or a checkpoint's folder.")],
    runs: Annotated[int, typer.Option(min=1, help="Runs of everything, interleaved; medians are shown.")] = 7,
    as_json: Json = False,
) -> None:
    """Loads a file cold into a host arena, beside the best raw read of it found in the same run."""
    with output.bytes_progress(f"{runs} rounds") as show:
        report = stream.run(path, runs=runs, on_progress=show)
    if as_json:
        print(report.to_json())
        return
    output.print_table(
        ["row", "value", "unit", "limit", "ratio"],
        [[r.name, f"{r.value:.4g}", r.unit, f"{r.limit:.4g}" if r.limit else "", f"{r.ratio:.3f}" if r.ratio else ""]
         for r in report.rows],
    )  # fmt: skip
