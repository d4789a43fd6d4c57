# SPDX-License-Identifier: Apache-2.0
"""Sources for tests, made by the reference libraries or forged byte by byte."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import imported

from flashd.checkpoint.convert import convert
from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.source.reader import SourceFiles


def forge(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with exactly this header (JSON, or raw bytes) and this data behind it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def converted(source: Path, directory: Path, **options: Any) -> Checkpoint:
    directory.mkdir(parents=True)
    with SourceFiles.from_path(source) as files:
        convert(files, directory, python=imported.interpreter(), **options)
    return Checkpoint.open(directory)
