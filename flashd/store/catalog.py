# SPDX-License-Identifier: Apache-2.0
"""Which models do we have? The catalog on disk, where everything becomes visible by one rename.

    ROOT/checkpoints/ID/      what flashd/checkpoint describes; immutable
    ROOT/models/NAME.toml     a model: its checkpoint, aliases, versions kept, and when it was used
    ROOT/partial/RANDOM/      a conversion under way; whatever a crash leaves here is removed at the next start
    ROOT/lock                 held by the one daemon that owns the store

A crash at any moment leaves the old state or the new one: a checkpoint without a model is garbage that `collect` takes,
a model never names a checkpoint that is not complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fcntl
import os
import shutil
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w

from flashd.checkpoint.files import WEIGHTS, Checkpoint
from flashd.checkpoint.manifest import Manifest
from flashd.errors import AlreadyExists, Busy, CorruptCheckpoint, InvalidArgument, NotFound, StoreFull
from flashd.store import retention
from flashd.store.names import check_name, file_name
from flashd.units import MiB, format_bytes

_RESERVE_BYTES = 64 * MiB  # left free on the file system: a full one hurts everybody on the machine


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a version came from. `kind` is inbox or import; equal fingerprints mean an unchanged source."""

    kind: str
    location: str
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """A name, and the version it points to; what a listing needs is here, so that listing reads no manifest.

    `previous` are older checkpoints still kept, newest first.
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

    def to_toml(self) -> str:
        return tomli_w.dumps(dataclasses.asdict(self))

    @classmethod
    def from_toml(cls, text: str) -> Model:
        document: dict[str, Any] = tomllib.loads(text)
        origin = Origin(**document.pop("origin"))
        aliases, previous = tuple(document.pop("aliases")), tuple(document.pop("previous"))
        return cls(**document, origin=origin, aliases=aliases, previous=previous)


@dataclass(frozen=True, slots=True)
class Collected:
    checkpoint_ids: tuple[str, ...]
    freed_bytes: int


@dataclass(slots=True)
class Draft:
    """A checkpoint being made: fill `directory`, then `publish` it. Without that, it leaves nothing."""

    directory: Path
    _publish: Callable[..., Model] = field(repr=False)

    def publish(
        self, name: str, manifest: Manifest, origin: Origin, *, aliases: Sequence[str] = (), replace: bool = True
    ) -> Model:
        """Makes it the checkpoint of `name`, or its new version. Raises AlreadyExists if it may not replace one."""
        return self._publish(self.directory, name, manifest, origin, aliases, replace)


class Catalog:
    """The store. Safe for use from several threads; one process at a time (raises Busy)."""

    def __init__(
        self, root: Path, *, quota_bytes: int = 0, keep_versions: int = 1, clock: Callable[[], float] = time.time
    ) -> None:
        self.root = root
        self.quota_bytes = quota_bytes
        self._keep_versions = keep_versions
        self._clock = clock
        self._mutex = threading.RLock()
        self._models: dict[str, Model] = {}
        self._sizes: dict[str, int] = {}
        self._reserved_bytes = 0
        for folder in (self._checkpoints, self._records, self._partial):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            self._clean_leftovers()
            self._read_records()
        except BaseException:
            self.close()
            raise

    @property
    def _checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def _records(self) -> Path:
        return self.root / "models"

    @property
    def _partial(self) -> Path:
        return self.root / "partial"

    def models(self) -> list[Model]:
        """All models, by name."""
        with self._mutex:
            return [self._models[name] for name in sorted(self._models)]

    def get(self, name: str) -> Model | None:
        """The model with exactly this name."""
        with self._mutex:
            return self._models.get(name)

    def resolve(self, text: str) -> Model:
        """The model a person means: a name, an alias, or what one name alone matches in other case or by its last part.

        Raises NotFound, with the nearest names, or InvalidArgument where several match.
        """
        with self._mutex:
            wanted = text.strip()
            if wanted in self._models:
                return self._models[wanted]
            by_alias = {alias: model for model in self._models.values() for alias in model.aliases}
            if wanted in by_alias:
                return by_alias[wanted]
            labels = self._models | by_alias
            for same in (_same_but_for_case, _same_last_part):
                found = {model.name: model for label, model in labels.items() if same(label, wanted)}
                if len(found) > 1:
                    hint = "say which: " + ", ".join(sorted(found))
                    raise InvalidArgument(f"{wanted!r} is the name of several models", hint=hint)
                if found:
                    return next(iter(found.values()))
            near = difflib.get_close_matches(wanted, labels, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "flash list shows the models there are"
            raise NotFound(f"there is no model {wanted!r}", hint=hint)

    def checkpoint(self, checkpoint_id: str) -> Checkpoint:
        """Raises CorruptCheckpoint if it cannot be opened."""
        return Checkpoint.open(self._checkpoints / checkpoint_id)

    def size_bytes(self) -> int:
        """What all checkpoints take on disk; hard links counted once."""
        with self._mutex:
            return sum(self._sizes.values())

    def free_bytes(self) -> int:
        """What may still be written: by the quota, and by the file system."""
        status = os.statvfs(self.root)
        free_bytes = max(0, status.f_bavail * status.f_frsize - _RESERVE_BYTES)
        with self._mutex:
            if self.quota_bytes:
                free_bytes = min(free_bytes, max(0, self.quota_bytes - self.size_bytes()))
            return max(0, free_bytes - self._reserved_bytes)

    @contextlib.contextmanager
    def draft(self, need_bytes: int) -> Iterator[Draft]:
        """A directory to make a checkpoint of about `need_bytes` in. Raises StoreFull before anything is written."""
        with self._mutex:
            free_bytes = self.free_bytes()
            if need_bytes > free_bytes:
                quota = f" (quota {format_bytes(self.quota_bytes)})" if self.quota_bytes else ""
                raise StoreFull(
                    f"the store needs {format_bytes(need_bytes)} and has {format_bytes(free_bytes)} left{quota}",
                    hint="remove a model (flash rm), raise store.quota, or move store.path to a larger disk",
                )
            self._reserved_bytes += need_bytes
        directory = Path(tempfile.mkdtemp(dir=self._partial))
        try:
            directory.chmod(0o755)
            yield Draft(directory, self._publish)
        finally:
            with self._mutex:
                self._reserved_bytes -= need_bytes
            shutil.rmtree(directory, ignore_errors=True)

    def check_free(self, name: str, *, replace: bool) -> str:
        """The normal form of a name for a new model. Raises AlreadyExists if it is taken and may not be replaced."""
        name = check_name(name)
        with self._mutex:
            if name in self._models and not replace:
                raise AlreadyExists(f"there is a model {name!r}", hint="choose another name, or allow replacing it")
            for model in self._models.values():
                if name in model.aliases and model.name != name:
                    raise AlreadyExists(f"{name!r} is an alias of {model.name!r}", hint="choose another name")
        return name

    def set_aliases(self, name: str, aliases: Sequence[str]) -> Model:
        with self._mutex:
            checked = tuple(dict.fromkeys(check_name(alias) for alias in aliases))
            for other in self._models.values():
                taken = {other.name, *other.aliases} if other.name != name else {other.name}
                if clash := taken & set(checked):
                    raise AlreadyExists(f"{min(clash)!r} already means {other.name!r}", hint="choose another alias")
            return self._update(name, aliases=checked)

    def set_pinned(self, name: str, pinned: bool) -> Model:
        return self._update(name, pinned=pinned)

    def touch(self, name: str, *, swapped: bool = False) -> Model:
        """Notes that the model was used now."""
        with self._mutex:
            model = self._existing(name)
            return self._update(name, last_used_at=self._clock(), use_count=model.use_count + swapped)

    def remove(self, name: str) -> None:
        """Forgets the model. Its checkpoint stays until `collect`, so that whoever uses it is not hurt."""
        with self._mutex:
            self._existing(name)
            (self._records / (file_name(name) + ".toml")).unlink()
            _sync(self._records)
            del self._models[name]

    def collect(self, in_use: Collection[str]) -> Collected:
        """Deletes checkpoints that no model, no kept version and nobody in `in_use` needs."""
        with self._mutex:
            for model in list(self._models.values()):
                kept = retention.versions_to_keep(model.previous, self._keep_versions, in_use)
                if kept != model.previous:
                    self._update(model.name, previous=kept)
            needed = {i for model in self._models.values() for i in (model.checkpoint_id, *model.previous)} | set(
                in_use
            )
            garbage = sorted(self._sizes.keys() - needed)
            freed_bytes = sum(self._delete(checkpoint_id) for checkpoint_id in garbage)
            return Collected(tuple(garbage), freed_bytes)

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _take_lock(self) -> Any:
        lock = (self.root / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            hint = "flash status shows it; give this one another --state-dir"
            raise Busy(f"another flashd owns the store {self.root}", hint=hint) from None
        return lock

    def _clean_leftovers(self) -> None:
        for leftover in self._partial.iterdir():
            shutil.rmtree(leftover, ignore_errors=True)
        for record in self._records.glob("*.partial"):
            record.unlink()

    def _read_records(self) -> None:
        """Models whose checkpoint is gone are set aside rather than deleted: their record says what was lost."""
        self._sizes = {entry.name: 0 for entry in os.scandir(self._checkpoints)}
        for record in self._records.glob("*.toml"):
            try:
                model = Model.from_toml(record.read_text(encoding="utf-8"))
            except (tomllib.TOMLDecodeError, KeyError, TypeError, UnicodeDecodeError):
                record.rename(record.with_suffix(".damaged"))
                continue
            if model.checkpoint_id not in self._sizes:
                record.rename(record.with_suffix(".damaged"))
                continue
            self._models[model.name] = model
        seen: set[int] = set()
        for checkpoint_id in self._sizes:
            self._sizes[checkpoint_id] = _size_on_disk(self._checkpoints / checkpoint_id, seen)

    def _publish(
        self,
        directory: Path,
        name: str,
        manifest: Manifest,
        origin: Origin,
        aliases: Sequence[str],
        may_replace: bool,
    ) -> Model:
        with self._mutex:
            name = self.check_free(name, replace=may_replace)
            self._adopt(directory, manifest)
            old = self._models.get(name)
            versions = (old.checkpoint_id, *old.previous) if old else ()
            model = Model(
                name=name,
                checkpoint_id=manifest.id,
                origin=origin,
                created_at=self._clock(),
                size_bytes=manifest.data_bytes,
                tensor_count=manifest.tensor_count,
                dtype=manifest.dtype,
                architecture=manifest.architecture,
                architecture_key=manifest.architecture_key,
                aliases=old.aliases if old else (),
                previous=tuple(dict.fromkeys(i for i in versions if i != manifest.id)),
                pinned=old.pinned if old else False,
                last_used_at=old.last_used_at if old else 0.0,
                use_count=old.use_count if old else 0,
            )
            self._write(model)
            return self.set_aliases(name, [*model.aliases, *aliases]) if aliases else model

    def _adopt(self, directory: Path, manifest: Manifest) -> None:
        """Moves a finished directory to its address; bytes that are stored already are shared, not stored again."""
        target = self._checkpoints / manifest.id
        if target.exists():
            return
        twin = self._with_weights(manifest)
        if twin is not None:
            (directory / WEIGHTS).unlink()
            os.link(twin / WEIGHTS, directory / WEIGHTS)
            _sync(directory)
        directory.rename(target)
        _sync(self._checkpoints)
        self._sizes[manifest.id] = _size_on_disk(target, self._shared_inodes())

    def _with_weights(self, manifest: Manifest) -> Path | None:
        for checkpoint_id in self._sizes:
            with contextlib.suppress(CorruptCheckpoint):
                if self.checkpoint(checkpoint_id).manifest.weights == manifest.weights:
                    return self._checkpoints / checkpoint_id
        return None

    def _shared_inodes(self) -> set[int]:
        return {(self._checkpoints / i / WEIGHTS).stat().st_ino for i in self._sizes}

    def _delete(self, checkpoint_id: str) -> int:
        """Out of sight by one rename first: half a checkpoint is never at an address."""
        size_bytes = self._sizes.pop(checkpoint_id)
        doomed = self._partial / f"deleted-{checkpoint_id}"
        (self._checkpoints / checkpoint_id).rename(doomed)
        _sync(self._checkpoints)
        shutil.rmtree(doomed, ignore_errors=True)
        return size_bytes

    def _existing(self, name: str) -> Model:
        if name not in self._models:
            raise NotFound(f"there is no model {name!r}", hint="flash list shows the models there are")
        return self._models[name]

    def _update(self, name: str, **changes: Any) -> Model:
        with self._mutex:
            model = replace(self._existing(name), **changes)
            self._write(model)
            return model

    def _write(self, model: Model) -> None:
        path = self._records / (file_name(model.name) + ".toml")
        partial = path.with_suffix(".partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(model.to_toml())
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StoreFull(f"{path}: {error.strerror}", hint="free some space on this disk") from error
        _sync(self._records)
        self._models[model.name] = model


def _same_but_for_case(label: str, wanted: str) -> bool:
    return label.casefold() == wanted.casefold()


def _same_last_part(label: str, wanted: str) -> bool:
    return "/" not in wanted and label.rsplit("/", 1)[-1].casefold() == wanted.casefold()


def _size_on_disk(directory: Path, seen: set[int]) -> int:
    size_bytes = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if status.st_ino not in seen:
                size_bytes += status.st_size
                seen.add(status.st_ino)
    return size_bytes


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
