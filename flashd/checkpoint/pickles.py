# SPDX-License-Identifier: Apache-2.0
"""How do PyTorch's pickles become a table of tensors without our ever unpickling one?

A separate, sandboxed process (flashd/checkpoint/unpickle.py) does, with `weights_only`, and answers with where each
tensor's bytes are: nearly always an extent of the file itself, which is then copied like any other. What is not
contiguous there (views, strides) it writes to a spill file that we made. We believe its answer no more than a header we
read ourselves.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashd.checkpoint import header
from flashd.errors import Cancelled, FlashdError, InvalidSource, StoreFull, Unavailable
from flashd.streamer import Extent, OpenFile
from flashd.units import GiB, MiB, format_bytes

MAX_ANSWER_BYTES = 256 * MiB
# torch alone maps 1 to 2 GB of address space, and its CUDA builds ten times that; of private memory it wants 0.25 GB.
BASE_ADDRESS_SPACE_BYTES = 32 * GiB
BASE_MEMORY_BYTES = 2 * GiB
# The slowest machine we know unpickles at 200 MB/s.
CPU_S_PER_BYTE = 1 / 20e6
BASE_CPU_S = 120
_POLL_S = 0.05
_LAST_WORDS_BYTES = 4096


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
            "address_space_bytes": BASE_ADDRESS_SPACE_BYTES + 2 * max(sizes),
            "memory_bytes": BASE_MEMORY_BYTES + max(sizes),  # the mapping of a file counts, though it needs no memory
            "cpu_s": BASE_CPU_S + int(sum(sizes) * CPU_S_PER_BYTE),
            "file_bytes": largest_unpacked_bytes(sum(sizes)),
            "open_files": max(*fds, spill) + 64,
        }
        command = [self._python, "-m", "flashd.checkpoint.unpickle", str(spill), json.dumps(limits), *map(str, fds)]
        with (
            tempfile.TemporaryFile(dir=self._scratch) as answer,
            tempfile.TemporaryFile(dir=self._scratch) as complaints,
        ):
            try:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=answer,
                    stderr=complaints,
                    pass_fds=(*fds, spill),
                    env={"OMP_NUM_THREADS": "1"},  # every thread of torch would count against its memory
                )
            except OSError as error:
                raise Unavailable(f"cannot run {self._python}: {error.strerror}", hint=_TORCH_HINT) from None
            try:
                self._await(child)
            finally:
                child.kill()
                child.wait()
            said = _tail(answer.fileno(), MAX_ANSWER_BYTES).splitlines()
            if child.returncode != 0:
                current = files[min(len(said), len(files) - 1)]
                last_words = _tail(complaints.fileno(), _LAST_WORDS_BYTES).decode(errors="replace")
                raise self._explained(current.path, child.returncode, last_words)
        if len(said) != len(files):
            raise InvalidSource(f"{files[0].path} describes more tensors than make sense")
        return said

    def _await(self, child: subprocess.Popen[bytes]) -> None:
        while True:
            try:
                child.wait(_POLL_S)
                return
            except subprocess.TimeoutExpired:
                if self._cancelled():
                    raise Cancelled("the conversion was cancelled") from None

    def _explained(self, path: str, status: int, complaint: str) -> FlashdError:
        for module in ("torch", "flashd"):
            if f"No module named '{module}'" in complaint:
                what = f"{path} is a PyTorch file, and {self._python} has no {module}"
                return Unavailable(what, hint=_TORCH_HINT)
        if status in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            hint = "free some space, or remove a model"
            return StoreFull(f"there is no space to unpack {path}: {os.strerror(status)}", hint=hint)
        if status < 0:
            reason = f"the converter was ended by signal {-status}, by its limits on time and memory or by a defect"
        else:
            # torch quotes what the pickle says, so this too is a stranger's text.
            last = complaint.strip().splitlines()[-1:] or [f"exit status {status}"]
            reason = "".join(c for c in last[0] if c.isprintable())[:500]
        hint = "if you trust it, load it with torch yourself and save it as safetensors"
        return InvalidSource(f"{path} is not a file of tensors that can be read safely: {reason}", hint=hint)


_TORCH_HINT = "install flashd's torch extra, or set engines.torch.python to an interpreter that has it"


def _tail(fd: int, limit_bytes: int) -> bytes:
    size_bytes = os.fstat(fd).st_size
    return os.pread(fd, min(size_bytes, limit_bytes), max(0, size_bytes - limit_bytes))


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
