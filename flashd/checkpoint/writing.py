# SPDX-License-Identifier: Apache-2.0
"""Writes the files of a checkpoint: copies the weights with their digests, and describes the result in its manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flashd.checkpoint import manifest as manifests
from flashd.checkpoint.files import WEIGHTS, finish
from flashd.checkpoint.header import Header, serialise
from flashd.checkpoint.layout import layout_digest
from flashd.checkpoint.manifest import Manifest
from flashd.checkpoint.source.incremental import LateFiles, as_they_arrive, whole
from flashd.io.streamer import OpenFile, Options, Piece, blake3, copy
from flashd.units import MiB

DIGEST_BLOCK_BYTES = 8 * MiB

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Copying:
    """How weights are copied: by the streamer's options, until cancelled, which is asked every 50 ms."""

    options: Options
    on_progress: Progress
    cancelled: Callable[[], bool]


def copy_weights(
    files: Sequence[OpenFile],
    pieces: Sequence[Piece],
    header: Header,
    directory: Path,
    how: Copying,
    *,
    late: LateFiles | None = None,
) -> bytes:
    """Writes the weights, whose `pieces` are in the files, and returns the digests of their blocks.

    Those of `late` files are copied as they arrive.
    """
    path = directory / WEIGHTS
    header_bytes = serialise(header)
    total_bytes = header.data_bytes
    names = [file.path for file in files]
    stretches = as_they_arrive(pieces, DIGEST_BLOCK_BYTES, names, late, how.cancelled) if late else whole(pieces)
    digests: dict[int, bytes] = {}
    done_bytes = 0
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(fd, header_bytes, 0)
        for stretch in stretches:
            transfer = copy(
                files,
                stretch.pieces,
                OpenFile(fd, str(path)),
                region_offset=len(header_bytes) + stretch.offset,
                digest_block_bytes=DIGEST_BLOCK_BYTES,
                file_bytes=len(header_bytes) + total_bytes,
                options=how.options,
            )
            tell = partial(_tell_part, how.on_progress, done_bytes, total_bytes)
            result = finish(transfer, tell, how.cancelled)
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
    """Makes the manifest of a checkpoint whose other files are written."""
    header_digest, digests_digest = blake3(header_bytes).hex(), blake3(digests).hex()
    weights = manifests.weights_id(header_digest, digests_digest)
    layout = layout_digest(header.tensors)
    return Manifest(
        id=manifests.checkpoint_id(weights, side_files),
        weights=weights,
        header_digest=header_digest,
        digests_digest=digests_digest,
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
        source=note.encode("utf-8", "backslashreplace").decode(),  # a path may not be UTF-8
    )
