# SPDX-License-Identifier: Apache-2.0
"""Which images do we have? A cache of what engines made of checkpoints; whatever is lost is made again.

    ROOT/KEY/            in the form of a checkpoint (flashd/checkpoint/files.py); immutable
    ROOT/KEY.partial/    being written, or being deleted; removed at the next start

An image is known as soon as an engine has made it, in memory; it is written behind the user's back, and until then it
is lost with the last arena that has it. Its key says all that its layout and bytes depend on: a wrong one is never
found.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flashd.checkpoint import header as headers
from flashd.checkpoint import manifest as manifests
from flashd.checkpoint.convert import DIGEST_BLOCK_BYTES
from flashd.checkpoint.files import DIGESTS, MANIFEST, WEIGHTS, Checkpoint, write_new, writing
from flashd.checkpoint.layout import layout_digest
from flashd.checkpoint.manifest import Manifest
from flashd.errors import CorruptCheckpoint, InvalidArgument
from flashd.store import footprint
from flashd.store.records import sync_directory
from flashd.streamer import OpenFile, blake3

_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ImageDraft:
    """`file` has the header, and is to be filled from there on; `publish`, which blocks, takes its blocks' digests."""

    file: OpenFile
    publish: Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class _Stored:
    """An image on disk: of which checkpoint, what it takes, and when it was used last."""

    made_of: str
    size_bytes: int
    used_at: float


class Images:
    """Safe for use from several threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._mutex = threading.RLock()
        self._layouts: dict[str, str] = {}  # as JSON, of those that were made since we started
        self._unsaved: dict[str, Checkpoint] = {}
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob("*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._stored = {path.name: _measured(path) for path in root.iterdir() if _KEY.fullmatch(path.name)}

    def get(self, key: str) -> Checkpoint | None:
        """What an engine made, or what is stored. It counts as used now."""
        with self._mutex:
            if key in self._stored:
                try:
                    image = Checkpoint.open(self._root / key)
                    if image.id != key:
                        raise CorruptCheckpoint(f"{image.directory} is of another image")
                except CorruptCheckpoint:
                    self.drop(key)
                    return None
                self._stored[key] = replace(self._stored[key], used_at=time.time())
                with contextlib.suppress(OSError):
                    os.utime(image.directory / MANIFEST)
                return image
            return self._unsaved.get(key)

    def is_stored(self, key: str) -> bool:
        return key in self._stored

    def layout_json(self, image: Checkpoint) -> str:
        """Raises CorruptCheckpoint."""
        return self._layouts.get(image.id) or image.layout_json()

    def describe(self, key: str, layout: str, data_bytes: int, made_of: str) -> Checkpoint:
        """An image that an engine says it has made of a checkpoint. Raises InvalidArgument or
        InvalidSource if that makes no sense."""
        if not _KEY.fullmatch(key):
            raise InvalidArgument(f"{key!r} is no image's key")
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
        return image

    @contextlib.contextmanager
    def draft(self, image: Checkpoint) -> Iterator[ImageDraft]:
        """A file for the data of one that was described. Raises StoreFull or TransferFailed; what is not published is
        gone afterwards."""
        partial = self._root / f"{image.id}.partial"
        shutil.rmtree(partial, ignore_errors=True)
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
            shutil.rmtree(partial, ignore_errors=True)

    def drop(self, key: str) -> None:
        """It is not what it should be, or not needed any more. Whoever has it open keeps it."""
        with self._mutex:
            self._layouts.pop(key, None)
            self._unsaved.pop(key, None)
            if self._stored.pop(key, None) is None:
                return
            doomed = self._root / f"{key}.partial"
            shutil.rmtree(doomed, ignore_errors=True)
            with contextlib.suppress(OSError):
                (self._root / key).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def size_bytes(self) -> int:
        """What all of them take on disk."""
        return sum(stored.size_bytes for stored in self._stored.values())

    def make_room(self, need_bytes: int) -> None:
        """Deletes those used longest ago until so much is gone, or all are."""
        freed_bytes = 0
        for key, stored in sorted(self._stored.items(), key=lambda item: item[1].used_at):
            if freed_bytes >= need_bytes:
                break
            self.drop(key)
            freed_bytes += stored.size_bytes

    def keep_only(self, checkpoint_ids: Collection[str]) -> list[str]:
        """Forgets those of checkpoints that are gone; returns which."""
        doomed = [key for key, checkpoint_id in self.made_of().items() if checkpoint_id not in checkpoint_ids]
        for key in doomed:
            self.drop(key)
        return doomed

    def made_of(self) -> Mapping[str, str]:
        """The checkpoint of each, by key."""
        with self._mutex:
            made_of = {key: stored.made_of for key, stored in self._stored.items()}
            return made_of | {key: image.manifest.source for key, image in self._unsaved.items()}

    def _publish(self, image: Checkpoint, partial: Path, table: bytes) -> None:
        with writing(partial):
            write_new(partial / DIGESTS, table)
            weights = manifests.weights_id(bytes.fromhex(image.manifest.header_digest), table)
            manifest = replace(image.manifest, weights=weights, digests_digest=blake3(table).hex())
            write_new(partial / MANIFEST, manifest.to_toml().encode())
            sync_directory(partial)
            with self._mutex:
                if image.id not in self._unsaved:
                    return  # its checkpoint was removed meanwhile, and so was it
                partial.rename(self._root / image.id)
                self._stored[image.id] = _measured(self._root / image.id)
                del self._unsaved[image.id]
            sync_directory(self._root)


def _measured(directory: Path) -> _Stored:
    """One that cannot be read is found out when it is asked for."""
    size_bytes = footprint.total_bytes([footprint.measure(directory)])
    with contextlib.suppress(CorruptCheckpoint, OSError):
        used_at = (directory / MANIFEST).stat().st_mtime
        return _Stored(Checkpoint.open(directory).manifest.source, size_bytes, used_at)
    return _Stored("", size_bytes, 0.0)
