# SPDX-License-Identifier: Apache-2.0
"""The commands of `flash` and their modules. Only the module of the requested command is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from flashd.cli.parameters import Group

ANSWERS, MODELS, MACHINE = "Answers", "Models", "Machine"  # panels of the help


@dataclass(frozen=True, slots=True)
class Home:
    """A function or `Group` in a module of this folder, and the panel of the help that shows it.

    Aliases of commands have no panel.
    """

    module: str
    name: str
    panel: str = ""


# In the order of the help.
HOMES = {
    "run": Home("serving", "run", ANSWERS),
    "swap": Home("serving", "swap", ANSWERS),
    "serve": Home("serving", "serve", ANSWERS),
    "park": Home("serving", "park", ANSWERS),
    "load": Home("serving", "load", ANSWERS),
    "evict": Home("serving", "evict", ANSWERS),
    "list": Home("models", "list_", MODELS),
    "ls": Home("models", "list_"),
    "import": Home("models", "import_", MODELS),
    "pull": Home("models", "pull", MODELS),
    "show": Home("models", "show", MODELS),
    "convert": Home("convert", "convert", MODELS),
    "alias": Home("models", "alias", MODELS),
    "pin": Home("models", "pin", MODELS),
    "unpin": Home("models", "unpin", MODELS),
    "private": Home("models", "private", MODELS),
    "public": Home("models", "public", MODELS),
    "rm": Home("models", "rm", MODELS),
    "verify": Home("models", "verify", MODELS),
    "scrub": Home("models", "scrub", MODELS),
    "models": Home("models", "list_"),  # flashtensors' names for them
    "remove": Home("models", "rm"),
    "auth": Home("auth", "auth", MODELS),
    "start": Home("machine", "start", MACHINE),
    "stop": Home("machine", "stop", MACHINE),
    "restart": Home("machine", "restart", MACHINE),
    "status": Home("machine", "status", MACHINE),
    "jobs": Home("machine", "jobs", MACHINE),
    "cancel": Home("machine", "cancel", MACHINE),
    "watch": Home("machine", "watch", MACHINE),
    "top": Home("top", "top", MACHINE),
    "config": Home("machine", "config", MACHINE),
    "doctor": Home("doctor", "doctor", MACHINE),
    "report": Home("report", "report", MACHINE),
    "engine": Home("engines", "app", MACHINE),
    "token": Home("token", "app", MACHINE),
    "bench": Home("bench", "app", MACHINE),
}


def found(name: str) -> Callable[..., None] | Group:
    """The command of this name."""
    home = HOMES[name]
    command: Callable[..., None] | Group = getattr(import_module(f"flashd.cli.{home.module}"), home.name)
    return command
