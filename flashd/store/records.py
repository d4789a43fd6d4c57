# SPDX-License-Identifier: Apache-2.0
"""Records of models: one small TOML file each, replaced by rename.

An unreadable record is set aside as NAME.damaged, never deleted. As long as it exists, the catalog deletes no
checkpoint that may belong to its model, because a few damaged bytes of text must not cost gigabytes of weights.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from flashd import toml
from flashd.durable import (
    as_count,
    as_text,
    as_time,
    clear,
    confirm,
    put_aside,
    read_bytes,
    remove_file,
    replace_file,
    set_aside,
)
from flashd.errors import InvalidArgument
from flashd.store.names import check_name, file_name
from flashd.units import MiB

log = logging.getLogger(__name__)

CHECKPOINT_ID = re.compile("[0-9a-f]{64}")
MOST_ALIASES = 64
_MOST_RECORD_BYTES = MiB
_MOST_UID = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Origin:
    """The source of a version. `kind` is inbox or import. An unchanged source has the same fingerprint."""

    kind: str
    location: str
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """A name and the version it points to, with all fields of a listing, which therefore reads no manifests.

    `previous` are older checkpoints that are kept, newest first. `owner_uid` is the user who made the model; root in
    records older than ownership. `context_length` is 0 if it is unknown, as in records older than it.
    """

    name: str
    checkpoint_id: str
    origin: Origin
    created_at: float
    size_bytes: int
    tensor_count: int
    dtype: str
    architecture: str
    architecture_key: str
    aliases: tuple[str, ...] = ()
    previous: tuple[str, ...] = ()
    pinned: bool = False
    last_used_at: float = 0.0
    use_count: int = 0
    owner_uid: int = 0
    private: bool = False
    context_length: int = 0
    is_gguf: bool = False

    def versions(self) -> tuple[str, ...]:
        """The current checkpoint, followed by the older ones."""
        return (self.checkpoint_id, *self.previous)

    def to_toml(self) -> str:
        return tomli_w.dumps(dataclasses.asdict(self))

    @classmethod
    def from_toml(cls, text: str) -> Model:
        """Parses the output of `to_toml`. Raises ValueError for other text."""
        document = toml.parse(text)
        origin = Origin(**_checked(Origin, _as_table(document.pop("origin", None)), _TEXTS))
        return cls(**_checked(cls, document | {"origin": origin}, _MODEL))


class Records:
    """The folder of records. Not thread-safe; the catalog serialises calls."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._aside: list[Path] = []
        self._stuck: list[Path] = []  # damaged records that could not be set aside

    def read(self, stored: Collection[str]) -> dict[str, Model]:
        """Reads the records of models whose checkpoint is in `stored`, and sets other records aside."""
        self.tidy()
        models = {}
        for path in sorted(self._folder.glob("*.toml")):
            try:
                model = _read(path, stored)
            except (OSError, ValueError, InvalidArgument) as error:
                aside = set_aside(path)
                if aside is None:
                    self._stuck.append(path)
                where = aside or path
                log.error(
                    "the record of a model is damaged: %s; it was renamed to %s, and its checkpoints are kept",
                    error,
                    where,
                )
            else:
                models[model.name] = model
        self._aside = put_aside(self._folder)
        return _without_clashes(models)

    def damaged(self) -> list[Path]:
        """Returns the unreadable records that still exist.

        It is called every few seconds, so it does not list the folder again: none is set aside after `read`.
        """
        return [path for path in (*self._aside, *self._stuck) if os.path.lexists(path)]

    def write(self, model: Model) -> None:
        """Writes a record. Raises OSError if the record is unchanged, or Unconfirmed."""
        replace_file(self._path(model.name), model.to_toml().encode())

    def remove(self, name: str) -> None:
        """Removes a record. Raises OSError if the record is unchanged, or Unconfirmed."""
        remove_file(self._path(name))

    def confirm(self) -> None:
        """Makes earlier changes durable. Raises Unconfirmed if the disk does not confirm them."""
        confirm(self._folder)

    def tidy(self) -> None:
        """Removes the remains of unfinished writes."""
        clear(self._folder)

    def _path(self, name: str) -> Path:
        return self._folder / (file_name(name) + ".toml")


def _read(path: Path, stored: Collection[str]) -> Model:
    model = Model.from_toml(read_bytes(path, _MOST_RECORD_BYTES).decode())
    if file_name(check_name(model.name)) != path.stem:
        raise ValueError(f"{path.name} is a record of {model.name!r}")
    if model.checkpoint_id not in stored:
        raise ValueError(f"{path.name} names a checkpoint that is not in the store")
    return replace(model, previous=tuple(version for version in model.previous if version in stored))


def _without_clashes(models: Mapping[str, Model]) -> dict[str, Model]:
    """Drops aliases that are names or earlier aliases of other models, so that each alias means one model."""
    taken = set(models)
    found = {}
    for name, model in models.items():
        aliases = tuple(alias for alias in model.aliases if alias not in taken)
        if aliases != model.aliases:
            log.error("%s has aliases that mean other models, and keeps only %s", name, ", ".join(aliases) or "none")
        taken.update(aliases)
        found[name] = replace(model, aliases=aliases)
    return found


def _as_table(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError("it lacks the origin of the model")
    return value


def _as_flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{type(value).__name__} in place of true or false")
    return value


def _as_uid(value: object) -> int:
    if as_count(value) > _MOST_UID:
        raise ValueError("a user id is out of range")
    return as_count(value)


def _as_id(value: object) -> str:
    if CHECKPOINT_ID.fullmatch(as_text(value)) is None:
        raise ValueError("it names no checkpoint")
    return as_text(value)


def _as_ids(value: object) -> tuple[str, ...]:
    return tuple(_as_id(item) for item in _as_list(value))


def _as_aliases(value: object) -> tuple[str, ...]:
    aliases = tuple(as_text(item) for item in _as_list(value))
    if len(set(aliases)) > MOST_ALIASES or any(check_name(alias) != alias for alias in aliases):
        raise ValueError("its aliases cannot be names of models")
    return aliases


def _as_list(value: object) -> list[object] | tuple[object, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{type(value).__name__} in place of a list")
    return value


def _as_origin(value: object) -> object:
    return value  # checked before


_Check = Callable[[object], Any]
_TEXTS: Mapping[str, _Check] = {"kind": as_text, "location": as_text, "fingerprint": as_text}
_MODEL: Mapping[str, _Check] = {
    "name": as_text,
    "checkpoint_id": _as_id,
    "origin": _as_origin,
    "created_at": as_time,
    "size_bytes": as_count,
    "tensor_count": as_count,
    "dtype": as_text,
    "architecture": as_text,
    "architecture_key": as_text,
    "context_length": as_count,
    "aliases": _as_aliases,
    "previous": _as_ids,
    "pinned": _as_flag,
    "last_used_at": as_time,
    "use_count": as_count,
    "owner_uid": _as_uid,
    "private": _as_flag,
    "is_gguf": _as_flag,
}  # fmt: skip


def _checked(cls: type, document: Mapping[str, object], checks: Mapping[str, _Check]) -> dict[str, Any]:
    """Checks that a document has exactly the fields of a dataclass, and returns them. Raises ValueError."""
    if unknown := document.keys() - checks:
        raise ValueError(f"{min(unknown)[:80]!r} is unknown")
    for field in dataclasses.fields(cls):
        if field.name not in document and field.default is dataclasses.MISSING:
            raise ValueError(f"{field.name} is missing")
    return {name: _check(name, value, checks[name]) for name, value in document.items()}


def _check(name: str, value: object, check: _Check) -> object:
    try:
        return check(value)
    except (ValueError, InvalidArgument) as error:
        raise ValueError(f"{name}: {error}") from None
