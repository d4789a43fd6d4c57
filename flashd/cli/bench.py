# SPDX-License-Identifier: Apache-2.0
"""`flash bench`: measurements of loads and swaps, with the limits of the hardware for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from flashd.bench import copying, memory, stream, swap
from flashd.bench.report import Report
from flashd.cli import output
from flashd.cli.parameters import Argument, Context, Group, Option
from flashd.cli.session import Json, ModelName, session
from flashd.errors import InvalidArgument

app = Group(help="Measure flashd on this machine, and compare it with the limits of the hardware.")

Runs = Annotated[int, Option(min=1, help="Number of runs of each measurement, interleaved; medians are shown.")]


@app.command("stream")
def stream_(
    path: Annotated[Path, Argument(exists=True, help="A safetensors file, or the folder of a checkpoint.")],
    runs: Runs = 7,
    device: Annotated[
        str, Option(help="GPU to load to as well: auto, none, cuda:0 ..., or sim:0, which is simulated in host memory.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Measures cold loads of a file into host memory and to a GPU, if there is one, against the best raw read of it."""
    found = copying.device_of(device)
    if found is None and device not in {"auto", "none"}:
        raise InvalidArgument(f"there is no device {device!r} here", hint="flash status shows what there is")
    with output.own_progress("measuring", of_rounds=True) as show:
        report = stream.run(path, runs=runs, device=found, on_progress=show)
    _show(report, as_json=as_json)


@app.command("memory")
def memory_(context: Context, model: ModelName, runs: Runs = 15, as_json: Json = False) -> None:
    """Measures the time from a D-Bus call to a model's tensors on the device, and from the host tier to the device."""
    with output.own_progress("measuring", of_rounds=True) as show:
        report = memory.run(session(context).client, model, runs=runs, on_progress=show)
    _show(report, as_json=as_json)


@app.command("swap")
def swap_(context: Context, first: ModelName, second: ModelName, runs: Runs = 10, as_json: Json = False) -> None:
    """Measures swaps between two models, each until its first token."""
    with output.own_progress("measuring", of_rounds=True) as show:
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
