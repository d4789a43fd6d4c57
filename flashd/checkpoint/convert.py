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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flashd.checkpoint import manifest as manifests
from flashd.checkpoint.files import DIGESTS, MANIFEST, WEIGHTS, Checkpoint, finish, write_new, writing
from flashd.checkpoint.header import ALIASES, MAX_HEADER_BYTES, Header, serialise
from flashd.checkpoint.layout import Shape, arrange, layout_digest
from flashd.checkpoint.manifest import Manifest
from flashd.checkpoint.merging import CONFIG, adapted_source
from flashd.checkpoint.pickles import Converter, SourceTensor
from flashd.checkpoint.source import Source, SourceFiles, is_adapter, read_source, read_whole
from flashd.checkpoint.ties import find_ties
from flashd.errors import InvalidSource
from flashd.streamer import OpenFile, Options, Piece, blake3, copy
from flashd.units import MiB, format_bytes

DIGEST_BLOCK_BYTES = 8 * MiB

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


@dataclass(slots=True)
class _Stages:
    """Progress of work in two parts as that of one; the second has about `after_bytes`."""

    tell: Progress
    after_bytes: int
    before_bytes: int = 0

    def first(self, done_bytes: int, total_bytes: int) -> None:
        self.before_bytes = total_bytes
        self.tell(done_bytes, total_bytes + self.after_bytes)

    def second(self, done_bytes: int, total_bytes: int) -> None:
        self.tell(self.before_bytes + done_bytes, self.before_bytes + total_bytes)


def _age(file: OpenFile) -> tuple[int, int]:
    status = os.fstat(file.fd)
    return status.st_size, status.st_mtime_ns


def convert(
    files: SourceFiles,
    directory: Path,
    *,
    python: str,
    base: Checkpoint | None = None,
    note: str = "",
    options: Options = Options(depth=4),
    on_progress: Progress = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Manifest:
    """Fills an existing empty directory with the checkpoint of a source, all of it fsynced.

    `python` is an interpreter that has torch, for PyTorch files and for adapters; these are merged into `base`. Blocks;
    asks `cancelled` every 50 ms. Raises InvalidSource, StoreFull, TransferFailed, CorruptCheckpoint (the base),
    Unavailable (no torch) or Cancelled; the directory is then the caller's to remove.
    """
    with writing(directory):
        return _convert(files, directory, python, base, note, options, on_progress, cancelled)


def _convert(
    files: SourceFiles,
    directory: Path,
    python: str,
    base: Checkpoint | None,
    note: str,
    options: Options,
    on_progress: Progress,
    cancelled: Callable[[], bool],
) -> Manifest:
    watch = _Watch.begin(files)
    if not is_adapter(files):
        source = read_source(files, Converter(python=python, scratch=directory, cancelled=cancelled))
    elif base is not None:
        # Before it is copied like any other, it is made: the base is read once more than is written in the end.
        stages = _Stages(on_progress, after_bytes=base.manifest.data_bytes)
        source = adapted_source(
            files, base, python=python, scratch=directory, on_progress=stages.first, cancelled=cancelled
        )
        on_progress = stages.second
    else:
        hint = "give it to a flashd that has its base, name one (flash convert --base), or merge it with peft"
        raise InvalidSource("this is a LoRA adapter, not a whole model", hint=hint)
    with contextlib.closing(source):
        config = manifests.read_config(read_whole(source.side_files[CONFIG])) if CONFIG in source.side_files else {}
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
    manifest = _manifest(header, header_bytes, digests, side_files, config, note)
    write_new(directory / MANIFEST, manifest.to_toml().encode())
    _sync_directory(directory)
    return manifest


def _arranged(source: Source, cancelled: Callable[[], bool]) -> tuple[Header, Mapping[str, SourceTensor]]:
    """The header of the checkpoint, and where each of its tensors comes from."""
    aliases = {**source.aliases, **find_ties(source, cancelled)}
    kept = {tensor.name: tensor for tensor in source.tensors if tensor.name not in aliases}
    # An alias of something that turned out to be an alias itself points to what that one points to.
    resolved = {alias: aliases.get(name, name) for alias, name in aliases.items()}
    placed = arrange(Shape(t.name, t.dtype, t.shape, t.extent.length) for t in kept.values())
    metadata = {"format": "pt", **source.metadata}  # transformers refuses files that do not say it
    if resolved:
        metadata[ALIASES] = json.dumps(dict(sorted(resolved.items())), separators=(",", ":"))
    header = Header(placed, dict(sorted(metadata.items())))
    header_bytes = len(serialise(header))
    if header_bytes > MAX_HEADER_BYTES:
        sizes = f"{format_bytes(header_bytes)}; at most {format_bytes(MAX_HEADER_BYTES)} make sense"
        raise InvalidSource(f"the tensors' names and metadata need a header of {sizes}")
    return replace(header, data_offset=header_bytes), kept


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


def _manifest(
    header: Header,
    header_bytes: bytes,
    digests: bytes,
    side_files: Mapping[str, str],
    config: Mapping[str, object],
    note: str,
) -> Manifest:
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


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
