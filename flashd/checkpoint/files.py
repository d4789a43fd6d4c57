# SPDX-License-Identifier: Apache-2.0
"""What lies in the folder of a checkpoint, and how is it opened, handed on and verified?"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flashd.checkpoint import header as headers
from flashd.checkpoint import manifest as manifests
from flashd.checkpoint.header import Header
from flashd.checkpoint.manifest import Manifest
from flashd.errors import Cancelled, CorruptCheckpoint, InvalidSource, StoreFull, TransferFailed
from flashd.streamer import Digests, Extent, OpenFile, Options, Transfer, TransferResult, blake3
from flashd.streamer import verify as verify_blocks

WEIGHTS = "model.safetensors"
DIGESTS = "digests.b3"
MANIFEST = "manifest.toml"
_POLL_S = 0.05
_AGAIN = "the disk or its driver changed it: remove the model and convert its source again"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder in the store, and its manifest."""

    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Reads the manifest, nothing else. Raises CorruptCheckpoint."""
        try:
            return cls(directory, Manifest.read(directory / MANIFEST))
        except (OSError, UnicodeDecodeError) as error:
            hint = "remove the model and convert it again"
            raise CorruptCheckpoint(f"{directory} has no readable manifest: {error}", hint=hint) from None

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def weights_path(self) -> Path:
        return self.directory / WEIGHTS

    @property
    def extent(self) -> Extent:
        """The data region of the weights: what becomes the arena."""
        return Extent(self.manifest.data_offset, self.manifest.data_bytes)

    def side_files(self) -> Mapping[str, Path]:
        return {name: self.directory / name for name in self.manifest.side_files}

    def header(self) -> Header:
        """Raises CorruptCheckpoint if it is not the header that was written, or the file not as long as it says."""
        return _header(self.weights_path, self.manifest.data_offset, self.manifest.header_digest)

    def layout_json(self) -> str:
        """Of those asked for last from memory, since every swap and lease needs one. Raises CorruptCheckpoint."""
        return _layout_json(self.weights_path, self.manifest.data_offset, self.manifest.header_digest)

    def digests(self) -> Digests:
        """Raises CorruptCheckpoint if the table is not the one that was written."""
        path = self.directory / DIGESTS
        table = _read(path)
        if blake3(table).hex() != self.manifest.digests_digest:
            raise CorruptCheckpoint(f"{path} does not match its digest", hint=_AGAIN)
        return Digests(self.manifest.digest_block_bytes, table)


def _header(path: Path, size_bytes: int, digest: str) -> Header:
    try:
        with path.open("rb") as file:
            raw = file.read(size_bytes)
            if blake3(raw).hex() != digest:
                raise CorruptCheckpoint(f"the header of {path} does not match its digest", hint=_AGAIN)
            return headers.read(file.fileno(), str(path))
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: {error.strerror}", hint=_AGAIN) from None
    except InvalidSource as error:
        raise CorruptCheckpoint(error.message, hint=_AGAIN) from None


@functools.lru_cache(maxsize=64)
def _layout_json(path: Path, size_bytes: int, digest: str) -> str:
    return headers.as_json(_header(path, size_bytes, digest))


def verify(
    checkpoint: Checkpoint,
    *,
    options: Options = Options(depth=4),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Reads all of a checkpoint and compares it with its digests. Raises CorruptCheckpoint, naming file and block."""
    manifest = checkpoint.manifest
    for name, digest in manifest.side_files.items():
        if blake3(_read(checkpoint.directory / name)).hex() != digest:
            raise CorruptCheckpoint(f"{checkpoint.directory / name} does not match its digest", hint=_AGAIN)
    checkpoint.header()
    digests = checkpoint.digests()
    weights = manifests.weights_id(bytes.fromhex(manifest.header_digest), digests.table)
    if weights != manifest.weights or manifests.checkpoint_id(weights, manifest.side_files) != manifest.id:
        raise CorruptCheckpoint(f"{checkpoint.directory / MANIFEST} does not fit what it describes", hint=_AGAIN)
    if not manifest.data_bytes:
        return
    with checkpoint.weights_path.open("rb") as file:
        opened = OpenFile(file.fileno(), str(checkpoint.weights_path))
        finish(verify_blocks(opened, checkpoint.extent, digests, options=options), on_progress, cancelled)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: {error.strerror}", hint=_AGAIN) from None


def finish(
    transfer: Transfer, on_progress: Callable[[int, int], None], cancelled: Callable[[], bool]
) -> TransferResult:
    """Waits for a transfer, telling how far it is and asking whether to go on, twenty times a second."""
    with transfer:
        while True:
            on_progress(transfer.done_bytes, transfer.total_bytes)
            if cancelled():
                raise Cancelled("somebody cancelled it")
            try:
                result = transfer.wait(_POLL_S)
            except TimeoutError:
                continue
            on_progress(transfer.total_bytes, transfer.total_bytes)
            return result


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """What the system refuses while a directory is filled, in our words: StoreFull or TransferFailed."""
    try:
        yield
    except OSError as error:
        what = f"write {error.filename or directory}: {error.strerror}"
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise StoreFull(what, hint="free some space, or remove a model") from None
        raise TransferFailed(what) from None


def write_new(path: Path, content: bytes) -> None:
    """A new file with this content, on the disk when this returns."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """The names in it are on the disk when this returns."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
