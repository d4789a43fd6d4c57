# SPDX-License-Identifier: Apache-2.0
"""Commands for the daemon, its memory, its jobs and its settings."""

from __future__ import annotations

import json
import time
from typing import Annotated

from flashd import toml
from flashd.cli import output
from flashd.cli.parameters import Argument, Context, Option
from flashd.cli.session import Json, session
from flashd.client import launch
from flashd.client.client import Client, Job, connect
from flashd.client.results import Engine, Event, Status, strays_of
from flashd.config import loading
from flashd.config.environment import given_bus_address
from flashd.errors import FlashdError
from flashd.legible import legible
from flashd.units import format_bytes, format_seconds


def start(context: Context) -> None:
    """Starts your daemon in the background, on the session bus, or on a private bus if there is none, and its gateway,
    which answers HTTP.
    """
    asked = session(context).bus or given_bus_address()
    try:
        client = connect(asked)
    except FlashdError:
        started = launch.start(asked)
        with started.client as client:
            output.say(f"flashd is running: {_summary(client)}")
            status = client.status()
            folders = " or ".join(status.models_directories)
            output.say(f"drop a model into {folders}; the log is {started.log}")
            if status.default_engine_reason.partition(": ")[2]:  # a command that would install a better one
                output.say(status.default_engine_reason)
            _start_gateway(client)
    else:
        with client:
            output.say(f"flashd is already running: {_summary(client)}")
            _start_gateway(client)


def stop(context: Context) -> None:
    """Stops the daemon, its engines and its gateway."""
    with connect(session(context).bus) as client:
        launch.stop(client, output.say)
    output.say("flashd has stopped")


def restart(context: Context) -> None:
    """Restarts the daemon with the current settings. Models stay in memory, and engines go on answering.

    The gateway is restarted too if its version or its addresses have changed, or if it was refused an address; then its
    streams are cut after 10 s.
    """
    asked = session(context).bus
    with connect(asked) as client:
        again = launch.restart(client, asked)
    with again as client:
        output.say(f"flashd is running: {_summary(client)}")
        _start_gateway(client, retries_refused=True)


def _start_gateway(client: Client, *, retries_refused: bool = False) -> None:
    """Starts the gateway of a user's daemon. A failure, such as a port that is taken, is only a warning, because the
    daemon is of use without a gateway.
    """
    try:
        gateway = launch.start_gateway(client, output.say, retries_refused=retries_refused)
    except FlashdError as error:
        _warn_of_address(error.message, error.hint)
        return
    for refused in gateway.refused:
        _warn_of_address(f"not served: {refused.why}", f"{refused.remedy}; then: flash restart")
    if gateway.addresses:
        output.say("programs use it at " + _urls(gateway))
        if loading.value_in(toml.parse(client.config()), "gateway.page"):
            output.say(f"a browser shows it: http://{gateway.addresses[0]}/")


def _warn_of_address(why: str, remedy: str) -> None:
    said = "requests to this address are answered by another program" if "in use" in why else ""
    hints = "".join(f"\n{hint}" for hint in (said, remedy) if hint)
    output.say(why + hints, label="warning:", style="yellow")


def _urls(gateway: launch.Gateway) -> str:
    return " or ".join(f"http://{address}/v1" for address in gateway.addresses)


def status(context: Context, as_json: Json = False) -> None:
    """Shows the active model, and the use of memory and store."""
    client = session(context).client
    found, engines, devices = client.status(), client.engines(), client.devices()
    if as_json:
        output.print_json([found, *devices, *engines])
        return
    rows = [["version", found.version], ["active", _active(found) or "none: flash swap MODEL"]]
    if found.active_model or found.resting_model:
        rows.append(["endpoint", found.endpoint])
    if (gateway := launch.gateway(client)) is not None:
        rows.append(["programs", _urls(gateway) or "no gateway runs: flash start"])
        rows += [["not served", f"{refused.why}; {refused.remedy}"] for refused in gateway.refused]
    serving = [engine for engine in engines if engine.state == "serving" and engine.model != found.active_model]
    rows += [["beside", f"{engine.model}, at {engine.endpoint}"] for engine in serving]
    for device in devices:
        used = f"{format_bytes(device.used_bytes)} of {format_bytes(device.budget_bytes)}"
        rows.append([device.name, f"{used}, {format_bytes(device.leased_bytes)} of it leased or pinned"])
    if found.default_engine:  # else the daemon is older
        rows.append(["engines", f"{found.default_engine}: {found.default_engine_reason}"])
    quota = f", quota {format_bytes(found.store_quota_bytes)}" if found.store_quota_bytes else ""
    free = format_bytes(found.store_free_bytes)
    rows.append(["store", f"{format_bytes(found.store_bytes)} in {found.store_path}, {free} free{quota}"])
    rows.append(["inbox", ", ".join(found.models_directories) or "none"])
    if strays := strays_of(found):
        rows.append(["ignored", strays])
    rows += [["problem", f"{problem.what}; {problem.remedy}"] for problem in found.problems]
    rows += [[f"engine {engine.pid}", f"{engine.state}, {engine.model}, {_memory_of(engine)}"] for engine in engines]
    output.print_table(["", ""], rows)


def jobs(context: Context, as_json: Json = False) -> None:
    """Shows running jobs, and those of the last minutes."""
    found = session(context).client.jobs()
    if as_json:
        output.print_json(found)
        return
    rows = [[str(job.number), job.kind, job.subject, state(job), progress(job), job.error_message] for job in found]
    if rows:
        output.print_table(["job", "kind", "of", "state", "progress", "error"], rows)
    else:
        output.say("no jobs")


def cancel(context: Context, job: Annotated[int, Argument(help="Number of the job from flash jobs.")]) -> None:
    """Cancels a job and undoes its work so far."""
    session(context).client.job(job).cancel()


def watch(context: Context, as_json: Json = False) -> None:
    """Prints every change as it happens, until Ctrl-C."""
    for event in session(context).client.watch():
        if as_json:
            told = {"kind": event.kind, "path": event.path, "interface": event.interface}
            print(output.as_json({**told, "properties": event.properties}, indent=None), flush=True)
        else:
            print(legible(_line(event)), flush=True)


def config(
    context: Context,
    key: Annotated[str | None, Argument(help="For example memory.host_budget, or models.NAME.engine.")] = None,
    value: Annotated[str | None, Argument(help="For example 64GB.")] = None,
    explain: Annotated[bool, Option(help="Explain all settings, with their defaults.")] = False,
    as_json: Json = False,
) -> None:
    """Shows all settings in force, or one with what a restart would make of it, or changes one."""
    if explain or as_json:
        settings = [s for s in loading.settings() if key is None or s.key.startswith(key)]
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
        _show_value(session(context).client, key)
    else:
        restart_needed = session(context).client.set_config(key, value)
        output.say(f"{key} = {value}" + ("; takes effect after flash restart" if restart_needed else ", in force now"))


def _show_value(client: Client, key: str) -> None:
    """Prints the value in force, and says if a restart would put another one in force."""
    value = _value(client.config(), key)
    print(value)
    try:
        later = _value(client.next_config(), key)
    except FlashdError as error:
        output.say(f"whether a restart changes {key} is not known: {error}")
        return
    if later != value:
        output.say(f"{key} = {later} takes effect after flash restart")


def _value(document: str, key: str) -> str:
    import tomllib

    return _written(loading.value_in(tomllib.loads(document), key))


def _written(value: object) -> str:
    """Formats a value as `flash config` accepts it."""
    return json.dumps(value) if isinstance(value, bool | list) else str(value)


def _summary(client: Client) -> str:
    found = client.status()
    active = f"{found.resting_model} rests" if found.resting_model else f"{found.active_model or 'none'} active"
    return f"version {found.version}, {len(client.models())} models, {active}"


def _active(found: Status) -> str:
    """Names the active model, or the one that is parked because it was idle."""
    return f"{found.resting_model} rests: the next request wakes it" if found.resting_model else found.active_model


def state(job: Job) -> str:
    """`running: loading`, `done`."""
    return f"{job.state}: {job.phase}" if job.phase else job.state


def progress(job: Job) -> str:
    """Formats the progress of a running job, such as `12 %`, if it is known; of a finished job, the time it took."""
    if job.finished:
        return format_seconds(job.finished_at - job.created_at)
    return f"{100 * job.done_bytes // job.total_bytes} %" if job.total_bytes else ""


def _line(event: Event) -> str:
    subject = event.path.removeprefix("/org/flashd1").lstrip("/") or "manager"
    values = " ".join(f"{name}={value}" for name, value in event.properties.items())
    return f"{time.strftime('%H:%M:%S')} {event.kind} {subject} {values}".rstrip()


def _memory_of(engine: Engine) -> str:
    of_gpus = f", {format_bytes(engine.device_bytes)} on GPUs" if engine.device_bytes else ""
    cache = f", KV cache {format_bytes(engine.kv_cache_bytes)}" if engine.kv_cache_bytes else ""
    return f"own memory {format_bytes(engine.memory_bytes)}{of_gpus}{cache}"
