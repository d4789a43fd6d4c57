# SPDX-License-Identifier: Apache-2.0
"""How does a source become a checkpoint? Bit for bit, in bounded memory, at the disk's speed.

The table of tensors is arranged, the header written, and one native transfer copies every tensor from wherever it lies
to its place, computing the digests on the way. Nothing is published here: a directory is filled, and the store renames
it (flashd/store/catalog.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flashd.checkpoint import manifest as manifests
from flashd.checkpoint.files import DIGESTS, MANIFEST, WEIGHTS, finish, sync_directory, write_new, writing
from flashd.checkpoint.header import ALIASES, MAX_HEADER_BYTES, Header, serialise
from flashd.checkpoint.layout import Shape, arrange, layout_digest
from flashd.checkpoint.manifest import Manifest
from flashd.checkpoint.pickles import Converter, SourceTensor
from flashd.checkpoint.source import Source, SourceFiles, read_source, read_whole
from flashd.checkpoint.ties import find_ties
from flashd.errors import InvalidSource
from flashd.streamer import OpenFile, Options, Piece, blake3, copy
from flashd.units import MiB, format_bytes

DIGEST_BLOCK_BYTES = 8 * MiB
CONFIG = "config.json"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Watch:
    """Notices that somebody writes to the files of a source while we read them."""

    before: Mapping[str, tuple[int, int]]

    @classmethod
    def begin(cls, files: SourceFiles) -> _Watch:
        return cls({name: _age(files[name]) for name in files})

    def end(self, files: SourceFiles) -> None:
        """Raises InvalidSource: half of what was read may be old and half of it new."""
        for name, age in self.before.items():
            if _age(files[name]) != age:
                hint = "convert it when writing has ended, or move it here in one piece"
                raise InvalidSource(f"{files[name].path} was written to while it was converted", hint=hint)


def _age(file: OpenFile) -> tuple[int, int]:
    status = os.fstat(file.fd)
    return status.st_size, status.st_mtime_ns


def convert(
    files: SourceFiles,
    directory: Path,
    *,
    python: str,
    note: str = "",
    options: Options = Options(depth=4),
    on_progress: Progress = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Manifest:
    """Fills an existing empty directory with the checkpoint of a source, all of it fsynced.

    `python` is an interpreter that has torch, for PyTorch files. Blocks; asks `cancelled` every 50 ms. Raises
    InvalidSource, StoreFull, TransferFailed, Unavailable (no torch) or Cancelled; the directory is then the caller's to
    remove.
    """
    with writing(directory):
        return _convert(files, directory, python, note, options, on_progress, cancelled)


def _convert(
    files: SourceFiles,
    directory: Path,
    python: str,
    note: str,
    options: Options,
    on_progress: Progress,
    cancelled: Callable[[], bool],
) -> Manifest:
    watch = _Watch.begin(files)
    source = read_source(files, Converter(python=python, scratch=directory, cancelled=cancelled))
    with contextlib.closing(source):
        config = manifests.read_config(read_whole(files[CONFIG])) if CONFIG in source.side_files else {}
        header, origin = _arranged(source, cancelled)
        header_bytes = serialise(header)
        digests = _copy_weights(source, header, origin, header_bytes, directory, options, on_progress, cancelled)
    write_new(directory / DIGESTS, digests)
    side_files = {}
    for name, file in source.side_files.items():
        raw = read_whole(file)
        write_new(directory / name, raw)
        side_files[name] = blake3(raw).hex()
    watch.end(files)
    manifest = describe(header, header_bytes, digests, side_files, config, note)
    write_new(directory / MANIFEST, manifest.to_toml().encode())
    sync_directory(directory)
    return manifest


def _arranged(source: Source, cancelled: Callable[[], bool]) -> tuple[Header, Mapping[str, SourceTensor]]:
    """The header of the checkpoint, and where each of its tensors comes from."""
    aliases = {**source.aliases, **find_ties(source, cancelled)}
    kept = {tensor.name: tensor for tensor in source.tensors if tensor.name not in aliases}
    # An alias of something that turned out to be an alias itself points to what that one points to.
    resolved = {alias: aliases.get(name, name) for alias, name in aliases.items()}
    shapes = (Shape(t.name, t.dtype, t.shape, t.extent.length) for t in kept.values())
    return compose(shapes, resolved, source.metadata), kept


def compose(shapes: Iterable[Shape], aliases: Mapping[str, str], metadata: Mapping[str, str]) -> Header:
    """The header of a checkpoint that holds these tensors. Raises InvalidSource if it became too large."""
    said = {"format": "pt", **metadata}  # transformers refuses files that do not say it
    if aliases:
        said[ALIASES] = json.dumps(dict(sorted(aliases.items())), separators=(",", ":"))
    header = Header(arrange(shapes), dict(sorted(said.items())))
    header_bytes = len(serialise(header))
    if header_bytes > MAX_HEADER_BYTES:
        sizes = f"{format_bytes(header_bytes)}; at most {format_bytes(MAX_HEADER_BYTES)} make sense"
        raise InvalidSource(f"the tensors' names and metadata need a header of {sizes}")
    return replace(header, data_offset=header_bytes)


def _copy_weights(
    source: Source,
    header: Header,
    origin: Mapping[str, SourceTensor],
    header_bytes: bytes,
    directory: Path,
    options: Options,
    on_progress: Progress,
    cancelled: Callable[[], bool],
) -> bytes:
    """Writes the weights; returns the digests of their blocks."""
    path = directory / WEIGHTS
    pieces = [
        Piece(origin[t.name].file, origin[t.name].extent.offset, t.extent.offset, t.extent.length)
        for t in header.tensors
        if t.extent.length
    ]
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(fd, header_bytes, 0)
        transfer = copy(
            source.files,
            pieces,
            OpenFile(fd, str(path)),
            region_offset=len(header_bytes),
            digest_block_bytes=DIGEST_BLOCK_BYTES,
            options=options,
        )
        return finish(transfer, on_progress, cancelled).digests
    finally:
        os.close(fd)


def describe(
    header: Header,
    header_bytes: bytes,
    digests: bytes,
    side_files: Mapping[str, str],
    config: Mapping[str, object],
    note: str,
) -> Manifest:
    """The manifest of a checkpoint of which everything is written but that."""
    header_digest = blake3(header_bytes)
    weights = manifests.weights_id(header_digest, digests)
    layout = layout_digest(header.tensors)
    return Manifest(
        id=manifests.checkpoint_id(weights, side_files),
        weights=weights,
        header_digest=header_digest.hex(),
        digests_digest=blake3(digests).hex(),
        digest_block_bytes=DIGEST_BLOCK_BYTES,
        data_offset=len(header_bytes),
        data_bytes=header.data_bytes,
        tensor_count=len(header.tensors),
        dtype=manifests.dominant_dtype(header),
        architecture=manifests.architecture_of(config),
        architecture_key=manifests.architecture_key(config, layout),
        layout=layout,
        quantization=manifests.quantization_of(config),
        side_files=dict(side_files),
        created_at=time.time(),
        source=note.encode("utf-8", "backslashreplace").decode(),  # a path need not be UTF-8
    )
