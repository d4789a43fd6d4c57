# SPDX-License-Identifier: Apache-2.0
"""`flash engine`: the Python environments that engines run in."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flashd.cli import output
from flashd.cli.session import Json, session
from flashd.client import Client, Environment
from flashd.errors import NotFound
from flashd.units import format_bytes


class Kind(StrEnum):
    """Those that there are."""

    TORCH = "torch"
    VLLM = "vllm"


KindArgument = Annotated[Kind, typer.Argument(help="Kind of engine.")]


def register(app: typer.Typer) -> None:
    engines = typer.Typer(help="What engines run in: install PyTorch or vLLM, and go back.", no_args_is_help=True)
    engines.command("install")(install)
    engines.command("list")(list_)
    engines.command("use")(use)
    engines.command("remove")(remove)
    app.add_typer(engines, name="engine", rich_help_panel="Machine")


def install(
    context: typer.Context,
    kind: KindArgument,
    wheels: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Take wheels from this folder, and no network.")
    ] = None,
    index: Annotated[str, typer.Option(help="A package index other than pip's, such as PyTorch's own.")] = "",
) -> None:
    """Makes an environment with an engine's framework, checks it, and has new engines run in it."""
    from flashd.cli.wheels import Supply, download  # which 50 ms of other commands need not pay for

    client = session(context).client
    has_gpu = any(device.kind in {"cuda", "unified"} for device in client.devices())
    # Gigabytes: what is in /tmp may be in memory.
    with tempfile.TemporaryDirectory(prefix="flash-engine-", dir="/var/tmp") as folder:
        found = download(kind, Path(folder), Supply(wheels, index), has_gpu=has_gpu)
        result = output.wait(lambda: client.begin_install(kind, found), f"{kind}")
    output.say(f"{kind} {result['version']} is environment {result['environment']}: {_where(client, kind)}")


def list_(context: typer.Context, as_json: Json = False) -> None:
    """The environments that were installed; a star marks what new engines run in."""
    found = session(context).client.environments()
    if as_json:
        output.print_json(found)
        return
    rows = [
        [
            "*" if e.current else "", e.kind, str(e.number), e.version, format_bytes(e.size_bytes),
            output.ago(e.created_at), "" if e.fits else "for another Python: install it again",
        ]
        for e in found
    ]  # fmt: skip
    if rows:
        output.print_table(["", "engine", "number", "version", "size", "made", ""], rows)
    else:
        output.say("None was installed: flash engine install torch, or vllm")


def use(
    context: typer.Context,
    kind: KindArgument,
    number: Annotated[
        int | None, typer.Argument(min=0, help="As flash engine list shows it; 0 for flashd's own Python.")
    ] = None,
) -> None:
    """Has new engines run in another environment; without a number, in the one before."""
    client = session(context).client
    wanted = _before(client, kind) if number is None else number
    client.use_environment(kind, wanted)
    output.say(f"{kind} {wanted or 'of flashd itself'}: {_where(client, kind)}")


def remove(
    context: typer.Context,
    kind: KindArgument,
    number: Annotated[int, typer.Argument(min=1, help="As flash engine list shows it.")],
) -> None:
    """Deletes an environment that no engine uses."""
    session(context).client.remove_environment(kind, number)


def _before(client: Client, kind: Kind) -> int:
    """The newest that is older than the current one."""
    of_kind: list[Environment] = [e for e in client.environments() if e.kind == kind]
    current = next((e.number for e in of_kind if e.current), 0)
    older = [e.number for e in of_kind if e.number < current and e.fits]
    if not older:
        raise NotFound(f"there is no environment of {kind} before", hint="flash engine list shows what there is")
    return max(older)


def _where(client: Client, kind: Kind) -> str:
    """What becomes of it, which a setting may have decided otherwise."""
    import tomllib

    configured = tomllib.loads(client.config())["engines"][kind]["python"]
    if configured:
        return f'engines.{kind}.python is {configured}, and counts: flash config engines.{kind}.python ""'
    return "new engines run in it"
