# SPDX-License-Identifier: Apache-2.0
"""`flash engine`: management of the Python environments in which engines run."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from flashd.cli import output
from flashd.cli.parameters import Argument, Context, Group, Option
from flashd.cli.session import Json, session
from flashd.client.client import Client
from flashd.client.results import Environment
from flashd.errors import NotFound
from flashd.units import format_bytes

app = Group(help="Install PyTorch, vLLM or llama.cpp for engines, or go back to an earlier installation.")


class Kind(StrEnum):
    """Kinds of engine."""

    TORCH = "torch"
    VLLM = "vllm"
    LLAMA = "llama.cpp"


KindArgument = Annotated[Kind, Argument(help="Kind of engine.")]


@app.command("install")
def install(
    context: Context,
    kind: KindArgument,
    wheels: Annotated[
        Path | None,
        Option(exists=True, file_okay=False, help="Use the wheels, or the sources, in this folder, and no network."),
    ] = None,
    index: Annotated[str, Option(help="Package index to use instead of pip's, such as PyTorch's own.")] = "",
) -> None:
    """Installs an engine's framework in a new environment, checks it, and uses it for new engines.

    llama.cpp is built from its sources, which takes some minutes, cmake and a C++ compiler.
    """
    # Here, because the imports cost 50 ms that other commands do not need.
    from flashd.cli import llama_source
    from flashd.cli.wheels import Supply, download

    client = session(context).client
    has_gpu = any(device.kind in {"cuda", "unified"} for device in client.devices())
    # The wheels take gigabytes, and /tmp may be in memory.
    with tempfile.TemporaryDirectory(prefix="flash-engine-", dir="/var/tmp") as folder:
        supply = Supply(wheels, index)
        if kind is Kind.LLAMA:
            found = [llama_source.wheel(Path(folder), supply)]
        else:
            found = download(kind, Path(folder), supply, has_gpu=has_gpu)
        result = output.wait(lambda: client.begin_install(kind, found), f"{kind}")
    output.say(f"{kind} {result['version']} is environment {result['environment']}: {_where(client, kind)}")


@app.command("list")
def list_(context: Context, as_json: Json = False) -> None:
    """Lists the installed environments. A star marks those that new engines use."""
    found = session(context).client.environments()
    if as_json:
        output.print_json(found)
        return
    rows = [
        [
            "*" if e.current else "", e.kind, str(e.number), e.version, format_bytes(e.size_bytes),
            output.ago(e.created_at), "" if e.fits else "made for another Python: install it again",
        ]
        for e in found
    ]  # fmt: skip
    if rows:
        output.print_table(["", "engine", "number", "version", "size", "made", ""], rows)
    else:
        output.say("No environments are installed. Install one: flash engine install torch, vllm or llama.cpp")


@app.command("use")
def use(
    context: Context,
    kind: KindArgument,
    number: Annotated[
        int | None, Argument(min=0, help="Number from flash engine list; 0 for flashd's own Python.")
    ] = None,
) -> None:
    """Selects the environment for new engines; without a number, the previous one."""
    client = session(context).client
    wanted = _before(client, kind) if number is None else number
    client.use_environment(kind, wanted)
    output.say(f"{kind} {wanted or 'of flashd itself'}: {_where(client, kind)}")


@app.command("remove")
def remove(
    context: Context,
    kind: KindArgument,
    number: Annotated[int, Argument(min=1, help="Number from flash engine list.")],
) -> None:
    """Deletes an environment that no engine uses."""
    session(context).client.remove_environment(kind, number)


def _before(client: Client, kind: Kind) -> int:
    """Returns the number of the newest environment that is older than the current one."""
    of_kind: list[Environment] = [e for e in client.environments() if e.kind == kind]
    current = next((e.number for e in of_kind if e.current), 0)
    older = [e.number for e in of_kind if e.number < current and e.fits]
    if not older:
        raise NotFound(
            f"there is no earlier environment of {kind}", hint="flash engine list shows the installed environments"
        )
    return max(older)


def _where(client: Client, kind: Kind) -> str:
    """Says whether new engines use the environment, which a setting may override."""
    import tomllib

    section, key = ("llama", "server") if kind is Kind.LLAMA else (kind, "python")
    if configured := tomllib.loads(client.config())["engines"][section][key]:
        setting = f"engines.{section}.{key}"
        return f'{setting} = {configured} overrides it; reset it: flash config {setting} ""'
    return "new engines use it"
