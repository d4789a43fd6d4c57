# SPDX-License-Identifier: Apache-2.0
"""Commands under the names that people bring along from flashtensors, and what it calls authentication."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from flashd.cli import models, output
from flashd.errors import InvalidArgument, NotAuthorized, Unavailable

PANEL = "Models"
_MAKES_ONE = "https://huggingface.co/settings/tokens makes one"


def register(app: typer.Typer) -> None:
    app.command("models", hidden=True)(models.list_)
    app.command("remove", hidden=True)(models.rm)
    app.command(rich_help_panel=PANEL)(auth)


def auth(logout: Annotated[bool, typer.Option("--logout", help="Forget the token.")] = False) -> None:
    """Keeps your token of the Hugging Face hub, for models that are private or gated, where its own tools keep it.

    The token is asked for, or read from standard input.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise Unavailable("huggingface_hub is not installed", hint="pip install huggingface_hub") from None
    if logout:
        huggingface_hub.logout()
        return
    # Never an argument: every user of a machine sees those.
    token = typer.prompt("Token", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
    if not token.strip():
        raise InvalidArgument("there is no token", hint=_MAKES_ONE)
    try:
        huggingface_hub.login(token.strip(), skip_if_logged_in=False)
    except Exception as error:  # noqa: BLE001 -- each version of the hub's library speaks HTTP through another one
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if isinstance(error, ValueError) or status in {401, 403}:
            raise NotAuthorized("the hub does not accept this token", hint=_MAKES_ONE) from None
        hint = "is there a network? HF_ENDPOINT and HF_HUB_OFFLINE count here too"
        raise Unavailable(f"the hub cannot be asked: {error}", hint=hint) from None
    output.say("the hub knows you; the token is kept for flash pull and the hub's own tools")
