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
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from flashd.checkpoint import manifest as manifests
from flashd.checkpoint.files import DIGESTS, MANIFEST, WEIGHTS, Checkpoint, finish, sync_directory, write_new, writing
from flashd.checkpoint.header import ALIASES, MAX_HEADER_BYTES, Header, serialise
from flashd.checkpoint.late import LateFiles, as_they_arrive, whole
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
    def begin(cls, files: SourceFiles, *, but: Collection[str] = ()) -> _Watch:
        return cls({name: _age(files[name]) for name in files if name not in but})

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

    What is there of LateFiles is copied at once, the rest as it arrives; until all of it has, this does not return.
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
    late = files if isinstance(files, LateFiles) else None
    if late:
        late.wait_for_headers(cancelled)
        if is_adapter(files):
            late.wait_for_all(cancelled)  # it is made into something else before anything is copied
    awaited = late.awaited if late else frozenset()
    watch = _Watch.begin(files, but=awaited)
    source, on_progress = _opened(files, directory, python, base, on_progress, cancelled)
    with contextlib.closing(source):
        config = manifests.read_config(read_whole(source.side_files[CONFIG])) if CONFIG in source.side_files else {}
        copy_weights = partial(_copy_weights, source, directory, options, on_progress, cancelled)
        header, origin = _arranged(source, {} if awaited else find_ties(source, cancelled))
        digests = copy_weights(header, origin, late if awaited else None)
        # Which tensors are the same can be seen only now. Few large models have any; those are copied once more.
        if awaited and (ties := find_ties(source, cancelled)):
            (directory / WEIGHTS).unlink()
            header, origin = _arranged(source, ties)
            digests = copy_weights(header, origin, None)
        header_bytes = serialise(header)
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


def _opened(
    files: SourceFiles,
    directory: Path,
    python: str,
    base: Checkpoint | None,
    on_progress: Progress,
    cancelled: Callable[[], bool],
) -> tuple[Source, Progress]:
    """The tensors of a source, and whom to tell of their being copied."""
    if not is_adapter(files):
        return read_source(files, Converter(python=python, scratch=directory, cancelled=cancelled)), on_progress
    if base is None:
        hint = "give it to a flashd that has its base, name one (flash convert --base), or merge it with peft"
        raise InvalidSource("this is a LoRA adapter, not a whole model", hint=hint)
    # Before it is copied like any other, it is made: the base is read once more than is written in the end.
    stages = _Stages(on_progress, after_bytes=base.manifest.data_bytes)
    source = adapted_source(
        files, base, python=python, scratch=directory, on_progress=stages.first, cancelled=cancelled
    )
    return source, stages.second


def _arranged(source: Source, ties: Mapping[str, str]) -> tuple[Header, Mapping[str, SourceTensor]]:
    """The header of the checkpoint, and where each of its tensors comes from."""
    aliases = {**source.aliases, **ties}
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
    directory: Path,
    options: Options,
    on_progress: Progress,
    cancelled: Callable[[], bool],
    header: Header,
    origin: Mapping[str, SourceTensor],
    late: LateFiles | None,
) -> bytes:
    """Writes the weights; returns the digests of their blocks."""
    path = directory / WEIGHTS
    header_bytes = serialise(header)
    total_bytes = header.data_bytes
    pieces = [
        Piece(origin[t.name].file, origin[t.name].extent.offset, t.extent.offset, t.extent.length)
        for t in header.tensors
        if t.extent.length
    ]
    names = [file.path for file in source.files]
    stretches = as_they_arrive(pieces, DIGEST_BLOCK_BYTES, names, late, cancelled) if late else whole(pieces)
    digests: dict[int, bytes] = {}
    done_bytes = 0
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(fd, header_bytes, 0)
        for stretch in stretches:
            transfer = copy(
                source.files,
                stretch.pieces,
                OpenFile(fd, str(path)),
                region_offset=len(header_bytes) + stretch.offset,
                digest_block_bytes=DIGEST_BLOCK_BYTES,
                file_bytes=len(header_bytes) + total_bytes,
                options=options,
            )
            tell = partial(_tell_part, on_progress, done_bytes, total_bytes)
            result = finish(transfer, tell, cancelled)
            digests[stretch.first_block] = result.digests
            done_bytes += result.size_bytes
        return b"".join(table for _, table in sorted(digests.items()))
    finally:
        os.close(fd)


def _tell_part(on_progress: Progress, before_bytes: int, total_bytes: int, done_bytes: int, _: int) -> None:
    on_progress(before_bytes + done_bytes, total_bytes)


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
