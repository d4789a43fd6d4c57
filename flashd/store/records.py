# SPDX-License-Identifier: Apache-2.0
"""What does the store remember of each model? One small TOML file a model, replaced by rename.

A record that cannot be read is set aside as NAME.damaged, never deleted, and the checkpoints that it speaks of stay for
as long as that file does: a few spoiled bytes of text must not cost gigabytes of weights.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from flashd.checkpoint.files import writing
from flashd.errors import InvalidArgument
from flashd.store.names import check_name, file_name

log = logging.getLogger(__name__)

CHECKPOINT_ID = re.compile(rb"[0-9a-f]{64}")
_KINDS = {
    "str": (str,), "int": (int,), "float": (float, int), "bool": (bool,), "Origin": (dict,), "tuple[str, ...]": (list,),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a version came from. `kind` is inbox or import; equal fingerprints mean an unchanged source."""

    kind: str
    location: str
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """A name, and the version it points to; what a listing needs is here, so that listing reads no manifest.

    `previous` are older checkpoints still kept, newest first. `owner_uid` is the user who made it; root for records
    from before there were owners.
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

    def versions(self) -> tuple[str, ...]:
        """Its checkpoint, and the older ones."""
        return (self.checkpoint_id, *self.previous)

    def to_toml(self) -> str:
        return tomli_w.dumps(dataclasses.asdict(self))

    @classmethod
    def from_toml(cls, text: str) -> Model:
        """Raises ValueError for anything that `to_toml` does not write."""
        document = tomllib.loads(text)
        _check_kinds(cls, document)
        _check_kinds(Origin, document["origin"])
        tuples = {name: tuple(value) for name, value in document.items() if isinstance(value, list)}
        return cls(**{**document, **tuples, "origin": Origin(**document["origin"])})


class Records:
    """The folder of records. Not for several threads at once: the catalog sees to that."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, stored: Collection[str]) -> dict[str, Model]:
        """All models whose checkpoint is `stored`; other records are set aside."""
        for leftover in self._folder.glob("*.partial"):
            leftover.unlink()
        models = {}
        for path in sorted(self._folder.glob("*.toml")):
            try:
                model = _read(path, stored)
            except (ValueError, InvalidArgument) as error:
                aside = path.rename(path.with_suffix(".damaged"))
                log.error("the record of a model is damaged: %s; it is now %s, and its checkpoints stay", error, aside)
            else:
                models[model.name] = model
        return models

    def guarded(self) -> frozenset[str]:
        """The checkpoints that records set aside speak of."""
        asides = (path.read_bytes() for path in self._folder.glob("*.damaged"))
        return frozenset(found.decode() for text in asides for found in CHECKPOINT_ID.findall(text))

    def write(self, model: Model) -> None:
        """Raises StoreFull or TransferFailed; then the record is as it was."""
        path = self._path(model.name)
        partial = path.with_suffix(".partial")
        with writing(self._folder):
            try:
                with partial.open("w", encoding="utf-8") as file:
                    file.write(model.to_toml())
                    file.flush()
                    os.fsync(file.fileno())
                partial.rename(path)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
            sync_directory(self._folder)

    def remove(self, name: str) -> None:
        with writing(self._folder):
            self._path(name).unlink(missing_ok=True)
            sync_directory(self._folder)

    def _path(self, name: str) -> Path:
        return self._folder / (file_name(name) + ".toml")


def sync_directory(directory: Path) -> None:
    """What was renamed there is on the disk when this returns (fsync(2) of the file alone does not say so)."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(path: Path, stored: Collection[str]) -> Model:
    model = Model.from_toml(path.read_text(encoding="utf-8"))
    if file_name(check_name(model.name)) != path.stem:
        raise ValueError(f"{path.name} speaks of {model.name!r}")
    if model.checkpoint_id not in stored:
        raise ValueError(f"{path.name} names a checkpoint that is not in the store")
    return replace(model, previous=tuple(version for version in model.previous if version in stored))


def _check_kinds(cls: type[Any], document: dict[str, Any]) -> None:
    """Raises ValueError unless the document holds exactly what the dataclass declares: dataclasses do not look."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := document.keys() - fields:
        raise ValueError(f"{min(unknown)} is unknown")
    for name, field in fields.items():
        if name not in document:
            if field.default is dataclasses.MISSING:
                raise ValueError(f"{name} is missing")
        elif not _is_kind(document[name], str(field.type)):
            raise ValueError(f"{name} is not of type {field.type}")


def _is_kind(value: object, kind: str) -> bool:
    if isinstance(value, bool) and kind != "bool":
        return False
    return isinstance(value, _KINDS[kind]) and (not isinstance(value, list) or _are_texts(value))


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)
