# SPDX-License-Identifier: Apache-2.0
"""Commands about models: which there are, and how they come and go."""

from __future__ import annotations

import logging
import os
import pwd
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from flashd.checkpoint.convert import convert as convert_source
from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.source import SourceFiles
from flashd.cli import output
from flashd.cli.session import Json, ModelName, session
from flashd.client import Client, Model, Status
from flashd.errors import AlreadyExists, Cancelled, InvalidArgument
from flashd.hub import PullOutcome
from flashd.units import format_bytes, format_seconds

PANEL = "Models"


def register(app: typer.Typer) -> None:
    app.command("list", rich_help_panel=PANEL)(list_)
    app.command("ls", hidden=True)(list_)
    app.command("import", rich_help_panel=PANEL)(import_)
    for command in (pull, show, convert, alias, pin, unpin, private, public, rm, verify, scrub):
        app.command(rich_help_panel=PANEL)(command)


def list_(context: typer.Context, as_json: Json = False) -> None:
    """Models, where their bytes are now, and what is still on its way."""
    client = session(context).client
    models, status = client.models(), client.status()
    if as_json:
        output.print_json(models)
        return
    rows = [
        [_mark(model), model.name, format_bytes(model.size_bytes), model.residency, model.dtype, model.architecture,
         output.ago(model.last_used_at), " ".join(model.aliases)]
        for model in models
    ]  # fmt: skip
    if rows:
        output.print_table(["", "model", "size", "tier", "dtype", "architecture", "used", "aliases"], rows)
    elif not status.inbox_items:
        output.say(f"No models yet. Drop one into {_folders(status)}, or: flash import PATH NAME")
    for item in status.inbox_items:
        detail = f": {item.detail}" if item.detail else ""
        colour = "red" if item.state == "failed" else "yellow"
        output.say(f"[{colour}]{item.state}[/] {item.name}{detail}".replace("\n", "\n  "))


def show(context: typer.Context, model: ModelName, as_json: Json = False) -> None:
    """Everything about one model."""
    found = session(context).client.model(model)
    if as_json:
        output.print_json(found)
        return
    rows = [
        ["name", found.name],
        ["aliases", ", ".join(found.aliases) or "none"],
        ["architecture", found.architecture or "unknown: it has no config.json"],
        ["size", f"{format_bytes(found.size_bytes)} in {found.tensor_count} tensors, mostly {found.dtype}"],
        [
            "tier",
            found.residency
            + (f" ({', '.join(found.devices)})" if set(found.devices) - {found.residency} else "")
            + (", active" if found.active else "")
            + (", pinned" if found.pinned else ""),
        ],
        ["leases", str(found.leases)],
        ["made", output.ago(found.created_at)],
        ["used", f"{output.ago(found.last_used_at)}, {found.use_count} swaps"],
        ["source", found.source],
        ["owner", owner(found)],
        ["checkpoint", found.checkpoint],
    ]
    output.print_table(["", ""], rows)


def import_(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(exists=True, help="A folder, or one file of weights.")],
    name: Annotated[str | None, typer.Argument(help="What to call it; by default, what the folder is called.")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="A further name; may be repeated.")] = None,
    no_replace: Annotated[bool, typer.Option(help="Refuse a name that is taken.")] = False,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Whether others see it. A new version is as the old one.")
    ] = None,
) -> None:
    """Makes a model of files anywhere, without the models folder. They are opened by you, not by the daemon."""
    wanted = name or (path.resolve().name if path.is_dir() else path.stem)
    client = session(context).client
    started = time.monotonic()
    output.wait(
        lambda: client.begin_import(path, wanted, aliases=alias or [], replace=not no_replace, private=private),
        f"converting {wanted}",
    )
    model = client.model(wanted)
    took = format_seconds(time.monotonic() - started)
    output.say(f"{model.name}: {format_bytes(model.size_bytes)} in {took}")


def pull(
    context: typer.Context,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A model on the Hugging Face Hub.")],
    revision: Annotated[str, typer.Option(help="A branch, tag or commit.")] = "main",
    name: Annotated[str, typer.Option(help="What to call it; by default, what it is called there.")] = "",
    as_json: Json = False,
) -> None:
    """Downloads a model from the Hugging Face Hub, as you: with your login (hf auth login), proxies and cache."""
    outcome = pulled(session(context).client, repository, revision, name)
    if as_json:
        output.print_json(outcome)
        return
    at = f"{outcome.repository}@{outcome.commit[:12]}"
    if outcome.was_there:
        output.say(f"{outcome.model} is {at} already")
        return
    took = format_seconds(outcome.seconds)
    output.say(
        f"{outcome.model} is {at}: {format_bytes(outcome.downloaded_bytes)} downloaded in {took}, "
        f"{format_bytes(outcome.converted_early_bytes)} converted by when the last file came"
    )


def pulled(client: Client, repository: str, revision: str = "main", name: str = "") -> PullOutcome:
    """Pulls with a progress bar."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of what it tries again, only the end is of interest
    try:
        with output.job_progress(f"pulling {name or repository}") as progress:
            return client.pull(repository, revision=revision, name=name, on_progress=progress)
    except KeyboardInterrupt:
        hint = "pull again: it goes on where it stopped"
        raise Cancelled(f"the pull of {repository} was cancelled", hint=hint) from None


def convert(
    source: Annotated[Path, typer.Argument(exists=True, help="A folder, or one file of weights.")],
    destination: Annotated[Path, typer.Argument(help="The folder to make.")],
    python: Annotated[str, typer.Option(help="An interpreter with torch, for PyTorch files.")] = sys.executable,
    base: Annotated[Path | None, typer.Option(help="A converted folder, to merge a LoRA adapter into.")] = None,
) -> None:
    """Converts a source to a checkpoint folder, without a daemon. Other tools can open the result."""
    if destination.exists():
        raise AlreadyExists(f"{destination} exists", hint="name a folder that does not")
    if not destination.parent.is_dir():
        raise InvalidArgument(f"{destination.parent} is not a folder", hint="make it first")
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    partial.mkdir()
    started = time.monotonic()
    try:
        with (
            SourceFiles.from_path(source.resolve()) as files,
            output.bytes_progress(f"converting {source.name}") as show,
        ):
            found = Checkpoint.open(base) if base else None
            manifest = convert_source(files, partial, python=python, base=found, note=str(source), on_progress=show)
        partial.rename(destination)
    finally:
        if partial.exists():
            for leftover in partial.iterdir():
                leftover.unlink()
            partial.rmdir()
    took = format_seconds(time.monotonic() - started)
    output.say(f"{destination}: {format_bytes(manifest.data_bytes)} in {manifest.tensor_count} tensors, {took}")


def alias(
    context: typer.Context,
    model: ModelName,
    aliases: Annotated[list[str] | None, typer.Argument(help="All further names; none takes them away.")] = None,
) -> None:
    """Gives a model further names."""
    session(context).client.set_aliases(model, aliases or [])


def pin(context: typer.Context, model: ModelName) -> None:
    """Never evict a model from memory, nor old versions of it from the store."""
    session(context).client.pin(model)


def unpin(context: typer.Context, model: ModelName) -> None:
    """The reverse of pin."""
    session(context).client.unpin(model)


def private(context: typer.Context, model: ModelName) -> None:
    """Makes a model of yours one that nobody else sees, but root. Its name stays taken."""
    session(context).client.set_private(model, True)


def public(context: typer.Context, model: ModelName) -> None:
    """The reverse of private."""
    session(context).client.set_private(model, False)


def rm(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Names as flash list shows them.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Removes models. Their sources in the models folder stay where they are."""
    client = session(context).client
    found = [client.model(name) for name in models]
    if not yes and sys.stdin.isatty():
        listed = ", ".join(f"{model.name} ({format_bytes(model.size_bytes)})" for model in found)
        typer.confirm(f"Remove {listed}?", abort=True)
    for model in found:
        client.remove(model.name)
        output.say(f"removed {model.name}")


def verify(context: typer.Context, model: ModelName) -> None:
    """Compares a model's checkpoint with its digests."""
    client = session(context).client
    with output.job_progress(f"verifying {model}") as progress:
        client.verify(model, progress)
    output.say(f"{model} is intact")


def scrub(context: typer.Context, as_json: Json = False) -> None:
    """Compares the whole store with its digests."""
    with output.job_progress("scrubbing") as progress:
        result = session(context).client.scrub(progress)
    if as_json:
        output.print_json(dict(result))
    elif not result["corrupt"]:
        output.say(f"{result['checked']} checkpoints, {format_bytes(result['size_bytes'])}: all intact")
    for name in result["corrupt"]:
        output.say(f"[red]corrupt[/] {name}")
    if result["corrupt"]:
        raise typer.Exit(8)


def owner(model: Model) -> str:
    """`erin`, or `1001, private` for a user without a name."""
    try:
        name = pwd.getpwuid(model.owner_uid).pw_name
    except KeyError:
        name = str(model.owner_uid)
    return name + (", private" if model.private else "")


def _mark(model: Model) -> str:
    return "*" if model.active else "+" if model.pinned else ""


def _folders(status: Status) -> str:
    return " or ".join(status.models_directories) or "the models folder (none is configured)"
