# SPDX-License-Identifier: Apache-2.0
"""How does what somebody calls a model become one of the daemon's: a folder, or a name as the hub has it?"""

from __future__ import annotations

from pathlib import Path

from flashd.client import Client, Model, OnProgress
from flashd.errors import NotFound


def known(client: Client, name: str) -> Model | None:
    """By exactly this name: what a person may abbreviate, a program may not."""
    return next((model for model in client.models() if name in (model.name, *model.aliases)), None)


def name_of(wanted: str) -> str:
    """What the daemon calls it: a name as on the hub stays as it is, a path gives its last part."""
    return Path(wanted).expanduser().resolve().name if wanted.startswith(("/", ".", "~")) else wanted


def obtain(client: Client, wanted: str, *, token: str | None = None, on_progress: OnProgress | None = None) -> Model:
    """Makes a model of a folder, or of what the Hugging Face cache or the hub has under a name; in place of an older
    one. Raises NotFound, and whatever an import raises."""
    name = name_of(wanted)
    folder = Path(wanted).expanduser()
    if folder.exists():
        return client.import_(folder, name, on_progress=on_progress)
    if name != wanted:
        raise NotFound(f"there is no {folder}", hint="name a folder, or a model as the hub does")
    client.pull(wanted, token=token, on_progress=on_progress)
    return client.model(wanted)
