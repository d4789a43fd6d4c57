# SPDX-License-Identifier: Apache-2.0
"""`flash auth`: the token for the Hugging Face hub."""

from __future__ import annotations

import sys
from typing import Annotated

from flashd.cli import output
from flashd.cli.parameters import Option
from flashd.errors import InvalidArgument, NotAuthorized, Unavailable

_MAKES_ONE = "create one at https://huggingface.co/settings/tokens"


def auth(logout: Annotated[bool, Option("--logout", help="Forget the token.")] = False) -> None:
    """Saves your Hugging Face token, for private and gated models, where the hub's own tools keep it.

    The token is read from a prompt, or from standard input.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise Unavailable("huggingface_hub is not installed", hint="pip install huggingface_hub") from None
    if logout:
        huggingface_hub.logout()
        return
    # Never an argument, because every user of the machine can see the arguments of a process.
    token = output.ask_secret("Token") if sys.stdin.isatty() else sys.stdin.readline()
    if not token.strip():
        raise InvalidArgument("there is no token", hint=_MAKES_ONE)
    try:
        huggingface_hub.login(token.strip(), skip_if_logged_in=False)
    except Exception as error:  # noqa: BLE001 -- versions of the hub's library differ in the HTTP library whose errors they raise
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if isinstance(error, ValueError) or status in {401, 403}:
            raise NotAuthorized("the hub does not accept this token", hint=_MAKES_ONE) from None
        hint = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        raise Unavailable(f"the hub cannot be reached: {error}", hint=hint) from None
    output.say("the hub accepted the token; it is saved for flash pull and the hub's own tools")
