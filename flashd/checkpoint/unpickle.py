# SPDX-License-Identifier: Apache-2.0
"""Where do the tensors of PyTorch files lie? A process of its own, because answering means unpickling.

    python -m flashd.checkpoint.unpickle SPILL_FD LIMITS_JSON SOURCE_FD...

It imports torch, gives up everything it does not need (flashd/sandbox.py), and only then looks at the files, with
`weights_only`: a pickle that calls anything else is refused by torch, and one that gets past torch finds itself without
capabilities, programs, sockets or memory to speak of. Prints one line of JSON for each file: {"tensors": [{name, dtype,
shape, offset, spilled} or {name, same_as}]}; offsets count in the source or, if spilled, in the spill file.

No tensor is read that lies contiguous in its file. The others go to the spill file a part at a time.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import json
import os
import pickle
import re
import signal
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from flashd import sandbox

_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16",
    "bfloat16": "BF16", "int32": "I32", "uint32": "U32", "float32": "F32", "int64": "I64", "uint64": "U64",
    "float64": "F64", "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4",
}  # fmt: skip
# The youngest of them are not in every torch that will do.
DTYPES = {getattr(torch, name): dtype for name, dtype in _DTYPES.items() if hasattr(torch, name)}
# Where trainers put the weights in a larger dictionary.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "weights", "params")
_WANTED = re.compile(r"GLOBAL (\S+)")  # in what torch says of a pickle that calls something
MAX_DEPTH = 4
PART_BYTES = 64 << 20


class Refused(Exception):
    """The file is not what we read; the message says why, for the user."""


class FileMap:
    """Which addresses of this process stand for which bytes of the source."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, int]] = []  # start, end, offset in the file
        self._unread: set[int] = set()

    def add(self, start: int, size_bytes: int, offset: int, *, unread: bool = False) -> None:
        """`unread` memory only stands for its bytes, and does not hold them yet."""
        if size_bytes:
            place = bisect.bisect(self._starts, start)
            self._starts.insert(place, start)
            self._ranges.insert(place, (start, start + size_bytes, offset))
            if unread:
                self._unread.add(start)

    def add_mappings(self) -> None:
        """What is mapped from the file now: /proc/self/maps (proc(5))."""
        status = os.fstat(self._fd)
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
        with open("/proc/self/maps") as maps:  # noqa: PTH123
            for line in maps:
                addresses, _, offset, where, inode, *_ = line.split()
                if where == device and int(inode) == status.st_ino:
                    start, end = (int(part, 16) for part in addresses.split("-"))
                    self.add(start, end - start, int(offset, 16))

    def offset_of(self, address: int, size_bytes: int) -> int | None:
        if not size_bytes:
            return 0
        start, end, offset = self._around(address)
        return offset + address - start if start <= address and address + size_bytes <= end else None

    def read(self, address: int) -> None:
        """Makes the bytes at an address what the file holds, if they only stood for it."""
        start, end, offset = self._around(address)
        if start not in self._unread or address >= end:
            return
        self._unread.discard(start)
        rest = _bytes_at(start, end - start)
        while len(rest):
            count = os.preadv(self._fd, [rest], offset)
            if not count:
                raise Refused("it is cut short")
            rest, offset = rest[count:], offset + count

    def _around(self, address: int) -> tuple[int, int, int]:
        place = bisect.bisect(self._starts, address)
        return self._ranges[place - 1] if place else (0, 0, 0)


class Spill:
    """The file for tensors that are not contiguous in the source."""

    def __init__(self, fd: int, limit_bytes: int) -> None:
        self._fd = fd
        self._limit_bytes = limit_bytes
        self._end = 0

    def add(self, tensor: torch.Tensor) -> int:
        """Appends a tensor, in C order; returns its offset."""
        offset = self._end
        self._end += tensor.numel() * tensor.element_size()
        if self._end > self._limit_bytes:
            raise Refused(f"its views unpack to more than {self._limit_bytes} bytes")
        for part in _parts(tensor):
            rest = _bytes_at(part.data_ptr(), part.numel() * part.element_size())
            while len(rest):
                rest = rest[os.write(self._fd, rest) :]
        return offset


def _bytes_at(address: int, size_bytes: int) -> memoryview:
    return memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor in C order as contiguous parts of at most `PART_BYTES`, however large its strides let it be."""
    size_bytes = tensor.numel() * tensor.element_size()
    if not size_bytes:
        return
    if size_bytes <= PART_BYTES:
        yield tensor.resolve_conj().resolve_neg().contiguous()
        return
    rows = max(1, PART_BYTES // (size_bytes // tensor.shape[0]))
    for start in range(0, tensor.shape[0], rows):
        part = tensor.narrow(0, start, min(rows, tensor.shape[0] - start))
        yield from _parts(part[0] if rows == 1 else part)


@contextmanager
def _left_in_the_file(file_map: FileMap) -> Iterator[None]:
    """Storages of the format before torch 1.6, which cannot be mapped, are not read but noted.

    Such a file ends with its storages, each an int64 count of elements and the bytes (torch/serialization.py,
    `_legacy_load`). Their memory has been allocated, but what nobody touches takes none. A torch that reads them in
    another way than this is not hindered, and needs the memory.
    """

    def note(storage: torch.UntypedStorage, file: Any, offset: int | None, _real: bool, element_bytes: int) -> None:
        if offset is not None:
            file.seek(offset)
        (count,) = struct.unpack("<q", file.read(8))
        if count * element_bytes != storage.nbytes():
            raise Refused("the sizes of its storages contradict each other")
        file_map.add(storage.data_ptr(), storage.nbytes(), file.tell(), unread=True)
        file.seek(storage.nbytes(), os.SEEK_CUR)

    original = torch.UntypedStorage._set_from_file
    torch.UntypedStorage._set_from_file = note
    try:
        yield
    finally:
        torch.UntypedStorage._set_from_file = original


def load(fd: int, file_map: FileMap) -> Any:
    """What torch makes of the file. Its own words for what it refuses tell how to have everything in it called."""
    try:
        return _loaded(fd, file_map)
    except pickle.UnpicklingError as error:
        wanted = _WANTED.search(str(error))
        why = (
            f"it wants {wanted[1]}, and only tensors are made"
            if wanted
            else "it is a pickle of other things than tensors"
        )
        raise Refused(why) from None


def _loaded(fd: int, file_map: FileMap) -> Any:
    """Mapped where its format allows it, else left unread."""
    path = f"/proc/self/fd/{fd}"
    try:
        document = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        with _left_in_the_file(file_map):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    file_map.add_mappings()
    return document


def state_dict(document: Any, depth: int = 0) -> dict[str, torch.Tensor]:
    """The dictionary of tensors in what was loaded, at the top or where trainers nest it."""
    if not isinstance(document, Mapping):
        raise Refused(f"it holds a {type(document).__name__}, not a dictionary of tensors")
    inner = {name: value for name, value in document.items() if isinstance(value, Mapping) and value}
    # Before the tensors beside it: {"state_dict": {...}, "best_loss": tensor(0.3)} is common.
    for wrapper in WRAPPERS:
        if wrapper in inner and depth < MAX_DEPTH:
            return state_dict(inner[wrapper], depth + 1)
    tensors = {name: value for name, value in document.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise Refused("it holds no dictionary of tensors")
    if not all(isinstance(name, str) for name in tensors):
        raise Refused("its tensors are not named")
    return tensors


def table(tensors: Mapping[str, torch.Tensor], file_map: FileMap, spill: Spill) -> Iterator[dict[str, Any]]:
    seen: dict[tuple[Any, ...], str] = {}
    for name, parameter in tensors.items():
        tensor = parameter.detach()
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise Refused(f"tensor {name!r} is sparse, quantised by torch or without data")
        if tensor.dtype not in DTYPES:
            raise Refused(f"tensor {name!r} has the dtype {tensor.dtype}, which safetensors cannot hold")
        lies_so = not tensor.is_conj() and not tensor.is_neg()
        same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        if tensor.numel() and same in seen:
            yield {"name": name, "same_as": seen[same]}
            continue
        seen[same] = name
        offset = None
        if lies_so and tensor.is_contiguous():
            offset = file_map.offset_of(tensor.data_ptr(), tensor.numel() * tensor.element_size())
        spilled = offset is None
        if spilled:
            file_map.read(tensor.untyped_storage().data_ptr())
            offset = spill.add(tensor)
        entry = {"name": name, "dtype": DTYPES[tensor.dtype], "shape": _shape(name, tensor)}
        yield entry | {"offset": offset, "spilled": spilled}


def _shape(name: str, tensor: torch.Tensor) -> list[int]:
    """The shape in elements: torch counts pairs of 4-bit floats, safetensors each of them."""
    shape = list(tensor.shape)
    if DTYPES[tensor.dtype] == "F4":
        if not shape:
            raise Refused(f"tensor {name!r} is a pair of numbers without a shape")
        shape[-1] *= 2
    return shape


def main() -> None:
    spill_fd, *source_fds = (int(fd) for fd in (sys.argv[1], *sys.argv[3:]))
    limits = sandbox.Limits(**json.loads(sys.argv[2]))
    torch.set_num_threads(1)
    sandbox.restrict(limits, sockets=False)
    sandbox.end_with_parent(signal.SIGKILL)
    spill = Spill(spill_fd, limits.file_bytes or 0)
    try:
        for fd in source_fds:
            file_map = FileMap(fd)
            print(json.dumps({"tensors": list(table(state_dict(load(fd, file_map)), file_map, spill))}), flush=True)
    except Refused as refusal:
        sys.exit(str(refusal))
    except Exception as error:  # noqa: BLE001 -- whatever torch raises for a bad file is the answer, in one line
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            sys.exit(error.errno)
        first = str(error).strip().split("\n", 1)[0]
        sys.exit(f"{type(error).__name__}: {first}")


if __name__ == "__main__":
    main()
