# SPDX-License-Identifier: Apache-2.0
"""Makes a table of the tensors in PyTorch's pickles, without unpickling them in this process.

A separate, sandboxed process (source/unpickle_worker.py) unpickles them with `weights_only`, and reports the place of
each tensor's bytes: nearly always an extent of the file itself, which is then copied like any other. Tensors that are
not contiguous there (views, strides) are written to a spill file that we provide. The answer is checked like an
untrusted header.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashd.checkpoint import header
from flashd.checkpoint.json_reader import strict_json
from flashd.checkpoint.source import sandboxed_process
from flashd.errors import InvalidSource
from flashd.io.streamer import Extent, OpenFile
from flashd.units import GiB, format_bytes

# The slowest known machine unpickles at 200 MB/s.
CPU_S_PER_BYTE = 1 / 20e6


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor whose bytes are contiguous in file number `file` of its source."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    extent: Extent


@dataclass(frozen=True, slots=True)
class Table:
    """The tensors of one file, and additional names for the same bytes."""

    tensors: tuple[SourceTensor, ...]
    aliases: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A file that may contain tensors: its number in the source, and its size."""

    number: int
    size_bytes: int


def largest_unpacked_bytes(size_bytes: int) -> int:
    """Returns the limit of the unpacked size for a pickle, because ten bytes of it can describe a view of terabytes."""
    return 4 * size_bytes + GiB


class Converter:
    """Runs the sandboxed process. `python` is an interpreter with torch; `scratch` is on the store's disk.

    `on_tick` is called while it works.
    """

    def __init__(
        self,
        *,
        python: str,
        scratch: Path,
        cancelled: Callable[[], bool],
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._python = python
        self._scratch = scratch
        self._cancelled = cancelled
        self._on_tick = on_tick

    def tables(self, opened: Sequence[OpenFile], pickles: Sequence[int]) -> tuple[list[Table], OpenFile | None]:
        """Returns the tables of the opened files that are pickles, and the spill file with non-contiguous tensors.

        The spill file has the number after the last opened file; the caller closes it. Raises InvalidSource for pickles
        that are malformed or do more than describe tensors, Unavailable without torch, StoreFull or Cancelled.
        """
        with tempfile.TemporaryFile(dir=self._scratch) as spill:
            answers = self._run([opened[number] for number in pickles], spill.fileno())
            spilled = TensorFile(len(opened), os.fstat(spill.fileno()).st_size)
            tables = []
            for number, answer in zip(pickles, answers, strict=True):
                path = opened[number].path
                source = TensorFile(number, os.fstat(opened[number].fd).st_size)
                tables.append(parse_table(strict_json(answer, f"the table of {path}"), source, spilled, path))
            kept = os.dup(spill.fileno()) if spilled.size_bytes else None
        return tables, OpenFile(kept, "what was unpacked from the source") if kept is not None else None

    def _run(self, files: Sequence[OpenFile], spill: int) -> list[bytes]:
        """Returns the child's answer about each file."""
        fds = [file.fd for file in files]
        sizes = [os.fstat(fd).st_size for fd in fds]
        limits = {
            "address_space_bytes": sandboxed_process.BASE_ADDRESS_SPACE_BYTES + 2 * max(sizes),
            # The mapping of a file counts too, although it needs no memory.
            "memory_bytes": sandboxed_process.BASE_MEMORY_BYTES + max(sizes),
            "cpu_s": sandboxed_process.BASE_CPU_S + int(sum(sizes) * CPU_S_PER_BYTE),
            "file_bytes": largest_unpacked_bytes(sum(sizes)),
            "open_files": max(*fds, spill) + 64,
        }
        outcome = sandboxed_process.run(
            self._python,
            "flashd.checkpoint.source.unpickle_worker",
            [str(spill), json.dumps(limits), *map(str, fds)],
            (*fds, spill),
            what=f"{files[0].path} is a PyTorch file",
            scratch=self._scratch,
            cancelled=self._cancelled,
            on_tick=self._on_tick,
        )
        said = outcome.answer.splitlines()
        if outcome.status != 0:
            path = files[min(len(said), len(files) - 1)].path
            hint = "if you trust it, load it with torch yourself and save it as safetensors"
            what = f"{path} is not a file of tensors that can be read safely: {outcome.reason}"
            raise InvalidSource(what, hint=hint)
        if len(said) != len(files):
            raise InvalidSource(f"{files[0].path} describes too many tensors")
        return said


def parse_table(answer: Any, source: TensorFile, spill: TensorFile, path: str) -> Table:
    """Parses the child's answer about one file as untrusted, because the pickle may have taken over the child."""
    entries = answer.get("tensors") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise InvalidSource(f"the converter's answer about {path} is invalid")
    tensors: dict[str, SourceTensor] = {}
    aliases: dict[str, str] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise InvalidSource(f"the converter's answer about {path} is invalid")
        name = header.check_name(entry["name"], path)
        if name in tensors or name in aliases:
            raise InvalidSource(f"{path} has the tensor {name!r} twice")
        if (same := entry.get("same_as")) is not None:
            if not isinstance(same, str) or same not in tensors:
                raise InvalidSource(f"{path}: {name!r} is an alias of a missing tensor")
            aliases[name] = same
        else:
            tensors[name] = _placed(name, entry, source, spill, path)
    unpacked_bytes = sum(tensor.extent.length for tensor in tensors.values())
    if unpacked_bytes > largest_unpacked_bytes(source.size_bytes):
        sizes = f"{format_bytes(source.size_bytes)} and claims to contain {format_bytes(unpacked_bytes)}"
        raise InvalidSource(f"{path} is {sizes} of tensors")
    return Table(tuple(tensors.values()), aliases)


def _placed(name: str, entry: Mapping[str, object], source: TensorFile, spill: TensorFile, path: str) -> SourceTensor:
    dtype, shape, size_bytes = header.check_tensor(name, entry.get("dtype"), entry.get("shape"), path)
    offset = entry.get("offset")
    file = spill if entry.get("spilled") else source
    if not isinstance(offset, int) or offset < 0 or offset + size_bytes > file.size_bytes:
        raise InvalidSource(f"tensor {name!r} of {path} lies outside the file")
    return SourceTensor(name, dtype, shape, file.number, Extent(offset, size_bytes))
