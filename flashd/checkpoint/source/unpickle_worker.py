# SPDX-License-Identifier: Apache-2.0
"""Reports the places of tensors in PyTorch files, in a separate process, because that requires unpickling.

    python -m flashd.checkpoint.source.unpickle_worker SPILL_FD LIMITS_JSON SOURCE_FD...

It imports torch, gives up everything it does not need (flashd/io/sandbox.py), and only then looks at the files, with
`weights_only`: a pickle that calls anything else is refused by torch, and one that gets past torch finds itself without
capabilities, programs, sockets or memory to speak of. Prints one line of JSON for each file: {"tensors": [{name, dtype,
shape, offset, spilled} or {name, same_as}]}; offsets count in the source or, if spilled, in the spill file.

Tensors that are contiguous in their file are not read. The others are written to the spill file part by part.
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
from typing import BinaryIO

import torch

from flashd.checkpoint.torch_dtypes import TORCH_DTYPES
from flashd.io import sandbox

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Where trainers put the weights in a larger dictionary.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "weights", "params")
_WANTED = re.compile(r"GLOBAL (\S+)")  # in what torch says of a pickle that calls something
# In what torch says of a file that ends too early.
_CUT = ("PytorchStreamReader", "unexpected EOF", "central directory", "unexpected end")
MAX_DEPTH = 4
MAX_STAND_INS = 50
PART_BYTES = 64 << 20


class Refused(Exception):
    """Raised for a file that cannot be read, with a message for the user."""


class FileMap:
    """Addresses of this process that correspond to bytes of the source."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, int]] = []  # start, end, offset in the file
        self._unread: set[int] = set()

    def add(self, start: int, size_bytes: int, offset: int, *, unread: bool = False) -> None:
        """Adds a range of addresses. `unread` memory does not contain the bytes yet."""
        if size_bytes:
            place = bisect.bisect(self._starts, start)
            self._starts.insert(place, start)
            self._ranges.insert(place, (start, start + size_bytes, offset))
            if unread:
                self._unread.add(start)

    def add_mappings(self) -> None:
        """Adds the current mappings of the file, from /proc/self/maps (proc(5))."""
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
        """Reads the bytes of unread memory at an address from the file."""
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
        """Appends a tensor in C order, and returns its offset."""
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
    """Yields a tensor in C order as contiguous parts of at most `PART_BYTES`, however large its strides make it."""
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

    def note(
        storage: torch.UntypedStorage, file: BinaryIO, offset: int | None, _real: bool, element_bytes: int
    ) -> None:
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


class StandIn:
    """Takes the place of an object that is no tensor: made without calling anything of its own, and empty.

    Trainers write such things beside the weights: the arguments of the program, numpy's numbers, a scheduler. Each
    class in a file gets a subclass of this one; `wanted` is the name of the class.
    """

    wanted = ""

    def __init__(self, *arguments: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _unwanted(wanted: str) -> Refused:
    return Refused(f"it wants {wanted}, and only tensors are made")


def load(fd: int, file_map: FileMap) -> object:
    """Loads the file with torch, with a `StandIn` for each object that would require a call.

    torch's own messages are replaced, because they explain how to permit all calls.
    """
    stood_in: list[str] = []
    while True:
        try:
            return _loaded(fd, file_map)
        except pickle.UnpicklingError as error:
            found = _WANTED.search(str(error))
            is_new = found is not None and found[1] not in stood_in and len(stood_in) < MAX_STAND_INS
            if found is None or not is_new or "not an allowed global" not in str(error):
                names = [*stood_in, *([found[1]] if found else [])]
                raise (
                    _unwanted(names[0]) if names else Refused("it is a pickle of other things than tensors")
                ) from None
            stood_in.append(found[1])
            kind = type("StandIn", (StandIn,), {"wanted": found[1]})
            torch.serialization.add_safe_globals([(kind, found[1])])
        except (EOFError, RuntimeError) as error:
            if isinstance(error, EOFError) or any(sign in str(error) for sign in _CUT):
                raise Refused("it is cut short, damaged, or no file of PyTorch's") from None
            raise


def _loaded(fd: int, file_map: FileMap) -> object:
    """Loads the file mapped if its format permits it, else with unread storages."""
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


def state_dict(document: object, depth: int = 0) -> dict[str, torch.Tensor]:
    """Finds the dictionary of tensors in a loaded document, at the top or where trainers nest it."""
    if isinstance(document, StandIn):
        raise _unwanted(document.wanted)
    if not isinstance(document, Mapping):
        raise Refused(f"it holds a {type(document).__name__}, not a dictionary of tensors")
    inner = {name: value for name, value in document.items() if isinstance(value, Mapping) and value}
    # Before the tensors beside it: {"state_dict": {...}, "best_loss": tensor(0.3)} is common.
    for wrapper in WRAPPERS:
        if wrapper in inner and depth < MAX_DEPTH:
            return state_dict(inner[wrapper], depth + 1)
    tensors = {name: value for name, value in document.items() if isinstance(value, torch.Tensor)}
    # Beside the dictionary of tensors such things are common. In it, one may be a weight.
    if strange := next((value for value in document.values() if isinstance(value, StandIn)), None):
        raise _unwanted(strange.wanted)
    if not tensors:
        raise Refused("it holds no dictionary of tensors")
    if not all(isinstance(name, str) for name in tensors):
        raise Refused("its tensors are not named")
    return tensors


def table(tensors: Mapping[str, torch.Tensor], file_map: FileMap, spill: Spill) -> Iterator[dict[str, object]]:
    seen: dict[tuple[object, ...], str] = {}
    for name, parameter in tensors.items():
        tensor = parameter.detach()
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise Refused(f"tensor {name!r} is sparse, quantised by torch or without data")
        if tensor.dtype not in _NAMES:
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
        entry = {"name": name, "dtype": _NAMES[tensor.dtype], "shape": _shape(name, tensor)}
        yield entry | {"offset": offset, "spilled": spilled}


def _shape(name: str, tensor: torch.Tensor) -> list[int]:
    """Returns the shape in elements, because torch counts pairs of 4-bit floats, but safetensors single ones."""
    shape = list(tensor.shape)
    if _NAMES[tensor.dtype] == "F4":
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
