# SPDX-License-Identifier: Apache-2.0
"""`flash bench`: how fast is it here, and how fast could it be?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashd.bench import copying, memory, stream, swap
from flashd.bench.report import Report
from flashd.cli import output
from flashd.cli.session import Json, ModelName, session
from flashd.errors import InvalidArgument

Runs = Annotated[int, typer.Option(min=1, help="Runs of everything, interleaved; medians are shown.")]


def register(app: typer.Typer) -> None:
    benches = typer.Typer(help="How fast is it here, and how fast could it be?", no_args_is_help=True)
    benches.command("stream")(stream_)
    benches.command("memory")(memory_)
    benches.command("swap")(swap_)
    app.add_typer(benches, name="bench", rich_help_panel="Machine")


def stream_(
    path: Annotated[Path, typer.Argument(exists=True, help="A safetensors file, or a checkpoint's folder.")],
    runs: Runs = 7,
    device: Annotated[
        str, typer.Option(help="Load to this GPU as well: auto, none, cuda:0 ..., or sim:0, which is host memory.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Loads a file cold into host memory, and to a GPU if there is one, beside the best raw read of it."""
    found = copying.device_of(device)
    if found is None and device not in {"auto", "none"}:
        raise InvalidArgument(f"there is no device {device!r} here", hint="flash status shows what there is")
    with output.bytes_progress(f"{runs} rounds") as show:
        report = stream.run(path, runs=runs, device=found, on_progress=show)
    _show(report, as_json=as_json)


def memory_(context: typer.Context, model: ModelName, runs: Runs = 15, as_json: Json = False) -> None:
    """From a D-Bus call to tensors of a model on the device, and from the host tier to the device."""
    with output.bytes_progress(f"{runs} rounds") as show:
        report = memory.run(session(context).client, model, runs=runs, on_progress=show)
    _show(report, as_json=as_json)


def swap_(context: typer.Context, first: ModelName, second: ModelName, runs: Runs = 10, as_json: Json = False) -> None:
    """Swaps between two models, each until its first token."""
    with output.bytes_progress(f"{runs} rounds") as show:
        report = swap.run(session(context).client, (first, second), runs=runs, on_progress=show)
    _show(report, as_json=as_json)


def _show(report: Report, *, as_json: bool) -> None:
    if as_json:
        print(report.to_json())
        return
    output.print_table(
        ["row", "value", "unit", "limit", "ratio"],
        [[r.name, f"{r.value:.4g}", r.unit, f"{r.limit:.4g}" if r.limit else "", f"{r.ratio:.3f}" if r.ratio else ""]
         for r in report.rows],
    )  # fmt: skip
