# SPDX-License-Identifier: Apache-2.0
"""The catalog of models on disk. Every change becomes visible by one rename.

    ROOT/checkpoints/ID/      a checkpoint, in the format of flashd/checkpoint; immutable
    ROOT/images/KEY/          an image that an engine made of a checkpoint: flashd/store/images.py
    ROOT/models/NAME.toml     a model: its checkpoint, aliases, kept versions, and the time of its last use
    ROOT/partial/RANDOM/      a running conversion; remains of a crash count as used space until they can be removed
    ROOT/lock                 held by the one daemon that owns the store
    *.damaged                 unreadable files, and files in the place of others: set aside, never deleted

A crash at any moment leaves the old state or the new one: a checkpoint without a model is garbage for `collect`, and a
model never names an incomplete checkpoint. After an error, memory has the state that a restart would find. If the disk
did not confirm a change, a power failure may bring the old record back, so checkpoints that it names are kept.

Readers never wait for the disk: every change holds the mutex, and replaces the state that readers see as a whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from flashd.checkpoint.files import WEIGHTS, Checkpoint
from flashd.checkpoint.gguf.traits import SIDE_FILE as GGUF
from flashd.checkpoint.gguf.traits import Traits
from flashd.checkpoint.manifest import Manifest, context_length_of, read_config
from flashd.closing import Closing
from flashd.durable import (
    Unconfirmed,
    discard,
    exchange,
    put_aside,
    read_bytes,
    set_aside,
    sync_directory,
    total_bytes,
    writing,
)
from flashd.errors import (
    AlreadyExists,
    Busy,
    CorruptCheckpoint,
    FlashdError,
    InvalidArgument,
    InvalidSource,
    NotFound,
    StoreFull,
    TransferFailed,
)
from flashd.store import footprint, lineage, lookup
from flashd.store.footprint import Footprint
from flashd.store.images import Images
from flashd.store.names import check_name
from flashd.store.records import CHECKPOINT_ID, MOST_ALIASES, Model, Origin, Records
from flashd.units import MiB, format_bytes

__all__ = ["Catalog", "Collected", "Draft", "Model", "Origin", "versions_to_keep"]

log = logging.getLogger(__name__)

_RESERVE_BYTES = 64 * MiB  # left free on the file system, because a full one affects the whole machine
_OURS_ALONE = 0o700  # because some models are private; other users lease the models that they may see


@dataclass(frozen=True, slots=True)
class Collected:
    """Deleted checkpoints and images, and the error that kept others from being deleted, if any."""

    checkpoint_ids: tuple[str, ...]
    freed_bytes: int
    failure: FlashdError | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """A checkpoint being made: fill `directory`, then call `publish`. Otherwise it is removed."""

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
        """Publishes the checkpoint as model `name`, or as its new version.

        Without `private`, a new version is as private as the old one. Raises AlreadyExists, without any change, if the
        model exists and may not be replaced (only its owner may do so), or if an alias is taken.
        """
        return self._publish(self.directory, name, manifest, origin, aliases, replace, owner_uid, private)


class Catalog(Closing):
    """The store. Safe for use from several threads, but by one process at a time; raises Busy otherwise."""

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
        self._drafts: Mapping[Path, int] = {}  # with the bytes that each has reserved
        self._read: list[str] = []  # checkpoints being read to make others
        self._unconfirmed: frozenset[str] = frozenset()  # checkpoints in records that a power failure may bring back
        with _opening(root):
            if root.exists() and not root.is_dir():  # a dangling link is kept, because its target may come back
                _set_aside(root, "folder")
            root.mkdir(parents=True, exist_ok=True)
            self._place = root.stat()
            self._lock = _take_lock(root)
        try:
            with _opening(root):
                for folder in (self._checkpoints, root / "models", root / "images", self._partial):
                    _make_folder(folder)
                self._clean_leftovers()
                self._stored: Mapping[str, Footprint] = self._measure_all()
                self._models: Mapping[str, Model] = self._records.read(self._stored)
                # An unreadable record may have named any of the checkpoints that no other record names.
                named = {version for model in self._models.values() for version in model.versions()}
                self._guarded = frozenset(self._stored.keys() - named if self.damaged() else ())
                self.images = Images(root / "images")
        except BaseException:
            self.close()
            raise

    def models(self) -> list[Model]:
        """Lists the models by name."""
        return [model for _, model in sorted(self._models.items())]

    def get(self, name: str) -> Model | None:
        """Returns the model with exactly this name, or None."""
        return self._models.get(name)

    def resolve(self, text: str, is_seen: Callable[[Model], bool] = lambda model: True) -> Model:
        """Returns the model that a user means, among those that the user may see.

        Raises NotFound, with similar names, or InvalidArgument if several models match.
        """
        return lookup.find({name: model for name, model in self._models.items() if is_seen(model)}, text)

    def checkpoint(self, checkpoint_id: str) -> Checkpoint:
        """Opens a checkpoint. Raises CorruptCheckpoint if it cannot be opened, or if its folder has other contents."""
        try:
            return Checkpoint.open(self._checkpoints / checkpoint_id).at_its_address()
        except CorruptCheckpoint:
            self.check_there()
            raise

    def damaged(self) -> list[Path]:
        """Lists files that were set aside, until an administrator repairs or removes them."""
        return [*put_aside(self.root), *self._records.damaged()]

    def check_there(self) -> None:
        """Checks that the store's file system is mounted. Raises TransferFailed."""
        hint = "mount it again, then check with flash status"
        try:
            place = self.root.stat()
        except OSError as error:
            raise TransferFailed(f"the store {self.root} is missing: {error.strerror}", hint=hint) from None
        if not os.path.samestat(place, self._place):
            what = f"the store {self.root} is missing: another file system or folder is in its place"
            raise TransferFailed(what, hint=hint)

    def check_usable(self) -> None:
        """Checks that the store's file system is mounted and writable. Raises TransferFailed."""
        self.check_there()
        if os.statvfs(self.root).f_flag & os.ST_RDONLY:
            what = f"the store {self.root} cannot be written to: its file system is mounted read-only"
            raise TransferFailed(what, hint="remount it for writing; until then its models can still be used")

    def forms(self, checkpoint_id: str) -> tuple[str, ...]:
        """Returns the ids of a checkpoint and its images: all forms in which it may be in memory."""
        return (checkpoint_id, *(key for key, made_of in self.images.made_of().items() if made_of == checkpoint_id))

    def checkpoint_of(self, form: str) -> str:
        """Returns the id of the checkpoint that this is, or of which this is an image."""
        return self.images.made_of().get(form, form)

    def is_pinned(self, form: str) -> bool:
        """Tells whether this is the checkpoint of a pinned model, or an image of one."""
        checkpoint_id = self.checkpoint_of(form)
        return any(model.pinned and model.checkpoint_id == checkpoint_id for model in self.models())

    @contextlib.contextmanager
    def reading(self, checkpoint_id: str) -> Iterator[Checkpoint]:
        """Opens a checkpoint and protects it from deletion in the block. Raises CorruptCheckpoint if that fails."""
        with self._mutex:
            self._read.append(checkpoint_id)
        try:
            yield self.checkpoint(checkpoint_id)
        finally:
            with self._mutex:
                self._read.remove(checkpoint_id)

    def find_base(self, recorded: str, *, of: str, owner_uid: int) -> Model:
        """Returns the base that the adapter `of` names, among the models that its owner may see.

        Raises BaseMissing or InvalidSource.
        """
        seen = {name: m for name, m in self._models.items() if not m.private or m.owner_uid == owner_uid}
        return lineage.find_base(seen, recorded, of=of)

    def size_bytes(self) -> int:
        """Returns the disk space of all checkpoints, with hard links counted once."""
        return footprint.total_bytes(self._stored.values())

    def free_bytes(self) -> int:
        """Returns the bytes that quota and file system leave for another draft, in addition to the current ones."""
        try:
            status = os.statvfs(self.root)
            partial = list(self._partial.iterdir())
        except OSError:  # `check_usable` reports the error
            return 0
        on_disk_bytes = status.f_bavail * status.f_frsize - _RESERVE_BYTES
        drafts = self._drafts
        written_bytes = {path: total_bytes(path) for path in partial}  # leftovers take space too
        to_come_bytes = sum(max(0, need_bytes - written_bytes.get(path, 0)) for path, need_bytes in drafts.items())
        free_bytes = on_disk_bytes - to_come_bytes
        if self.quota_bytes:
            stored_bytes = self.size_bytes() + self.images.size_bytes()
            in_quota_bytes = self.quota_bytes - stored_bytes - sum(written_bytes.values()) - to_come_bytes
            free_bytes = min(free_bytes, in_quota_bytes)
        return max(0, free_bytes)

    @contextlib.contextmanager
    def draft(self, need_bytes: int) -> Iterator[Draft]:
        """Provides a directory for a checkpoint of about `need_bytes`. Raises StoreFull before anything is written."""
        with self._mutex:
            self.check_usable()
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
            discard(directory)

    def check_free(self, name: str, *, replace: bool, owner_uid: int) -> str:
        """Returns the normal form of a name for a new model of this user.

        Raises AlreadyExists if the name is taken by a model that may not be replaced: another user's never may.
        """
        name = check_name(name)
        old = self._models.get(name)
        if old is not None and old.owner_uid != owner_uid:
            raise AlreadyExists(f"another user has a model {name!r}", hint="choose another name, such as YOU/NAME")
        if old is not None and not replace:
            raise AlreadyExists(f"there is a model {name!r}", hint="choose another name, or permit replacing it")
        for model in self._models.values():
            if name in model.aliases and model.name != name:
                raise AlreadyExists(f"{name!r} is an alias of {_called(model)}", hint="choose another name")
        return name

    def set_aliases(self, name: str, aliases: Sequence[str]) -> Model:
        """Replaces the aliases. Raises AlreadyExists if one of them means another model."""
        with self._mutex:
            return self._update(name, aliases=self._free_aliases(name, aliases))

    def set_pinned(self, name: str, pinned: bool) -> Model:
        return self._update(name, pinned=pinned)

    def set_private(self, name: str, private: bool) -> Model:
        with self._mutex:
            return self._update(name, private=private)

    def touch(self, name: str, *, swapped: bool = False) -> Model:
        """Records that the model was used now."""
        with self._mutex:
            model = self._existing(name)
            return self._update(name, last_used_at=self._clock(), use_count=model.use_count + swapped)

    def remove(self, name: str) -> None:
        """Removes the model. Its checkpoint stays until `collect`, because it may be in use.

        Raises NotFound or TransferFailed. After TransferFailed, check with `get`: the model may be removed, but without
        the disk's confirmation.
        """
        with self._mutex:
            old = self._existing(name)
            others = {other: model for other, model in self._models.items() if other != name}
            self._change(old, lambda: self._records.remove(name), others)

    def collect(self, in_use: Collection[str]) -> Collected:
        """Deletes checkpoints that are neither a model's, nor a kept version, nor `in_use`, and leftovers of faults.

        Works on a full disk: first data is deleted, then the records that list it are rewritten. Raises TransferFailed
        if the store is unusable; a failure with one checkpoint does not affect the others.
        """
        with self._mutex:
            self.check_usable()
            self._confirm()
            if self._guarded and not self.damaged():
                self._guarded = frozenset()
            kept = [self._with_kept_versions(model, in_use) for model in self._models.values()]
            needed = {version for model in kept for version in model.versions()}
            garbage = sorted(self._stored.keys() - needed.union(self._guarded, self._unconfirmed, in_use, self._read))
            before_bytes = self.size_bytes()
            failure = self._take_away(garbage)
            gone = [checkpoint_id for checkpoint_id in garbage if checkpoint_id not in self._stored]
            gone += self.images.keep_only(self._stored.keys())
            freed_bytes = before_bytes - self.size_bytes()
            self._models = {name: self._with_stored_versions(model) for name, model in self._models.items()}
        failure = self._sweep() or failure
        for model in kept:
            self._tidy(model.name, in_use)
        return Collected(tuple(gone), freed_bytes, failure)

    def close(self) -> None:
        self._lock.close()

    def _clean_leftovers(self) -> None:
        for leftover in self._partial.iterdir():
            if not discard(leftover):
                log.warning("%s cannot be removed, and counts as used space until it can", leftover)

    def _sweep(self) -> FlashdError | None:
        """Removes deleted checkpoints and leftover drafts from `partial`."""
        with self._mutex:
            try:
                with writing(self._partial):
                    doomed = [path for path in self._partial.iterdir() if path not in self._drafts]
                    if doomed:  # otherwise a power failure could leave half a checkpoint at its address
                        sync_directory(self._checkpoints)
            except FlashdError as error:
                return error
        for path in doomed:
            if not discard(path):
                return TransferFailed(f"{path} cannot be removed", hint="flashd tries again later")
        with self._mutex:  # a record that another thread is writing is no leftover
            self._records.tidy()
        return None

    def _confirm(self) -> None:
        if self._unconfirmed:
            try:
                self._records.confirm()
                self._unconfirmed = frozenset()
            except Unconfirmed as error:
                log.warning("the disk has not confirmed a change of the store yet: %s", error.strerror)

    def _measure_all(self) -> Mapping[str, Footprint]:
        """Measures all checkpoints. Other files in the folder are not ours and are left alone."""
        with os.scandir(self._checkpoints) as entries:
            names = [e.name for e in entries if e.is_dir(follow_symlinks=False) and _is_id(e.name)]
        return {name: footprint.measure(self._checkpoints / name) for name in names}

    def _check_room(self, need_bytes: int) -> None:
        free_bytes = self.free_bytes()
        if need_bytes > free_bytes:
            self.images.make_room(need_bytes - free_bytes)  # images can be made again
            free_bytes = self.free_bytes()
        if need_bytes > free_bytes:
            quota = f" (quota {format_bytes(self.quota_bytes)})" if self.quota_bytes else ""
            raise StoreFull(
                f"the store needs {format_bytes(need_bytes)}, but has only {format_bytes(free_bytes)} left{quota}",
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
                context_length=_context_length(directory),
                is_gguf=GGUF in manifest.side_files,
            )
            self.check_usable()
            with writing(self._checkpoints):
                self._adopt(directory, manifest)
            return self._record(old, model)

    def _adopt(self, directory: Path, manifest: Manifest) -> None:
        """Moves a finished directory to its address. Weights that are already stored are not stored twice.

        The new copy is the one that is kept, because it is known to be intact: so converting a source again repairs
        damage by the disk.
        """
        target = self._checkpoints / manifest.id
        twins = [twin for twin in self._with_weights_of(manifest) if twin != manifest.id]
        try:
            for twin in twins:
                _share_weights(directory, self._checkpoints / twin)
            if not os.path.lexists(target):
                directory.rename(target)
            elif not exchange(directory, target):
                for file in directory.iterdir():
                    file.replace(target / file.name)
            sync_directory(target)
            sync_directory(self._checkpoints)
        finally:  # a checkpoint at its address counts, even if a later step failed
            there = [i for i in (*twins, manifest.id) if (self._checkpoints / i).is_dir()]
            self._stored = {**self._stored, **{i: footprint.measure(self._checkpoints / i) for i in there}}

    def _with_weights_of(self, manifest: Manifest) -> Iterator[str]:
        """Yields checkpoints with the same weights. Of a thousand manifests, only those of this size are read."""
        size_bytes = manifest.data_offset + manifest.data_bytes
        for checkpoint_id, stored in self._stored.items():
            if stored.weights_bytes == size_bytes:
                with contextlib.suppress(CorruptCheckpoint):
                    if self.checkpoint(checkpoint_id).manifest.weights == manifest.weights:
                        yield checkpoint_id

    def _with_kept_versions(self, model: Model, in_use: Collection[str]) -> Model:
        kept = versions_to_keep(model.previous, self._keep_versions, in_use)
        return model if kept == model.previous else replace(model, previous=kept)

    def _with_stored_versions(self, model: Model) -> Model:
        """Returns the record as a restart would read it."""
        return replace(model, previous=tuple(version for version in model.previous if version in self._stored))

    def _take_away(self, checkpoint_ids: Sequence[str]) -> FlashdError | None:
        """Moves each checkpoint away by one rename, so that half a checkpoint is never at an address."""
        failure = None
        for checkpoint_id in checkpoint_ids:
            try:
                with writing(self._checkpoints), contextlib.suppress(FileNotFoundError):
                    doomed = self._partial / f"deleted-{checkpoint_id}-{secrets.token_hex(4)}"
                    (self._checkpoints / checkpoint_id).rename(doomed)
            except FlashdError as error:
                failure = error
            else:
                self._stored = {i: stored for i, stored in self._stored.items() if i != checkpoint_id}
        return failure

    def _tidy(self, name: str, in_use: Collection[str]) -> None:
        """Removes versions that are no longer kept from a record. If that fails, the next collection tries again."""
        with self._mutex:
            model = self._models.get(name)
            if model is None or (kept := self._with_kept_versions(model, in_use)) == model:
                return
            try:
                self._record(model, kept)
            except FlashdError as error:
                log.warning("the record of %s still lists deleted versions: %s", name, error)

    def _free_aliases(self, name: str, aliases: Sequence[str]) -> tuple[str, ...]:
        checked = tuple(dict.fromkeys(check_name(alias) for alias in aliases))
        if len(checked) > MOST_ALIASES:
            raise InvalidArgument(
                f"{len(checked)} aliases are too many", hint=f"a model may have at most {MOST_ALIASES}"
            )
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
            old = self._existing(name)
            return self._record(old, replace(old, **changes))

    def _record(self, old: Model | None, new: Model) -> Model:
        self._change(old, lambda: self._records.write(new), {**self._models, new.name: new})
        return new

    def _change(self, old: Model | None, write: Callable[[], None], after: Mapping[str, Model]) -> None:
        """Changes a record on disk, then the state that readers see, which is always the one a restart would read."""
        self.check_usable()
        with writing(self.root / "models"):
            try:
                write()
            except Unconfirmed:
                self._unconfirmed |= frozenset(old.versions() if old else ())
                self._models = after
                raise
            self._unconfirmed = frozenset()
            self._models = after


def _make_folder(folder: Path) -> None:
    """Creates a private folder of the store. A file in its place is set aside."""
    if os.path.lexists(folder) and not folder.is_dir():
        _set_aside(folder, "folder")
    folder.mkdir(exist_ok=True)
    if stat.S_IMODE(folder.stat().st_mode) != _OURS_ALONE:
        folder.chmod(_OURS_ALONE)


def _set_aside(path: Path, kind: str) -> None:
    log.error("%s is not a %s, so it was renamed to %s", path, kind, set_aside(path))


def _take_lock(root: Path) -> IO[str]:
    path = root / "lock"
    if os.path.lexists(path) and not (path.is_file() and not path.is_symlink()):
        _set_aside(path, "file")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)  # models can still be used
    lock = os.fdopen(fd)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        hint = "see flash status, or give this daemon another --state-dir"
        raise Busy(f"another flashd owns the store {root}", hint=hint) from None
    return lock


@contextlib.contextmanager
def _opening(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"the store {root} cannot be used: {error.filename or root}: {error.strerror}"
        raise TransferFailed(what, hint="check owner and permissions, or set store.path to another folder") from None


def versions_to_keep(previous: Sequence[str], keep: int, in_use: Collection[str]) -> tuple[str, ...]:
    """Returns the newest `keep` of a model's older versions (given newest first), and all that are in use."""
    return tuple(version for age, version in enumerate(previous) if age < keep or version in in_use)


def _called(model: Model) -> str:
    """Returns the words for a model in the error about a taken name."""
    return "a private model" if model.private else repr(model.name)


def _is_id(name: str) -> bool:
    return CHECKPOINT_ID.fullmatch(name) is not None


def _share_weights(directory: Path, twin: Path) -> None:
    """Replaces the weights of both with hard links to one file, if the file system supports that."""
    link = directory / f"{WEIGHTS}.shared"
    try:
        os.link(directory / WEIGHTS, link)
        link.replace(twin / WEIGHTS)
    except OSError as error:
        log.info("%s keeps a separate copy of weights that were already stored: %s", directory.name, error.strerror)
        discard(link)


def _context_length(directory: Path) -> int:
    """That of the model in a checkpoint's folder; 0 if it is unknown."""
    with contextlib.suppress(FileNotFoundError, InvalidSource):
        return Traits.from_json(read_bytes(directory / GGUF)).context_length
    with contextlib.suppress(FileNotFoundError, InvalidSource):  # a checkpoint need not have one
        return context_length_of(read_config(read_bytes(directory / "config.json")))
    return 0


def _as_text(path: str) -> str:
    """Converts a path for a record. Its bytes need not be UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode()
