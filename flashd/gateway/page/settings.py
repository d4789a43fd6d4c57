# SPDX-License-Identifier: Apache-2.0
"""The settings as the page shows them: their meanings, their values, and the commands that change them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashd import toml
from flashd.config import loading

_HIDDEN = "(hidden)"
_NO_PATH = str(Path())  # a folder that is chosen when the daemon starts
_OF_A_MODEL = "models.NAME."


@dataclass(frozen=True, slots=True)
class Shown:
    """A setting: `value` and `default` as `flash config` writes them, and the command that changes it to what it is, or
    shows it where it is hidden here."""

    key: str
    value: str
    default: str
    meaning: str
    restart: bool
    command: str


def shown(toml_text: str, models: Collection[str], *, shows_all: bool) -> Iterator[Shown]:
    """The settings of a configuration, of these models alone. `shows_all` is for the daemon's own user."""
    document = toml.parse(toml_text)
    for setting in loading.settings():
        default = "" if setting.default == _NO_PATH else _written(setting.default)
        if setting.key.startswith(_OF_A_MODEL):
            last = setting.key.removeprefix(_OF_A_MODEL)
            for name, table in document.get("models", {}).items():
                if name in models and last in table:
                    yield _shown(setting, f"models.{name}.{last}", table[last], default, shows_all)
        else:
            yield _shown(setting, setting.key, loading.value_in(document, setting.key), default, shows_all)


def _shown(setting: loading.Setting, key: str, value: Any, default: str, shows_all: bool) -> Shown:
    # Texts without a default are free ones, which may have credentials, and names of files: for the daemon's own user.
    is_free = isinstance(value, str | list) and default in {"", "[]"}
    is_hidden = is_free and bool(value) and not shows_all
    written = _HIDDEN if is_hidden else _written(value)
    command = f"flash config {shlex.quote(key)}" + ("" if is_hidden else f" {shlex.quote(written)}")
    return Shown(key, written, default, setting.doc, not setting.live, command)


def _written(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, bool | list) else str(value)
