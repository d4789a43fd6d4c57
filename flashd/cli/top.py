# SPDX-License-Identifier: Apache-2.0
"""`flash top`: a live view of memory, engines and jobs."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Annotated

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table

from flashd.cli import console, machine, output
from flashd.cli.parameters import Context, Option
from flashd.cli.session import session
from flashd.client.client import Client
from flashd.client.tiers import STORE, Part, Tier, tiers
from flashd.errors import InvalidArgument, NotFound
from flashd.units import format_bytes

_REFRESH_S = 0.5
_WIDTH = 40
_FREE = "·"
# What a tier holds: its mark, by which it is told apart without colours too, its colour and its meaning.
_MARKS = {
    "serving": ("█", "green", "serving"),
    "held": ("▓", "cyan", "leased or pinned"),
    "idle": ("▒", "blue", "would make way"),
    "stored": ("▒", "blue", "stored"),
    "cache": ("▚", "yellow", "KV caches"),
    "engine": ("▞", "magenta", "engines"),
    "more": ("▤", "white", "images and others of flashd"),
    "others": ("░", "bright_black", "other programs"),
}


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
    for _ in range(2):
        pools.add_column(no_wrap=True)
    pools.add_column()
    leased = {device.name: f", {format_bytes(device.leased_bytes)} leased or pinned" for device in devices}
    shown = tiers(models, engines, devices, found)
    for tier in shown:
        numbers = f"{format_bytes(tier.used_bytes)} of {format_bytes(tier.budget_bytes)}"
        pools.add_row(tier.name, _bar(tier), numbers + leased.get(tier.name, ""))
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
    return Group(head, "", pools, _legend(shown), "", processes, "", warm, "", *running)


def _bar(tier: Tier) -> RenderableType:
    """The parts of a tier to scale, of all that it has."""
    parts_bytes = sum(part.size_bytes for part in tier.parts)
    # What fine-tunes share in the store is stored once, but counts for each of them.
    scale = min(1.0, tier.used_bytes / parts_bytes) if tier.kind == STORE and parts_bytes else 1.0
    whole_bytes = max(tier.total_bytes, int(parts_bytes * scale), 1)
    bar: list[tuple[str, str]] = []
    drawn, seen_bytes = 0, 0.0
    for part in tier.parts:
        seen_bytes += part.size_bytes * scale
        mark, colour, _ = _MARKS[_kind(part)]
        end = round(_WIDTH * seen_bytes / whole_bytes)
        bar.append((mark * (end - drawn), colour))
        drawn = end
    return console.coloured([*bar, (_FREE * (_WIDTH - drawn), "bright_black")])


def _kind(part: Part) -> str:
    if part.kind != "weights":
        return part.kind
    return part.held if part.held in _MARKS else "held" if part.held else "idle"


def _legend(shown: list[Tier]) -> RenderableType:
    kinds = {_kind(part) for tier in shown if tier.kind != STORE for part in tier.parts}
    parts: list[tuple[str, str]] = []
    for mark, colour, meaning in dict.fromkeys(marked for kind, marked in _MARKS.items() if kind in kinds):
        parts += [("  " if parts else "", ""), (mark, colour), (f" {meaning}", "")]
    return console.coloured(parts)
