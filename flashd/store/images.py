# SPDX-License-Identifier: Apache-2.0
"""The images in the store: a cache of engines' images of checkpoints, which can be made again.

    ROOT/KEY/                  an image in the format of a checkpoint (flashd/checkpoint/files.py); immutable
    ROOT/KEY-RANDOM.partial/   an image being written or deleted; removed at the next start

An image is known as soon as an engine has made it in memory. It is written in the background; until then it is lost
with the last arena that holds it. The key is a digest over everything that its layout and bytes depend on, so that a
wrong image is never found. One that only the engine which made it can map has the name of that engine beside it, and is
removed with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flashd.checkpoint import header as headers
from flashd.checkpoint import manifest as manifests
from flashd.checkpoint.files import DIGESTS, MANIFEST, WEIGHTS, Checkpoint
from flashd.checkpoint.layout import layout_digest
from flashd.checkpoint.manifest import Manifest
from flashd.checkpoint.writing import DIGEST_BLOCK_BYTES
from flashd.durable import discard, leftovers, sync_directory, total_bytes, write_new, writing
from flashd.errors import CorruptCheckpoint, InvalidArgument
from flashd.io.streamer import OpenFile, blake3
from flashd.store import footprint

log = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{64}")
_MAKER = "engine"  # file with the name of the only engine that can map an image
_LONGEST_MAKER = 64  # bytes


@dataclass(frozen=True, slots=True)
class ImageDraft:
    """An image being written. `file` contains the header, and has to be filled from its end on.

    `publish`, which blocks, takes the digests of the blocks.
    """

    file: OpenFile
    publish: Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class _Stored:
    """An image on disk: its checkpoint, its size and the time of its last use. `maker`: see Images.describe.

    An image that is not `usable` is damaged or no longer needed, but could not be removed yet.
    """

    made_of: str
    size_bytes: int
    used_at: float
    maker: str = ""
    usable: bool = True


class Images:
    """The images of the store. Safe for use from several threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._mutex = threading.RLock()
        self._layouts: dict[str, str] = {}  # as JSON, of images made since our start
        self._unsaved: dict[str, Checkpoint] = {}
        self._makers: dict[str, str] = {}  # of images made since our start that no other engine can map
        self._drafts: set[Path] = set()
        root.mkdir(parents=True, exist_ok=True)
        self._stored: dict[str, _Stored] = {}
        for path in root.iterdir():
            if path.suffix == ".partial" or (_KEY.fullmatch(path.name) and not path.is_dir()):
                discard(path)
            elif _KEY.fullmatch(path.name):
                self._stored[path.name] = _measured(path)

    def get(self, key: str) -> Checkpoint | None:
        """Returns an image, in memory or stored, and records that it was used now."""
        with self._mutex:
            if self.is_stored(key):
                try:
                    image = Checkpoint.open(self._root / key)
                    if image.id != key:
                        raise CorruptCheckpoint(f"{image.directory} contains another image")
                except CorruptCheckpoint as error:
                    log.warning("%s; the image is made again", error.message)
                    self.drop(key)
                    return None
                self._stored[key] = replace(self._stored[key], used_at=time.time())
                with contextlib.suppress(OSError):
                    os.utime(image.directory / MANIFEST)
                return image
            return self._unsaved.get(key)

    def is_stored(self, key: str) -> bool:
        stored = self._stored.get(key)
        return stored is not None and stored.usable

    def layout_json(self, image: Checkpoint) -> str:
        """Returns the layout as JSON. Raises CorruptCheckpoint."""
        return self._layouts.get(image.id) or image.layout_json()

    def describe(self, key: str, layout: str, data_bytes: int, made_of: str, *, maker: str = "") -> Checkpoint:
        """Describes an image that an engine has made of a checkpoint; `maker` names the engine if no other can map it.

        Raises InvalidArgument or InvalidSource for an invalid key or layout.
        """
        if not _KEY.fullmatch(key):
            raise InvalidArgument(f"{key!r} is not the key of an image")
        header = headers.parse(layout.encode(), data_bytes=data_bytes, path="the layout of an image")
        layout = headers.as_json(header)
        raw = headers.framed(layout)
        manifest = Manifest(
            id=key,
            weights="",
            header_digest=blake3(raw).hex(),
            digests_digest="",
            digest_block_bytes=DIGEST_BLOCK_BYTES,
            data_offset=len(raw),
            data_bytes=data_bytes,
            tensor_count=len(header.tensors),
            dtype=manifests.dominant_dtype(header),
            architecture="",
            architecture_key="",
            layout=layout_digest(header.tensors),
            quantization="",
            side_files={},
            created_at=time.time(),
            source=made_of,
        )
        image = Checkpoint(self._root / key, manifest)
        with self._mutex:
            self._layouts[key] = layout
            self._unsaved[key] = image
            if maker:
                self._makers[key] = maker
        return image

    @contextlib.contextmanager
    def draft(self, image: Checkpoint) -> Iterator[ImageDraft]:
        """Provides a file for the data of a described image, which is removed unless it is published.

        Raises StoreFull or TransferFailed.
        """
        partial = self._root / f"{image.id}-{secrets.token_hex(4)}.partial"  # never the name of a leftover
        self._drafts.add(partial)
        try:
            with writing(partial):
                partial.mkdir()
                write_new(partial / WEIGHTS, headers.framed(self._layouts[image.id]))
                fd = os.open(partial / WEIGHTS, os.O_RDWR | os.O_CLOEXEC)
            try:
                yield ImageDraft(
                    OpenFile(fd, str(partial / WEIGHTS)), lambda table: self._publish(image, partial, table)
                )
            finally:
                os.close(fd)
        finally:
            discard(partial)
            self._drafts.discard(partial)

    def drop(self, key: str) -> None:
        """Removes a damaged or no longer needed image; processes that have it open can still read it.

        If the disk refuses, the image is no longer found, but counts as used space until `tidy` has removed it.
        """
        with self._mutex:
            self._forget(key)
            self._remove(key)

    def drop_unless(self, is_there: Callable[[str], bool]) -> list[str]:
        """Removes images that only engines which are not there any more could map, and returns their keys."""
        with self._mutex:
            makers = {key: stored.maker for key, stored in self._stored.items()} | self._makers
            doomed = [key for key, maker in makers.items() if maker and not is_there(maker)]
            for key in doomed:
                self._forget(key)
            moved = [self._move_away(key) for key in doomed]
        for path in moved:  # without the mutex, because large files take long
            if path is not None:
                discard(path)
        return doomed

    def tidy(self) -> None:
        """Tries again to remove images that could not be removed before."""
        with self._mutex:
            for key in [key for key, stored in self._stored.items() if not stored.usable]:
                self._remove(key)
        for leftover in leftovers(self._root):
            if leftover not in self._drafts:
                discard(leftover)

    def size_bytes(self) -> int:
        """Returns the disk space of images, including those being written and those that could not be removed yet."""
        return self.leftover_bytes() + self.stored_bytes()

    def stored_bytes(self) -> int:
        """Returns the disk space of complete images, without asking the disk."""
        return sum(stored.size_bytes for stored in list(self._stored.values()))

    def leftover_bytes(self) -> int:
        """Returns the disk space of images that are being written or could not be removed yet."""
        return sum(total_bytes(path) for path in leftovers(self._root))

    def make_room(self, need_bytes: int) -> None:
        """Deletes images, those used longest ago first, until `need_bytes` are freed or none is left."""
        freed_bytes = 0
        for key, stored in sorted(self._stored.items(), key=lambda item: item[1].used_at):
            if freed_bytes >= need_bytes:
                break
            self.drop(key)
            freed_bytes += stored.size_bytes

    def keep_only(self, checkpoint_ids: Collection[str]) -> list[str]:
        """Removes the images of all other checkpoints, and returns their keys."""
        doomed = [key for key, checkpoint_id in self.made_of().items() if checkpoint_id not in checkpoint_ids]
        for key in doomed:
            self.drop(key)
        self.tidy()
        return doomed

    def made_of(self) -> Mapping[str, str]:
        """Returns the checkpoint of each image, by key."""
        with self._mutex:
            made_of = {key: stored.made_of for key, stored in self._stored.items() if stored.usable}
            return made_of | {key: image.manifest.source for key, image in self._unsaved.items()}

    def _forget(self, key: str) -> None:
        self._layouts.pop(key, None)
        self._unsaved.pop(key, None)
        self._makers.pop(key, None)

    def _remove(self, key: str) -> None:
        if (moved := self._move_away(key)) is not None:
            discard(moved)

    def _move_away(self, key: str) -> Path | None:
        """Moves an image away by one rename, so that half an image is never found. Returns what is to be removed."""
        if key not in self._stored:
            return None
        doomed = self._root / f"{key}-{secrets.token_hex(4)}.partial"
        try:
            with contextlib.suppress(FileNotFoundError):
                (self._root / key).rename(doomed)
        except OSError as error:
            log.warning("the image %s cannot be removed: %s", key[:12], error.strerror)
            self._stored[key] = replace(self._stored[key], usable=False)
            return None
        del self._stored[key]
        return doomed

    def _publish(self, image: Checkpoint, partial: Path, table: bytes) -> None:
        with writing(partial):
            write_new(partial / DIGESTS, table)
            digests_digest = blake3(table).hex()
            weights = manifests.weights_id(image.manifest.header_digest, digests_digest)
            manifest = replace(image.manifest, weights=weights, digests_digest=digests_digest)
            write_new(partial / MANIFEST, manifest.to_toml().encode())
            if maker := self._makers.get(image.id, ""):
                write_new(partial / _MAKER, maker.encode())
            sync_directory(partial)
            with self._mutex:
                if image.id not in self._unsaved:
                    return  # the image was removed with its checkpoint meanwhile
                self._remove(image.id)  # a damaged image
                partial.rename(self._root / image.id)
                self._stored[image.id] = _measured(self._root / image.id)
                del self._unsaved[image.id]
            sync_directory(self._root)


def _measured(directory: Path) -> _Stored:
    """Measures an image. Damage is detected when the image is opened."""
    size_bytes = footprint.total_bytes([footprint.measure(directory)])
    with contextlib.suppress(CorruptCheckpoint, OSError):
        used_at = (directory / MANIFEST).stat().st_mtime
        return _Stored(Checkpoint.open(directory).manifest.source, size_bytes, used_at, _maker(directory))
    return _Stored("", size_bytes, 0.0)


def _maker(directory: Path) -> str:
    """Reads the name of the only engine that can map an image; empty if there is no such limit."""
    try:
        with (directory / _MAKER).open("rb") as file:
            return file.read(_LONGEST_MAKER).decode(errors="replace")
    except FileNotFoundError:
        return ""
