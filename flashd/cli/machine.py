# SPDX-License-Identifier: Apache-2.0
"""Commands about the machine: the daemon, its memory, its jobs, its settings."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

import flashd
from flashd import config as configuration
from flashd import starting
from flashd.cli import output
from flashd.cli.session import Json, Session, session
from flashd.client import Client, Engine, Event, Job
from flashd.errors import FlashdError, InvalidArgument, NotFound, Unavailable
from flashd.units import format_bytes, format_seconds

_STOP_S = 60.0
_REFRESH_S = 0.5


PANEL = "Machine"


def register(app: typer.Typer) -> None:
    for command in (start, stop, status, jobs, cancel, watch, top, config):
        app.command(rich_help_panel=PANEL)(command)


def start(context: typer.Context) -> None:
    """Starts the daemon for you, in the background: on the session bus, or on one of its own where there is none."""
    asked = session(context).bus or configuration.bus_address()
    with suppress(FlashdError), flashd.connect(asked) as client:
        output.say(f"flashd runs already: {_summary(client)}")
        return
    started = starting.start(asked)
    with started.client as client:
        output.say(f"flashd runs: {_summary(client)}")
        folders = " or ".join(client.status().models_directories)
        output.say(f"drop a model into {folders}; its log is {started.log}")


def stop(context: typer.Context) -> None:
    """Ends the daemon and its engines."""
    with flashd.connect(session(context).bus) as client:
        client.stop()
        deadline = time.monotonic() + _STOP_S
        while time.monotonic() < deadline:
            try:
                client.status()
            except FlashdError:
                return
            time.sleep(0.05)
    raise Unavailable(f"flashd still runs after {_STOP_S:.0f} s", hint="its log says what it waits for")


def status(context: typer.Context, as_json: Json = False) -> None:
    """What is active, and what memory and store hold."""
    client = session(context).client
    found, engines, devices = client.status(), client.engines(), client.devices()
    if as_json:
        output.print_json([found, *devices, *engines])
        return
    rows = [["version", found.version], ["active", found.active_model or "none: flash swap MODEL"]]
    if found.active_model:
        rows.append(["endpoint", found.endpoint])
    for device in devices:
        used = f"{format_bytes(device.used_bytes)} of {format_bytes(device.budget_bytes)}"
        rows.append([device.name, f"{used}, {format_bytes(device.leased_bytes)} of it leased or pinned"])
    quota = f", quota {format_bytes(found.store_quota_bytes)}" if found.store_quota_bytes else ""
    free = format_bytes(found.store_free_bytes)
    rows.append(["store", f"{format_bytes(found.store_bytes)} in {found.store_path}, {free} free{quota}"])
    rows.append(["inbox", ", ".join(found.models_directories) or "none"])
    rows += [[f"engine {engine.pid}", f"{engine.state}, {engine.model}, {_memory_of(engine)}"] for engine in engines]
    output.print_table(["", ""], rows)


def jobs(context: typer.Context, as_json: Json = False) -> None:
    """What is under way, and what was done in the last minutes."""
    found = session(context).client.jobs()
    if as_json:
        output.print_json(found)
        return
    rows = [[str(job.number), job.kind, job.subject, _state(job), _progress(job), job.error_message] for job in found]
    if rows:
        output.print_table(["job", "kind", "of", "state", "progress", "error"], rows)
    else:
        output.say("no jobs")


def cancel(
    context: typer.Context, job: Annotated[int, typer.Argument(help="Its number, as flash jobs shows it.")]
) -> None:
    """Cancels a job; what it did so far is undone."""
    session(context).client.job(job).cancel()


def watch(context: typer.Context, as_json: Json = False) -> None:
    """Every change as it happens, until Ctrl-C."""
    for event in session(context).client.watch():
        if as_json:
            import json

            print(json.dumps({"kind": event.kind, "path": event.path, "interface": event.interface,
                              "properties": event.properties}, ensure_ascii=False), flush=True)  # fmt: skip
        else:
            print(_line(event), flush=True)


def top(
    context: typer.Context,
    once: Annotated[bool, typer.Option(help="Show it once, and end.")] = False,
) -> None:
    """Memory and engines, live, until Ctrl-C."""
    client = session(context).client
    if once:
        output.console().print(_overview(client))
        return
    with suppress(KeyboardInterrupt), Live(_overview(client), console=output.console(), auto_refresh=False) as live:
        while True:
            time.sleep(_REFRESH_S)
            live.update(_overview(client), refresh=True)


def config(
    context: typer.Context,
    key: Annotated[str | None, typer.Argument(help="For example memory.host_budget, or models.NAME.engine.")] = None,
    value: Annotated[str | None, typer.Argument(help="For example 64GB.")] = None,
    explain: Annotated[bool, typer.Option(help="All settings, what they mean, and their defaults.")] = False,
    as_json: Json = False,
) -> None:
    """Shows the settings in force, one of them, or changes one."""
    if explain or as_json:
        settings = [s for s in configuration.settings() if key is None or s.key.startswith(key)]
        if as_json:
            output.print_json(settings)
        else:
            output.print_table(
                ["setting", "default", "meaning"], [[s.key, _written(s.default), s.doc] for s in settings]
            )
        return
    if key is None:
        print(session(context).client.config(), end="")
    elif value is None:
        print(_value(session(context), key))
    else:
        restart_needed = session(context).client.set_config(key, value)
        output.say(f"{key} = {value}" + ("; in force when flashd is started again" if restart_needed else ""))


def _value(current: Session, key: str) -> str:
    import tomllib

    return _written(configuration.value_in(tomllib.loads(current.client.config()), key))


def _written(value: object) -> str:
    """As it may be said to `flash config` again."""
    return json.dumps(value) if isinstance(value, bool | list) else str(value)


def _summary(client: Client) -> str:
    found = client.status()
    return f"version {found.version}, {len(client.models())} models, {found.active_model or 'none'} active"


def _state(job: Job) -> str:
    return f"{job.state}: {job.phase}" if job.phase else job.state


def _progress(job: Job) -> str:
    if job.finished:
        return format_seconds(job.finished_at - job.created_at)
    return f"{100 * job.done_bytes // job.total_bytes} %" if job.total_bytes else ""


def _line(event: Event) -> str:
    subject = event.path.removeprefix("/org/flashd1").lstrip("/") or "manager"
    values = " ".join(f"{name}={value}" for name, value in event.properties.items())
    return f"{time.strftime('%H:%M:%S')} {event.kind} {subject} {values}".rstrip()


def _memory_of(engine: Engine) -> str:
    of_gpus = f", {format_bytes(engine.device_bytes)} of GPUs" if engine.device_bytes else ""
    return f"own memory {format_bytes(engine.memory_bytes)}{of_gpus}"


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
    running = [f"{job.kind} {job.subject}: {_state(job)} {_progress(job)}" for job in jobs_now if not job.finished]
    head = f"[bold]{found.active_model or 'no model'}[/] active; {len(models)} models"
    return Group(head, "", pools, "", processes, "", warm, "", *running)
