# SPDX-License-Identifier: Apache-2.0
"""Which models do we have? The catalog on disk, where everything becomes visible by one rename.

    ROOT/checkpoints/ID/      what flashd/checkpoint describes; immutable
    ROOT/images/KEY/          what engines made of them: flashd/store/images.py
    ROOT/models/NAME.toml     a model: its checkpoint, aliases, versions kept, and when it was used
    ROOT/partial/RANDOM/      a conversion under way; whatever a crash leaves here is removed at the next start
    ROOT/lock                 held by the one daemon that owns the store

A crash at any moment leaves the old state or the new one: a checkpoint without a model is garbage that `collect` takes,
a model never names a checkpoint that is not complete.

Reading never waits for the disk: whatever changes the store holds the mutex, and replaces what readers see as a whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from flashd.checkpoint.files import WEIGHTS, Checkpoint, writing
from flashd.checkpoint.manifest import Manifest
from flashd.errors import (
    AlreadyExists,
    Busy,
    CorruptCheckpoint,
    FlashdError,
    InvalidArgument,
    NotFound,
    StoreFull,
    TransferFailed,
)
from flashd.store import footprint, lineage, lookup, retention
from flashd.store.footprint import Footprint
from flashd.store.images import Images
from flashd.store.names import check_name
from flashd.store.records import CHECKPOINT_ID, Model, Origin, Records, sync_directory
from flashd.units import MiB, format_bytes

__all__ = ["Catalog", "Collected", "Draft", "Model", "Origin"]

log = logging.getLogger(__name__)

_RESERVE_BYTES = 64 * MiB  # left free on the file system: a full one hurts everybody on the machine
_MOST_ALIASES = 64
_OURS_ALONE = 0o700  # private models are among them, and everybody else leases what they may see


@dataclass(frozen=True, slots=True)
class Collected:
    """Checkpoints and images that are gone."""

    checkpoint_ids: tuple[str, ...]
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class Draft:
    """A checkpoint being made: fill `directory`, then `publish` it. Without that, it leaves nothing."""

    directory: Path
    _publish: Callable[..., Model] = field(repr=False)

    def publish(
        self,
        name: str,
        manifest: Manifest,
        origin: Origin,
        *,
        aliases: Sequence[str] = (),
        replace: bool = True,
        owner_uid: int = 0,
        private: bool | None = None,
    ) -> Model:
        """Makes it the checkpoint of `name`, or its new version. Without `private`, a new version is as the old one.

        Raises AlreadyExists if it may not replace one, which nobody may but its owner, or if an alias is taken; then
        nothing has changed.
        """
        return self._publish(self.directory, name, manifest, origin, aliases, replace, owner_uid, private)


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
        self._checkpoints, self._partial = root / "checkpoints", root / "partial"
        self._records = Records(root / "models")
        self._drafts: Mapping[Path, int] = {}  # and what each has reserved
        self._read: list[str] = []  # checkpoints that others are made of
        with _opening(root):
            for folder in (self._checkpoints, root / "models", root / "images", self._partial):
                folder.mkdir(parents=True, exist_ok=True)
                folder.chmod(_OURS_ALONE)
            self._lock = _take_lock(root)
        try:
            with _opening(root):
                self._clean_leftovers()
                self._stored: Mapping[str, Footprint] = self._measure_all()
                self._models: Mapping[str, Model] = self._records.read(self._stored)
                self._guarded = self._records.guarded()
                self.images = Images(root / "images")
        except BaseException:
            self.close()
            raise

    def models(self) -> list[Model]:
        """All models, by name."""
        return [model for _, model in sorted(self._models.items())]

    def get(self, name: str) -> Model | None:
        """The model with exactly this name."""
        return self._models.get(name)

    def resolve(self, text: str, is_seen: Callable[[Model], bool] = lambda model: True) -> Model:
        """The model a person means, of those that they see.

        Raises NotFound, with the nearest names, or InvalidArgument if several match.
        """
        return lookup.find({name: model for name, model in self._models.items() if is_seen(model)}, text)

    def checkpoint(self, checkpoint_id: str) -> Checkpoint:
        """Raises CorruptCheckpoint if it cannot be opened."""
        return Checkpoint.open(self._checkpoints / checkpoint_id)

    def forms(self, checkpoint_id: str) -> tuple[str, ...]:
        """A checkpoint and its images: all that may be in memory of it, by their ids."""
        return (checkpoint_id, *(key for key, made_of in self.images.made_of().items() if made_of == checkpoint_id))

    def checkpoint_of(self, form: str) -> str:
        """The id of the checkpoint that this is, or is an image of."""
        return self.images.made_of().get(form, form)

    @contextlib.contextmanager
    def reading(self, checkpoint_id: str) -> Iterator[Checkpoint]:
        """A checkpoint that is not deleted meanwhile. Raises CorruptCheckpoint if it cannot be opened."""
        with self._mutex:
            self._read.append(checkpoint_id)
        try:
            yield self.checkpoint(checkpoint_id)
        finally:
            with self._mutex:
                self._read.remove(checkpoint_id)

    def find_base(self, recorded: str, *, of: str, owner_uid: int) -> Model:
        """The model that an adapter called `of` names as its base, of those that its owner may see.

        Raises BaseMissing or InvalidSource.
        """
        seen = {name: m for name, m in self._models.items() if not m.private or m.owner_uid == owner_uid}
        return lineage.find_base(seen, recorded, of=of)

    def size_bytes(self) -> int:
        """What all checkpoints take on disk; hard links counted once."""
        return footprint.total_bytes(self._stored.values())

    def free_bytes(self) -> int:
        """What may still be written: by the quota, by the file system, and beside the drafts under way."""
        status = os.statvfs(self.root)
        on_disk_bytes = status.f_bavail * status.f_frsize - _RESERVE_BYTES
        drafts = self._drafts
        written_bytes = {directory: _written_bytes(directory) for directory in drafts}
        to_come_bytes = sum(max(0, need_bytes - written_bytes[path]) for path, need_bytes in drafts.items())
        free_bytes = on_disk_bytes - to_come_bytes
        if self.quota_bytes:
            stored_bytes = self.size_bytes() + self.images.size_bytes()
            in_quota_bytes = self.quota_bytes - stored_bytes - sum(written_bytes.values()) - to_come_bytes
            free_bytes = min(free_bytes, in_quota_bytes)
        return max(0, free_bytes)

    @contextlib.contextmanager
    def draft(self, need_bytes: int) -> Iterator[Draft]:
        """A directory to make a checkpoint of about `need_bytes` in. Raises StoreFull before anything is written."""
        with self._mutex:
            self._check_room(need_bytes)
            with writing(self._partial):
                directory = Path(tempfile.mkdtemp(dir=self._partial))
                directory.chmod(0o755)
            self._drafts = {**self._drafts, directory: need_bytes}
        try:
            yield Draft(directory, self._publish)
        finally:
            with self._mutex:
                self._drafts = {path: need for path, need in self._drafts.items() if path != directory}
            shutil.rmtree(directory, ignore_errors=True)

    def check_free(self, name: str, *, replace: bool, owner_uid: int) -> str:
        """The normal form of a name for a new model of this user.

        Raises AlreadyExists if it is taken and may not be replaced: what is somebody else's never may.
        """
        name = check_name(name)
        old = self._models.get(name)
        if old is not None and old.owner_uid != owner_uid:
            raise AlreadyExists(f"another user has a model {name!r}", hint="choose another name, such as YOU/NAME")
        if old is not None and not replace:
            raise AlreadyExists(f"there is a model {name!r}", hint="choose another name, or allow replacing it")
        for model in self._models.values():
            if name in model.aliases and model.name != name:
                raise AlreadyExists(f"{name!r} is an alias of {_called(model)}", hint="choose another name")
        return name

    def set_aliases(self, name: str, aliases: Sequence[str]) -> Model:
        """Raises AlreadyExists if one of them means another model."""
        with self._mutex:
            return self._update(name, aliases=self._free_aliases(name, aliases))

    def set_pinned(self, name: str, pinned: bool) -> Model:
        return self._update(name, pinned=pinned)

    def set_private(self, name: str, private: bool) -> Model:
        with self._mutex:
            return self._update(name, private=private)

    def touch(self, name: str, *, swapped: bool = False) -> Model:
        """Notes that the model was used now."""
        with self._mutex:
            model = self._existing(name)
            return self._update(name, last_used_at=self._clock(), use_count=model.use_count + swapped)

    def remove(self, name: str) -> None:
        """Forgets the model. Its checkpoint stays until `collect`, so that whoever uses it is not hurt."""
        with self._mutex:
            self._existing(name)
            self._records.remove(name)
            self._models = {other: model for other, model in self._models.items() if other != name}

    def collect(self, in_use: Collection[str]) -> Collected:
        """Deletes checkpoints that no model, no kept version and nobody in `in_use` needs.

        Works on a full disk: the bytes go first, then the records that still list them are written.
        """
        with self._mutex:
            kept = {name: self._with_kept_versions(model, in_use) for name, model in self._models.items()}
            needed = {version for model in kept.values() for version in model.versions()}
            garbage = sorted(self._stored.keys() - needed - self._guarded - set(in_use) - set(self._read))
            trimmed = [name for name, model in kept.items() if model != self._models[name]]
            self._models = kept
            before_bytes = self.size_bytes()
            doomed = [self._unlink(checkpoint_id) for checkpoint_id in garbage]
            garbage += self.images.keep_only(self._stored.keys())
            freed_bytes = before_bytes - self.size_bytes()
        for directory in doomed:
            shutil.rmtree(directory, ignore_errors=True)
        for name in trimmed:
            self._tidy(name)
        return Collected(tuple(garbage), freed_bytes)

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _clean_leftovers(self) -> None:
        for leftover in self._partial.iterdir():
            shutil.rmtree(leftover, ignore_errors=True)

    def _measure_all(self) -> Mapping[str, Footprint]:
        """What lies at addresses; whatever else somebody put there is not ours to touch."""
        with os.scandir(self._checkpoints) as entries:
            names = [e.name for e in entries if e.is_dir(follow_symlinks=False) and _is_id(e.name)]
        return {name: footprint.measure(self._checkpoints / name) for name in names}

    def _check_room(self, need_bytes: int) -> None:
        free_bytes = self.free_bytes()
        if need_bytes > free_bytes:
            self.images.make_room(need_bytes - free_bytes)  # they can be made again
            free_bytes = self.free_bytes()
        if need_bytes > free_bytes:
            quota = f" (quota {format_bytes(self.quota_bytes)})" if self.quota_bytes else ""
            raise StoreFull(
                f"the store needs {format_bytes(need_bytes)} and has {format_bytes(free_bytes)} left{quota}",
                hint="remove a model (flash rm), raise store.quota, or move store.path to a larger disk",
            )

    def _publish(
        self,
        directory: Path,
        name: str,
        manifest: Manifest,
        origin: Origin,
        aliases: Sequence[str],
        may_replace: bool,
        owner_uid: int,
        private: bool | None,
    ) -> Model:
        with self._mutex:
            name = self.check_free(name, replace=may_replace, owner_uid=owner_uid)
            old = self._models.get(name)
            versions = old.versions() if old else ()
            model = Model(
                name=name,
                checkpoint_id=manifest.id,
                origin=replace(origin, location=_as_text(origin.location)),
                created_at=self._clock(),
                size_bytes=manifest.data_bytes,
                tensor_count=manifest.tensor_count,
                dtype=manifest.dtype,
                architecture=manifest.architecture,
                architecture_key=manifest.architecture_key,
                aliases=self._free_aliases(name, [*(old.aliases if old else ()), *aliases]),
                previous=tuple(dict.fromkeys(i for i in versions if i != manifest.id)),
                pinned=old.pinned if old else False,
                last_used_at=old.last_used_at if old else 0.0,
                use_count=old.use_count if old else 0,
                owner_uid=owner_uid,
                private=private if private is not None else old is not None and old.private,
            )
            with writing(self._checkpoints):
                self._adopt(directory, manifest)
            return self._write(model)

    def _adopt(self, directory: Path, manifest: Manifest) -> None:
        """Moves a finished directory to its address. Bytes that are stored already are not stored again.

        What is shared is the fresh copy, known to be whole: so converting a source again mends what a disk has spoiled.
        """
        target = self._checkpoints / manifest.id
        twins = [twin for twin in self._with_weights_of(manifest) if twin != manifest.id]
        for twin in twins:
            _share_weights(directory, self._checkpoints / twin)
        if target.exists():
            for file in directory.iterdir():
                file.replace(target / file.name)
        else:
            directory.rename(target)
        sync_directory(target)
        sync_directory(self._checkpoints)
        changed = {i: footprint.measure(self._checkpoints / i) for i in (*twins, manifest.id)}
        self._stored = {**self._stored, **changed}

    def _with_weights_of(self, manifest: Manifest) -> Iterator[str]:
        """Checkpoints with the same weights. Manifests are read only where the size fits: there may be a thousand."""
        size_bytes = manifest.data_offset + manifest.data_bytes
        for checkpoint_id, stored in self._stored.items():
            if stored.weights_bytes == size_bytes:
                with contextlib.suppress(CorruptCheckpoint):
                    if self.checkpoint(checkpoint_id).manifest.weights == manifest.weights:
                        yield checkpoint_id

    def _with_kept_versions(self, model: Model, in_use: Collection[str]) -> Model:
        kept = retention.versions_to_keep(model.previous, self._keep_versions, in_use)
        return model if kept == model.previous else replace(model, previous=kept)

    def _unlink(self, checkpoint_id: str) -> Path:
        """Takes it away by one rename, so that half a checkpoint is never at an address; returns where it is now."""
        doomed = self._partial / f"deleted-{checkpoint_id}"
        shutil.rmtree(doomed, ignore_errors=True)  # one that could not be deleted before
        with writing(self._checkpoints):
            (self._checkpoints / checkpoint_id).rename(doomed)
            sync_directory(self._checkpoints)
        self._stored = {i: stored for i, stored in self._stored.items() if i != checkpoint_id}
        return doomed

    def _tidy(self, name: str) -> None:
        """Writes a record that lists versions no longer there. If that fails, the next start leaves them out."""
        with self._mutex:
            try:
                if name in self._models:
                    self._write(self._models[name])
            except FlashdError as error:
                log.warning("%s still lists versions that are gone: %s", name, error)

    def _free_aliases(self, name: str, aliases: Sequence[str]) -> tuple[str, ...]:
        checked = tuple(dict.fromkeys(check_name(alias) for alias in aliases))
        if len(checked) > _MOST_ALIASES:
            raise InvalidArgument(f"{len(checked)} aliases are too many", hint=f"a model has {_MOST_ALIASES} at most")
        if name in checked:
            raise AlreadyExists(f"{name!r} is the model's own name", hint="choose another alias")
        for other in self._models.values():
            if other.name != name and (clash := {other.name, *other.aliases} & set(checked)):
                raise AlreadyExists(f"{min(clash)!r} already means {_called(other)}", hint="choose another alias")
        return checked

    def _existing(self, name: str) -> Model:
        if name not in self._models:
            raise NotFound(f"there is no model {name!r}", hint="flash list shows the models there are")
        return self._models[name]

    def _update(self, name: str, **changes: Any) -> Model:
        with self._mutex:
            return self._write(replace(self._existing(name), **changes))

    def _write(self, model: Model) -> Model:
        self._records.write(model)
        self._models = {**self._models, model.name: model}
        return model


def _take_lock(root: Path) -> IO[str]:
    lock = (root / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        hint = "flash status shows it; give this one another --state-dir"
        raise Busy(f"another flashd owns the store {root}", hint=hint) from None
    return lock


@contextlib.contextmanager
def _opening(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"the store {root} cannot be used: {error.filename or root}: {error.strerror}"
        raise TransferFailed(what, hint="see who owns it, or set store.path to another folder") from None


def _called(model: Model) -> str:
    """For whoever wanted a name that it has."""
    return "a private model" if model.private else repr(model.name)


def _is_id(name: str) -> bool:
    return CHECKPOINT_ID.fullmatch(os.fsencode(name)) is not None


def _written_bytes(directory: Path) -> int:
    try:
        return footprint.total_bytes([footprint.measure(directory)])
    except OSError:  # published or given up in this moment
        return 0


def _share_weights(directory: Path, twin: Path) -> None:
    """Makes the weights of both one file, if the file system has hard links to give; else there are two."""
    link = directory / f"{WEIGHTS}.shared"
    try:
        os.link(directory / WEIGHTS, link)
        link.replace(twin / WEIGHTS)
    except OSError as error:
        log.info("%s keeps its own copy of weights stored before: %s", directory.name, error.strerror)
        link.unlink(missing_ok=True)


def _as_text(path: str) -> str:
    """A path for a record; its bytes need not be UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode()
