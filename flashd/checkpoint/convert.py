# SPDX-License-Identifier: Apache-2.0
"""Converts a source to a checkpoint: bit for bit, in bounded memory, at the disk's speed.

The tensors are arranged, the header is written, and one native transfer copies every tensor to its place and computes
the digests on the way. This module only fills a directory; the store publishes it by rename (flashd/store/catalog.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flashd.checkpoint import architectures, completeness
from flashd.checkpoint import manifest as manifests
from flashd.checkpoint.files import DIGESTS, MANIFEST, WEIGHTS, Checkpoint
from flashd.checkpoint.gguf import parts
from flashd.checkpoint.gguf.traits import SIDE_FILE as GGUF_TRAITS
from flashd.checkpoint.gguf.traits import dominant_type, traits_of, with_types
from flashd.checkpoint.header import ALIASES, MAX_HEADER_BYTES, Header, TensorInfo, serialise
from flashd.checkpoint.layout import Shape, arrange
from flashd.checkpoint.lora.plan import adapted_source
from flashd.checkpoint.manifest import Manifest
from flashd.checkpoint.source import recognised
from flashd.checkpoint.source.incremental import LateFiles
from flashd.checkpoint.source.pickles import Converter
from flashd.checkpoint.source.reader import (
    CONFIG,
    Source,
    SourceFiles,
    gguf_names,
    is_adapter,
    read_source,
    read_whole,
    side_file,
    with_config,
)
from flashd.checkpoint.source.ties import find_ties
from flashd.checkpoint.writing import Copying, Progress, copy_weights, describe
from flashd.durable import sync_directory, write_new, writing
from flashd.errors import InvalidSource
from flashd.io.streamer import Extent, OpenFile, Options, Piece, blake3
from flashd.units import format_bytes

GGUF_TENSOR = "gguf"  # the name of the one tensor of a checkpoint that is a GGUF file


@dataclass(frozen=True, slots=True)
class _Watch:
    """Detects writes to the files of a source while we read them."""

    before: Mapping[str, tuple[int, int]]

    @classmethod
    def begin(cls, files: SourceFiles, *, but: Collection[str] = ()) -> _Watch:
        return cls({name: _age(files[name]) for name in files if name not in but})

    def end(self, files: SourceFiles) -> None:
        """Checks that the files did not change while they were read. Raises InvalidSource, because the result may mix
        old and new data.
        """
        for name, age in self.before.items():
            if _age(files[name]) != age:
                hint = "convert it after the writes have ended, or move the finished source here"
                raise InvalidSource(f"{files[name].path} changed during the conversion", hint=hint)


@dataclass(slots=True)
class _Stages:
    """Combines the progress of two parts of work; the second has about `after_bytes`."""

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
    """Fills an existing empty directory with the checkpoint of a source, and fsyncs everything.

    LateFiles are copied as they arrive; this function waits for all of them. `python` is an interpreter with torch, for
    PyTorch files and adapters; an adapter is merged into `base`. Blocks, and calls `cancelled` every 50 ms. Raises
    InvalidSource, StoreFull, TransferFailed, CorruptCheckpoint (of the base), Unavailable (no torch) or Cancelled; the
    caller then has to remove the directory.
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
    if names := gguf_names(files):
        if late:
            late.wait_for_all(cancelled)
        return _convert_gguf(files, names, directory, note, Copying(options, on_progress, cancelled))
    if late:
        late.wait_for_headers(cancelled)
        if is_adapter(files):
            late.wait_for_all(cancelled)  # a merge comes before all copies
    awaited = late.awaited if late else frozenset()
    watch = _Watch.begin(files, but=awaited)
    source, on_progress = _opened(files, directory, python, base, on_progress, cancelled)
    with contextlib.closing(source):
        source, config = _checked(source)
        how = Copying(options, on_progress, cancelled)
        header, pieces = _arranged(source, {} if awaited else find_ties(source, cancelled))
        digests = copy_weights(source.files, pieces, header, directory, how, late=late if awaited else None)
        # Equal tensors can be found only now. Few large models have any, and these are copied once more.
        if awaited and (ties := find_ties(source, cancelled)):
            (directory / WEIGHTS).unlink()
            header, pieces = _arranged(source, ties)
            digests = copy_weights(source.files, pieces, header, directory, how)
        header_bytes = serialise(header)
        write_new(directory / DIGESTS, digests)
        side_files = {}
        for name, file in source.side_files.items():
            raw = side_file(file, name)
            write_new(directory / name, raw)
            side_files[name] = blake3(raw).hex()
    watch.end(files)
    manifest = describe(header, header_bytes, digests, side_files, config, note)
    write_new(directory / MANIFEST, manifest.to_toml().encode())
    sync_directory(directory)
    return manifest


def _convert_gguf(files: SourceFiles, names: Sequence[str], directory: Path, note: str, how: Copying) -> Manifest:
    """Stores a GGUF file as it is, as one tensor of bytes, so that its arena is a copy of the file."""
    watch = _Watch.begin(files)
    opened = [files[name] for name in names]
    whole = parts.whole(opened)
    traits = with_types(traits_of(whole.header, opened[0].path), whole.header)
    tensor = TensorInfo(GGUF_TENSOR, "U8", (whole.size_bytes,), Extent(0, whole.size_bytes))
    header = Header((tensor,), {"format": "gguf"})
    with tempfile.TemporaryFile(dir=directory) as head:
        head.write(whole.head)
        head.flush()
        sources = [*opened, OpenFile(head.fileno(), "the header of the joined parts")]
        digests = copy_weights(sources, whole.pieces, header, directory, how)
    write_new(directory / DIGESTS, digests)
    raw = traits.to_json()
    write_new(directory / GGUF_TRAITS, raw)
    watch.end(files)
    made = describe(header, serialise(header), digests, {GGUF_TRAITS: blake3(raw).hex()}, {}, note)
    manifest = replace(
        made,
        tensor_count=len(whole.header.tensors),
        dtype=dominant_type(whole.header),
        architecture=traits.architecture,
    )
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
    """Opens the tensors of a source. Returns them with the progress callback for their copies."""
    if not is_adapter(files):
        converter = Converter(python=python, scratch=directory, cancelled=cancelled, on_tick=lambda: on_progress(0, 0))
        return read_source(files, converter), on_progress
    if base is not None and GGUF_TRAITS in base.manifest.side_files:
        hint = "get the base as safetensors: flash pull OWNER/NAME"
        raise InvalidSource("its base is a GGUF file, into which no adapter is merged", hint=hint)
    if base is None:
        hint = "drop it into a models folder, name its base (flash convert --base), or merge it with peft"
        raise InvalidSource("this is a LoRA adapter, not a whole model", hint=hint)
    # The merge before the copy reads the base, which is about as much as the copy writes.
    stages = _Stages(on_progress, after_bytes=base.manifest.data_bytes)
    source = adapted_source(
        files, base, python=python, scratch=directory, on_progress=stages.first, cancelled=cancelled
    )
    return source, stages.second


def _checked(source: Source) -> tuple[Source, Mapping[str, object]]:
    """Returns the source in the form that engines understand, and its configuration. Raises InvalidSource."""
    if CONFIG not in source.side_files:
        return source, {}
    said = manifests.read_config(read_whole(source.side_files[CONFIG]))
    manifests.check_names(said)
    recognised.check_quantization(said)
    config = architectures.completed(said, [tensor.name for tensor in source.tensors], source.side_files)
    completeness.check(source.tensors, source.aliases, config, source.side_files)
    return (source if config == said else with_config(source, config)), config


def _arranged(source: Source, ties: Mapping[str, str]) -> tuple[Header, Sequence[Piece]]:
    """Returns the header of the checkpoint, and the places of its tensors in the source's files."""
    aliases = {**source.aliases, **ties}
    kept = {tensor.name: tensor for tensor in source.tensors if tensor.name not in aliases}
    # An alias of a tensor that is itself an alias points to the stored tensor.
    resolved = {alias: aliases.get(name, name) for alias, name in aliases.items()}
    shapes = (Shape(t.name, t.dtype, t.shape, t.extent.length) for t in kept.values())
    header = compose(shapes, resolved, source.metadata)
    return header, [
        Piece(kept[t.name].file, kept[t.name].extent.offset, t.extent.offset, t.extent.length)
        for t in header.tensors
        if t.extent.length
    ]


def compose(shapes: Iterable[Shape], aliases: Mapping[str, str], metadata: Mapping[str, str]) -> Header:
    """Makes the header of a checkpoint with these tensors. Raises InvalidSource if it is too large."""
    said = {"format": "pt", **metadata}  # transformers refuses files without this entry
    if aliases:
        said[ALIASES] = json.dumps(dict(sorted(aliases.items())), separators=(",", ":"))
    header = Header(arrange(shapes), dict(sorted(said.items())))
    header_bytes = len(serialise(header))
    if header_bytes > MAX_HEADER_BYTES:
        sizes = f"{format_bytes(header_bytes)}; the limit is {format_bytes(MAX_HEADER_BYTES)}"
        raise InvalidSource(f"the tensors' names and metadata need a header of {sizes}")
    return replace(header, data_offset=header_bytes)
