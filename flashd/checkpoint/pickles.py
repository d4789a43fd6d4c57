# SPDX-License-Identifier: Apache-2.0
"""How do PyTorch's pickles become a table of tensors without our ever unpickling one?

A separate, sandboxed process (flashd/checkpoint/unpickle.py) does, with `weights_only`, and answers with where each
tensor's bytes are: nearly always an extent of the file itself, which is then copied like any other. What is not
contiguous there (views, strides, old formats) it writes to a spill file that we made. We believe its answer no more
than a header we read ourselves.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashd.checkpoint import header
from flashd.errors import Cancelled, InvalidSource, Unavailable
from flashd.streamer import Extent, OpenFile
from flashd.units import MiB

MAX_TABLE_BYTES = 64 * MiB
# torch alone maps 1 to 2 GB of address space, and its CUDA builds ten times that.
BASE_ADDRESS_SPACE_BYTES = 32 << 30
# The slowest machine we know reads old-style pickles at 200 MB/s.
CPU_S_PER_BYTE = 1 / 20e6
BASE_CPU_S = 120
_POLL_S = 0.05


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


def moved(extent: Extent, by: int) -> Extent:
    return Extent(extent.offset + by, extent.length)


class Converter:
    """Runs the sandboxed process. `python` is an interpreter that has torch; `scratch` is on the store's disk."""

    def __init__(self, *, python: str, scratch: Path, cancelled: Callable[[], bool]) -> None:
        self._python = python
        self._scratch = scratch
        self._cancelled = cancelled

    def table(self, file: OpenFile, opened: list[OpenFile]) -> Table:
        """Tensors of a pickle. Its spill file is appended to `opened`, and is the caller's to close.

        Raises InvalidSource for pickles that are malformed or do anything but describe tensors.
        """
        spill = os.open(self._scratch, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            answer = self._run(file, spill)
            table = _parse(
                answer, opened.index(file), len(opened), os.fstat(file.fd).st_size, os.fstat(spill).st_size, file.path
            )
        except BaseException:
            os.close(spill)
            raise
        opened.append(OpenFile(spill, f"what was unpacked from {file.path}"))
        return table

    def _run(self, file: OpenFile, spill: int) -> Any:
        size_bytes = os.fstat(file.fd).st_size
        limits = {
            "address_space_bytes": BASE_ADDRESS_SPACE_BYTES + 4 * size_bytes,
            "cpu_s": BASE_CPU_S + int(size_bytes * CPU_S_PER_BYTE),
            "file_bytes": 4 * size_bytes + 1024 * MiB,
        }
        command = [self._python, "-m", "flashd.checkpoint.unpickle", str(file.fd), str(spill), json.dumps(limits)]
        with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as complaints:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=answer, stderr=complaints, pass_fds=(file.fd, spill), env={}
            )
            try:
                self._await(child)
            finally:
                child.kill()
                child.wait()
            said = _tail(answer.fileno(), MAX_TABLE_BYTES)
            if child.returncode != 0:
                raise self._explained(file, child.returncode, _tail(complaints.fileno(), 4096).decode(errors="replace"))
        return header.strict_json(said, f"the table of {file.path}")

    def _await(self, child: subprocess.Popen[bytes]) -> None:
        while True:
            try:
                child.wait(_POLL_S)
                return
            except subprocess.TimeoutExpired:
                if self._cancelled():
                    raise Cancelled("the conversion was cancelled") from None

    def _explained(self, file: OpenFile, status: int, complaint: str) -> Exception:
        last = complaint.strip().splitlines()[-1][:500] if complaint.strip() else ""
        if "No module named 'torch'" in complaint:
            hint = "install flashd's torch extra, or set engines.torch.python to an interpreter that has torch"
            return Unavailable(f"{file.path} is a PyTorch file, and {self._python} has no torch", hint=hint)
        if status < 0:
            last = f"the converter was ended by signal {-status}, by its limits on time and memory or by a defect"
        hint = "if you trust it, load it with torch yourself and save it as safetensors"
        return InvalidSource(f"{file.path} is not a file of tensors that can be read safely: {last}", hint=hint)


def _tail(fd: int, limit_bytes: int) -> bytes:
    size_bytes = os.fstat(fd).st_size
    return os.pread(fd, min(size_bytes, limit_bytes), max(0, size_bytes - limit_bytes))


def _parse(answer: Any, number: int, spill_number: int, file_bytes: int, spill_bytes: int, path: str) -> Table:
    """Checks the converter's answer as if the pickle itself had written it, because it may have."""
    if not isinstance(answer, dict) or not isinstance(answer.get("tensors"), list):
        raise InvalidSource(f"the converter's answer about {path} makes no sense")
    tensors: dict[str, SourceTensor] = {}
    aliases: dict[str, str] = {}
    for entry in answer["tensors"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise InvalidSource(f"the converter's answer about {path} makes no sense")
        name = header.check_name(entry["name"], path)
        if name in tensors or name in aliases:
            raise InvalidSource(f"{path} has the tensor {name!r} twice")
        if (same := entry.get("same_as")) is not None:
            if same not in tensors:
                raise InvalidSource(f"{path}: {name!r} is said to be the same as {same!r}, which is not there")
            aliases[name] = same
            continue
        dtype, shape, size_bytes = header.check_tensor(name, entry.get("dtype"), entry.get("shape"), path)
        offset, spilled = entry.get("offset"), entry.get("spilled")
        limit_bytes = spill_bytes if spilled else file_bytes
        if not isinstance(offset, int) or offset < 0 or offset + size_bytes > limit_bytes:
            raise InvalidSource(f"tensor {name!r} of {path} lies outside the file")
        file = spill_number if spilled else number
        tensors[name] = SourceTensor(name, dtype, shape, file, Extent(offset, size_bytes))
    return Table(tuple(tensors.values()), aliases)
