# SPDX-License-Identifier: Apache-2.0
"""Opens and verifies the files of a checkpoint."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flashd import durable
from flashd.checkpoint import header as headers
from flashd.checkpoint.header import Header
from flashd.checkpoint.manifest import Manifest
from flashd.errors import Cancelled, CorruptCheckpoint, InvalidSource
from flashd.io.streamer import Digests, Extent, OpenFile, Options, Transfer, TransferResult, blake3
from flashd.io.streamer import verify as verify_blocks
from flashd.units import MiB

WEIGHTS = "model.safetensors"
DIGESTS = "digests.b3"
MANIFEST = "manifest.toml"
_POLL_S = 0.05
_MOST_BYTES = 64 * MiB  # of a side file (flashd/checkpoint/source/reader.py), and of the digests of 16 TiB
_AGAIN = "it was damaged on the disk: remove the model and convert its source again"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint: its folder and its manifest."""

    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Opens a checkpoint and reads only its manifest. Raises CorruptCheckpoint."""
        try:
            return cls(directory, Manifest.read(directory / MANIFEST))
        except (OSError, ValueError) as error:
            hint = "remove the model and convert it again"
            raise CorruptCheckpoint(f"{directory} has no readable manifest: {error}", hint=hint) from None

    def at_its_address(self) -> Checkpoint:
        """Returns this checkpoint if its folder has the name of its id. Raises CorruptCheckpoint.

        The id is computed from the digests, so an exchanged folder or manifest is detected before its digests are used.
        """
        if self.directory.name != self.id or not self.manifest.is_of_its_content():
            raise CorruptCheckpoint(f"{self.directory} contains another checkpoint than its name says", hint=_AGAIN)
        return self

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def weights_path(self) -> Path:
        return self.directory / WEIGHTS

    @property
    def extent(self) -> Extent:
        """The data region of the weights, which becomes the arena."""
        return Extent(self.manifest.data_offset, self.manifest.data_bytes)

    @contextlib.contextmanager
    def open_weights(self) -> Iterator[OpenFile]:
        """Opens the file of the weights for reading. Raises CorruptCheckpoint."""
        with _open(self.weights_path) as file:
            yield OpenFile(file.fileno(), str(self.weights_path))

    def side_files(self) -> Mapping[str, Path]:
        return {name: self.directory / name for name in self.manifest.side_files}

    def header(self) -> Header:
        """Reads the header. Raises CorruptCheckpoint if it was changed, or if the file does not have the right size."""
        manifest = self.manifest
        return _header(self.weights_path, manifest.data_offset, manifest.data_bytes, manifest.header_digest)

    def layout_json(self) -> str:
        """Returns the layout, which every swap and lease needs, from a cache if possible. Raises CorruptCheckpoint."""
        manifest = self.manifest
        return _layout_json(self.weights_path, manifest.data_offset, manifest.data_bytes, manifest.header_digest)

    def check_side_files(self) -> None:
        """Compares the side files with their digests. Unchanged files are read only once. Raises CorruptCheckpoint."""
        for name, digest in self.manifest.side_files.items():
            path = self.directory / name
            try:
                status = path.lstat()
            except OSError as error:
                raise CorruptCheckpoint(f"{path}: {error.strerror}", hint=_AGAIN) from None
            _check_side_file(path, digest, (status.st_ino, status.st_size, status.st_mtime_ns))

    def digests(self) -> Digests:
        """Reads the table of digests. Raises CorruptCheckpoint if it was changed."""
        path = self.directory / DIGESTS
        table = _read(path)
        if blake3(table).hex() != self.manifest.digests_digest:
            raise CorruptCheckpoint(f"{path} does not match its digest", hint=_AGAIN)
        return Digests(self.manifest.digest_block_bytes, table)


def _header(path: Path, size_bytes: int, data_bytes: int, digest: str) -> Header:
    try:
        with _reading(path), _open(path) as file:
            raw = file.read(size_bytes)
            if blake3(raw).hex() != digest:
                raise CorruptCheckpoint(f"the header of {path} does not match its digest", hint=_AGAIN)
            header = headers.read(file.fileno(), str(path))
    except InvalidSource as error:
        raise CorruptCheckpoint(error.message, hint=_AGAIN) from None
    if header.data_bytes != data_bytes:
        raise CorruptCheckpoint(f"{path.parent / MANIFEST} is of other weights than {path.name}", hint=_AGAIN)
    return header


def _open(path: Path) -> BinaryIO:
    """Opens a regular file for reading; a pipe in its place would block us. Raises CorruptCheckpoint."""
    with _reading(path):
        try:
            return durable.open_regular(path)
        except ValueError:
            raise CorruptCheckpoint(f"{path} is not a regular file", hint=_AGAIN) from None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: {error.strerror}", hint=_AGAIN) from None


@functools.lru_cache(maxsize=64)
def _layout_json(path: Path, size_bytes: int, data_bytes: int, digest: str) -> str:
    return headers.as_json(_header(path, size_bytes, data_bytes, digest))


@functools.lru_cache(maxsize=1024)
def _check_side_file(path: Path, digest: str, version: tuple[int, int, int]) -> None:  # noqa: ARG001
    """Compares a file with its digest. `version`, its inode, size and time, makes the cache miss a changed file."""
    if blake3(_read(path)).hex() != digest:
        raise CorruptCheckpoint(f"{path} does not match its digest", hint=_AGAIN)


def verify(
    checkpoint: Checkpoint,
    *,
    options: Options = Options(depth=4),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Compares all of a checkpoint with its digests. Raises CorruptCheckpoint, which names file and block."""
    manifest = checkpoint.manifest
    for name, digest in manifest.side_files.items():
        if blake3(_read(checkpoint.directory / name)).hex() != digest:
            raise CorruptCheckpoint(f"{checkpoint.directory / name} does not match its digest", hint=_AGAIN)
    checkpoint.header()
    digests = checkpoint.digests()
    if not manifest.is_of_its_content():
        raise CorruptCheckpoint(f"{checkpoint.directory / MANIFEST} does not match the weights", hint=_AGAIN)
    if not manifest.data_bytes:
        return
    with checkpoint.open_weights() as opened:
        finish(verify_blocks(opened, checkpoint.extent, digests, options=options), on_progress, cancelled)


def _read(path: Path) -> bytes:
    with _reading(path), _open(path) as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise CorruptCheckpoint(f"{path} is too large", hint=_AGAIN)
    return content


def finish(
    transfer: Transfer, on_progress: Callable[[int, int], None], cancelled: Callable[[], bool]
) -> TransferResult:
    """Waits for a transfer. Calls `cancelled` twenty times a second, and reports progress when it changes."""
    told_bytes = -1
    with transfer:
        while True:
            if (done_bytes := transfer.done_bytes) != told_bytes:
                told_bytes = done_bytes
                on_progress(done_bytes, transfer.total_bytes)
            if cancelled():
                raise Cancelled("it was cancelled")
            try:
                result = transfer.wait(_POLL_S)
            except TimeoutError:
                continue
            on_progress(transfer.total_bytes, transfer.total_bytes)
            return result
