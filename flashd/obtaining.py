# SPDX-License-Identifier: Apache-2.0
"""How does what somebody calls a model become one of the daemon's: a folder, or a name as the hub has it?"""

from __future__ import annotations

import os
import tempfile
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
    if pull := getattr(client, "pull", None):
        pull(wanted, token=token, on_progress=on_progress)
        return client.model(wanted)
    return _import_cached(client, wanted, on_progress)


def _import_cached(client: Client, name: str, on_progress: OnProgress | None) -> Model:
    """Of what the Hugging Face cache has; raises NotFound if it has not."""
    hint = f"download it: huggingface-cli download {name}"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise NotFound(f"there is no model {name!r}", hint=hint) from None
    try:
        snapshot = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise NotFound(f"there is no model {name!r}, nor has the Hugging Face cache one", hint=hint) from None
    # A snapshot is made of links, which an import does not follow: it gets other names of the same files.
    with tempfile.TemporaryDirectory(dir=snapshot.parent, prefix=".flashd-") as folder:
        for file in snapshot.iterdir():
            if file.is_file():
                os.link(file.resolve(), Path(folder, file.name))
        return client.import_(Path(folder), name, on_progress=on_progress)
