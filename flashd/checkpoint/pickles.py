# SPDX-License-Identifier: Apache-2.0
"""How do PyTorch's pickles become a table of tensors without our ever unpickling one?

A separate, sandboxed process (flashd/checkpoint/unpickle.py) does, with `weights_only`, and answers with where each
tensor's bytes are: nearly always an extent of the file itself, which is then copied like any other. What is not
contiguous there (views, strides) it writes to a spill file that we made. We believe its answer no more than a header we
read ourselves.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashd.checkpoint import confined, header
from flashd.errors import InvalidSource
from flashd.streamer import Extent, OpenFile
from flashd.units import GiB, format_bytes

# The slowest machine we know unpickles at 200 MB/s.
CPU_S_PER_BYTE = 1 / 20e6


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor whose bytes lie, contiguous, in file number `file` of its source."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    extent: Extent


@dataclass(frozen=True, slots=True)
class Table:
    """The tensors of one file, and further names for the same bytes."""

    tensors: tuple[SourceTensor, ...]
    aliases: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Place:
    """A file that tensors may lie in: its number in the source, and its size."""

    number: int
    size_bytes: int


def largest_unpacked_bytes(size_bytes: int) -> int:
    """How much a pickle of this size may unpack to. Ten bytes of it can describe a view of terabytes."""
    return 4 * size_bytes + GiB


class Converter:
    """Runs the sandboxed process. `python` is an interpreter that has torch; `scratch` is on the store's disk."""

    def __init__(self, *, python: str, scratch: Path, cancelled: Callable[[], bool]) -> None:
        self._python = python
        self._scratch = scratch
        self._cancelled = cancelled

    def tables(self, opened: Sequence[OpenFile], pickles: Sequence[int]) -> tuple[list[Table], OpenFile | None]:
        """The tensors of those of the opened files that are pickles, and what did not lie ready in them.

        That spill counts as the file after the last opened one; it is the caller's to close. Raises InvalidSource for
        pickles that are malformed or do anything but describe tensors, Unavailable without torch, StoreFull, Cancelled.
        """
        with tempfile.TemporaryFile(dir=self._scratch) as spill:
            answers = self._run([opened[number] for number in pickles], spill.fileno())
            spilled = Place(len(opened), os.fstat(spill.fileno()).st_size)
            tables = []
            for number, answer in zip(pickles, answers, strict=True):
                path = opened[number].path
                source = Place(number, os.fstat(opened[number].fd).st_size)
                tables.append(parse_table(header.strict_json(answer, f"the table of {path}"), source, spilled, path))
            kept = os.dup(spill.fileno()) if spilled.size_bytes else None
        return tables, OpenFile(kept, "what was unpacked from the source") if kept is not None else None

    def _run(self, files: Sequence[OpenFile], spill: int) -> list[bytes]:
        """The child's answer about each file."""
        fds = [file.fd for file in files]
        sizes = [os.fstat(fd).st_size for fd in fds]
        limits = {
            "address_space_bytes": confined.BASE_ADDRESS_SPACE_BYTES + 2 * max(sizes),
            # The mapping of a file counts, though it needs no memory.
            "memory_bytes": confined.BASE_MEMORY_BYTES + max(sizes),
            "cpu_s": confined.BASE_CPU_S + int(sum(sizes) * CPU_S_PER_BYTE),
            "file_bytes": largest_unpacked_bytes(sum(sizes)),
            "open_files": max(*fds, spill) + 64,
        }
        outcome = confined.run(
            self._python,
            "flashd.checkpoint.unpickle",
            [str(spill), json.dumps(limits), *map(str, fds)],
            (*fds, spill),
            what=f"{files[0].path} is a PyTorch file",
            scratch=self._scratch,
            cancelled=self._cancelled,
        )
        said = outcome.answer.splitlines()
        if outcome.status != 0:
            path = files[min(len(said), len(files) - 1)].path
            hint = "if you trust it, load it with torch yourself and save it as safetensors"
            what = f"{path} is not a file of tensors that can be read safely: {outcome.reason}"
            raise InvalidSource(what, hint=hint)
        if len(said) != len(files):
            raise InvalidSource(f"{files[0].path} describes more tensors than make sense")
        return said


def parse_table(answer: Any, source: Place, spill: Place, path: str) -> Table:
    """Checks the child's answer about one file as if the pickle itself had written it, because it may have."""
    entries = answer.get("tensors") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise InvalidSource(f"the converter's answer about {path} makes no sense")
    tensors: dict[str, SourceTensor] = {}
    aliases: dict[str, str] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise InvalidSource(f"the converter's answer about {path} makes no sense")
        name = header.check_name(entry["name"], path)
        if name in tensors or name in aliases:
            raise InvalidSource(f"{path} has the tensor {name!r} twice")
        if (same := entry.get("same_as")) is not None:
            if not isinstance(same, str) or same not in tensors:
                raise InvalidSource(f"{path}: what {name!r} is said to be the same as is not there")
            aliases[name] = same
        else:
            tensors[name] = _placed(name, entry, source, spill, path)
    unpacked_bytes = sum(tensor.extent.length for tensor in tensors.values())
    if unpacked_bytes > largest_unpacked_bytes(source.size_bytes):
        sizes = f"{format_bytes(source.size_bytes)} and claims to hold {format_bytes(unpacked_bytes)}"
        raise InvalidSource(f"{path} is {sizes} of tensors")
    return Table(tuple(tensors.values()), aliases)


def _placed(name: str, entry: Mapping[str, Any], source: Place, spill: Place, path: str) -> SourceTensor:
    dtype, shape, size_bytes = header.check_tensor(name, entry.get("dtype"), entry.get("shape"), path)
    offset = entry.get("offset")
    place = spill if entry.get("spilled") else source
    if not isinstance(offset, int) or offset < 0 or offset + size_bytes > place.size_bytes:
        raise InvalidSource(f"tensor {name!r} of {path} lies outside the file")
    return SourceTensor(name, dtype, shape, place.number, Extent(offset, size_bytes))
