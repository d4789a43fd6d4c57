# SPDX-License-Identifier: Apache-2.0
"""`flash token`: the tokens by which programs on other machines use the gateway."""

from __future__ import annotations

import os
import time
from typing import Annotated

from flashd.cli import output
from flashd.cli.parameters import Argument, Group, Option
from flashd.cli.session import Json
from flashd.config.paths import Scope, default_paths
from flashd.gateway.tokens import TokenFile, default_file

app = Group(help="Make or revoke tokens, by which programs on other machines use models through flashd-gateway.")

Name = Annotated[str, Argument(help="Name of the token, such as that of a machine or a person.")]
Models = Annotated[list[str] | None, Argument(help="Models that it may use. Default: all that are not private.")]

Changes = Annotated[bool, Option(help="It may also change them: at the page, and by Ollama's interface.")]


@app.command("new")
def new(name: Name, models: Models = None, changes: Changes = False) -> None:
    """Makes a token and prints it. It is shown only now: flashd keeps a digest of it.

    As root, it is for the machine's gateway, unless a daemon of your own runs; else for your own.
    """
    print(_file().new(name, models or (), changes=changes))


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Lists the tokens and the models that they may use."""
    tokens = _file().all()
    if as_json:
        output.print_json(
            [
                {"name": t.name, "created_at": t.created_at, "models": list(t.models), "changes": t.changes}
                for t in tokens
            ]
        )
        return
    rows = [
        [
            token.name,
            time.strftime("%Y-%m-%d", time.localtime(token.created_at)),
            ", ".join(token.models) or "all",
            "yes" if token.changes else "",
        ]
        for token in tokens
    ]
    if rows:
        output.print_table(["token", "made", "models", "changes"], rows)
    else:
        output.say("no tokens")


@app.command("revoke")
def revoke(name: Name) -> None:
    """Revokes a token; the next request with it is refused."""
    _file().revoke(name)


def _file() -> TokenFile:
    runtime = default_paths(Scope.USER).runtime
    has_own = (runtime / "bus").exists() or (runtime / "gateway.sock").exists()
    return TokenFile(default_file(Scope.SYSTEM if os.geteuid() == 0 and not has_own else Scope.USER))
