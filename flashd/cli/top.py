# SPDX-License-Identifier: Apache-2.0
"""`flash top`: a live view of memory, engines and jobs."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Annotated

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from flashd.cli import console, machine, output
from flashd.cli.parameters import Context, Option
from flashd.cli.session import session
from flashd.client.client import Client
from flashd.errors import InvalidArgument, NotFound
from flashd.units import format_bytes

_REFRESH_S = 0.5


def top(
    context: Context,
    once: Annotated[bool, Option(help="Print the view once and exit.")] = False,
) -> None:
    """Shows memory and engines live, until Ctrl-C; once if the output is not a terminal."""
    client = session(context).client
    if once or not sys.stdout.isatty():
        console.console().print(_overview(client))
        return
    with suppress(KeyboardInterrupt), Live(_overview(client), console=console.console(), auto_refresh=False) as live:
        while True:
            time.sleep(_REFRESH_S)
            live.update(_overview(client), refresh=True)


def _overview(client: Client) -> RenderableType:
    try:
        found, engines, devices, jobs_now = client.status(), client.engines(), client.devices(), client.jobs()
        models = client.models()
    except NotFound as error:
        raise InvalidArgument(str(error)) from None
    pools = Table(box=None, pad_edge=False, show_header=False)
    for device in devices:
        bar = ProgressBar(total=device.budget_bytes, completed=device.used_bytes, width=40)
        numbers = f"{format_bytes(device.used_bytes)} of {format_bytes(device.budget_bytes)}"
        pools.add_row(device.name, bar, f"{numbers}, {format_bytes(device.leased_bytes)} leased or pinned")
    processes = Table("engine", "state", "model", "requests", "own memory", "of GPUs", box=None, pad_edge=False)
    for engine in engines:
        memory = [format_bytes(engine.memory_bytes), format_bytes(engine.device_bytes) if engine.device_bytes else ""]
        processes.add_row(str(engine.pid), engine.state, engine.model, str(engine.active_requests), *memory)
    warm = Table("in memory", "size", "leases", "used", box=None, pad_edge=False)
    for model in models:
        if model.residency != "stored":
            mark = "* " if model.active else "  "
            used = output.ago(model.last_used_at)
            warm.add_row(mark + model.name, format_bytes(model.size_bytes), str(model.leases), used)
    running = [
        f"{job.kind} {job.subject}: {machine.state(job)} {machine.progress(job)}"
        for job in jobs_now
        if not job.finished
    ]
    rests = f", {found.resting_model} rests" if found.resting_model else ""
    said = f"active{rests}; {len(models)} models"
    head = console.labelled(said, label=found.active_model or "no model", style="bold")
    return Group(head, "", pools, "", processes, "", warm, "", *running)
