# SPDX-License-Identifier: Apache-2.0
"""Commands that list, import, download, change and remove models."""

from __future__ import annotations

import sys
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from flashd.cli import output
from flashd.cli.parameters import Argument, Context, Option
from flashd.cli.session import Json, ModelName, session
from flashd.client.results import strays_of
from flashd.errors import Cancelled, InvalidArgument
from flashd.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from flashd.client.client import Client
    from flashd.client.results import Model, Status
    from flashd.hub import PullOutcome


def list_(context: Context, as_json: Json = False) -> None:
    """Lists models, the tiers that hold them, and sources that are not models yet."""
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
        if strays := strays_of(status):
            output.say(f"Ignored in there: {strays}")
    for item in status.inbox_items:
        detail = f": {item.detail}" if item.detail else ""
        colour = "red" if item.state == "failed" else "yellow"
        label = "not used" if item.state == "unused" else item.state
        output.say(f"{item.name}{detail}".replace("\n", "\n  "), label=label, style=colour)


def show(context: Context, model: ModelName, as_json: Json = False) -> None:
    """Shows everything about one model."""
    client = session(context).client
    found = client.model(model)
    if as_json:
        output.print_json(found)
        return
    rows = [
        ["name", found.name],
        ["aliases", ", ".join(found.aliases) or "none"],
        ["architecture", found.architecture or "unknown: it has no config.json"],
        ["size", f"{format_bytes(found.size_bytes)} in {found.tensor_count} tensors, mostly {found.dtype}"],
        *([["context", f"{found.context_length} tokens"]] if found.context_length else []),
        *([["adapters", ", ".join(found.adapters)]] if found.adapters else []),
        [
            "tier",
            found.residency
            + (f" ({', '.join(found.devices)})" if set(found.devices) - {found.residency} else "")
            + (", active" if found.active else "")
            + (", pinned" if found.pinned else ""),
        ],
        ["engine", _engine_of(found, client)],
        ["leases", str(found.leases)],
        ["made", output.ago(found.created_at)],
        ["used", f"{output.ago(found.last_used_at)}, {found.use_count} swaps"],
        ["source", found.source],
        ["owner", owner(found)],
        ["checkpoint", found.checkpoint],
    ]
    output.print_table(["", ""], rows)


def _engine_of(model: Model, client: Client) -> str:
    """The kind of engine for swaps that choose none, and why."""
    if model.format == "gguf":
        return "llama.cpp: it is a GGUF file"
    settings = tomllib.loads(client.config()).get("models", {})
    name = next((name for name in (model.name, *model.aliases) if name in settings), "")
    kind = settings[name]["engine"] if name else "default"
    if kind != "default":
        return f"{kind}: by the setting models.{name}.engine"
    status = client.status()
    return f"{status.default_engine}: {status.default_engine_reason}" if status.default_engine else "unknown"


def import_(
    context: Context,
    path: Annotated[Path, Argument(exists=True, help="A folder, or one file of weights.")],
    name: Annotated[str | None, Argument(help="Name of the model; by default, that of the folder.")] = None,
    alias: Annotated[list[str] | None, Option(help="Additional name; may be repeated.")] = None,
    no_replace: Annotated[bool, Option(help="Refuse a name that is already taken.")] = False,
    private: Annotated[
        bool | None,
        Option(
            "--private/--public",
            help="Whether other users can see it. By default, a new version is as visible as the old one.",
        ),
    ] = None,
) -> None:
    """Makes a model from files outside the models folder. You, not the daemon, need permission to read them."""
    from flashd.checkpoint.source.reader import has_name_of_all

    if not name and path.is_file() and has_name_of_all(path.name):
        hint = f"import its whole folder: flash import {path.resolve().parent}, or give the model a name"
        raise InvalidArgument(f"many models have a file named {path.name}", hint=hint)
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
    context: Context,
    repository: Annotated[
        str,
        Argument(metavar="OWNER/NAME", help="A model on the Hugging Face Hub; OWNER/NAME:Q6_K in GGUF."),
    ],
    revision: Annotated[str, Option(help="A branch, tag or commit.")] = "main",
    name: Annotated[str, Option(help="Name of the model; by default, its name on the hub.")] = "",
    as_json: Json = False,
) -> None:
    """Downloads a model from the Hugging Face Hub with your login (hf auth login), proxies and cache."""
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
        f"{format_bytes(outcome.converted_early_bytes)} converted before the last file arrived"
    )


def pulled(client: Client, repository: str, revision: str = "main", name: str = "") -> PullOutcome:
    """Pulls with a progress bar."""
    import logging

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # messages about each new attempt are of no interest
    try:
        with output.job_progress(f"pulling {name or repository}") as progress:
            return client.pull(repository, revision=revision, name=name, on_progress=progress)
    except KeyboardInterrupt:
        hint = "pull again to resume it"
        raise Cancelled(f"the pull of {repository} was cancelled", hint=hint) from None


def alias(
    context: Context,
    model: ModelName,
    aliases: Annotated[list[str] | None, Argument(help="All additional names; leave empty to remove them.")] = None,
) -> None:
    """Replaces a model's additional names."""
    session(context).client.set_aliases(model, aliases or [])


def pin(context: Context, model: ModelName) -> None:
    """Protects a model from eviction from memory, and its old versions in the store from deletion."""
    session(context).client.pin(model)


def unpin(context: Context, model: ModelName) -> None:
    """Reverses pin."""
    session(context).client.unpin(model)


def private(context: Context, model: ModelName) -> None:
    """Hides your model from other users except root. Its name stays taken."""
    session(context).client.set_private(model, True)


def public(context: Context, model: ModelName) -> None:
    """Reverses private."""
    session(context).client.set_private(model, False)


def rm(
    context: Context,
    models: Annotated[list[str], Argument(metavar="MODEL...", help="Names as flash list shows them.")],
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Removes models. Their sources in the models folder are kept."""
    client = session(context).client
    found = [client.model(name) for name in models]
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidArgument(
                "cannot ask for confirmation, because standard input is not a terminal", hint="use flash rm --yes"
            )
        listed = ", ".join(f"{model.name} ({format_bytes(model.size_bytes)})" for model in found)
        output.confirm(f"Remove {listed}?")
    for model in found:
        client.remove(model.name)
        output.say(f"removed {model.name}")


def verify(context: Context, model: ModelName) -> None:
    """Verifies a model's checkpoint against its digests."""
    client = session(context).client
    with output.job_progress(f"verifying {model}") as progress:
        client.verify(model, progress)
    output.say(f"{model} is intact")


def scrub(context: Context, as_json: Json = False) -> None:
    """Verifies the whole store against its digests."""
    with output.job_progress("scrubbing") as progress:
        result = session(context).client.scrub(progress)
    if as_json:
        output.print_json(dict(result))
    elif not result["corrupt"]:
        output.say(f"{result['checked']} checkpoints, {format_bytes(result['size_bytes'])}: all intact")
    for name in result["corrupt"]:
        output.say(name, label="corrupt", style="red")
    if result["corrupt"]:
        sys.exit(8)


def owner(model: Model) -> str:
    """Formats the owner, such as `erin`, or `1001, private` for a user without a name."""
    import pwd

    try:
        name = pwd.getpwuid(model.owner_uid).pw_name
    except KeyError:
        name = str(model.owner_uid)
    return name + (", private" if model.private else "")


def _mark(model: Model) -> str:
    return "*" if model.active else "+" if model.pinned else ""


def _folders(status: Status) -> str:
    return " or ".join(status.models_directories) or "the models folder (none is configured)"
