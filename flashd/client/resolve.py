# SPDX-License-Identifier: Apache-2.0
"""Finds or makes the daemon's model for a folder, or for a name of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from flashd.client.client import Client, OnProgress
from flashd.client.results import Model
from flashd.errors import NotFound


def known(client: Client, name: str) -> Model | None:
    """Returns the model of exactly this name, or None. Abbreviations are for people, not for programs."""
    return next((model for model in client.models() if name in (model.name, *model.aliases)), None)


def name_of(wanted: str) -> str:
    """Returns the daemon's name for a hub name, which is the same, or for a path, which is its last part."""
    return Path(wanted).expanduser().resolve().name if wanted.startswith(("/", ".", "~")) else wanted


def obtain(client: Client, wanted: str, *, token: str | None = None, on_progress: OnProgress | None = None) -> Model:
    """Makes a model from a folder, or from the Hugging Face cache or the hub. It replaces an older version.

    Raises NotFound, and the errors of `Client.import_` and `Client.pull`.
    """
    name = name_of(wanted)
    folder = Path(wanted).expanduser()
    if folder.exists():
        return client.import_(folder, name, on_progress=on_progress)
    if name != wanted:
        raise NotFound(f"there is no {folder}", hint="name a folder, or a model on the hub (OWNER/NAME)")
    client.pull(wanted, token=token, on_progress=on_progress)
    return client.model(wanted)
