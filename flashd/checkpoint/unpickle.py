# SPDX-License-Identifier: Apache-2.0
"""Where do the tensors of a PyTorch file lie? A process of its own, because answering means unpickling.

    python -m flashd.checkpoint.unpickle SOURCE_FD SPILL_FD LIMITS_JSON

It imports torch, gives up everything it does not need (flashd/sandbox.py), and only then looks at the file, with
`weights_only`: a pickle that calls anything else is refused by torch, and one that gets past torch finds itself without
capabilities, network or memory to speak of. Prints {"tensors": [{name, dtype, shape, offset, spilled} or {name,
same_as}]}; offsets count in the source or, if spilled, in the spill file.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from flashd import sandbox

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.uint16: "U16",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
    torch.int64: "I64", torch.uint64: "U64", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
# Where trainers put the weights in a larger dictionary.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "weights", "params")
MAX_DEPTH = 4


class Refused(Exception):
    """The file is not what we read; the message says why, for the user."""


class FileMap:
    """Which addresses of this process are which bytes of the source: /proc/self/maps (proc(5))."""

    def __init__(self, fd: int) -> None:
        status = os.fstat(fd)
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
        self._ranges: list[tuple[int, int, int]] = []
        with open("/proc/self/maps") as maps:  # noqa: PTH123
            for line in maps:
                addresses, _, offset, where, inode, *_ = line.split()
                if where == device and int(inode) == status.st_ino:
                    start, end = (int(part, 16) for part in addresses.split("-"))
                    self._ranges.append((start, end, int(offset, 16)))

    def offset_of(self, address: int, size_bytes: int) -> int | None:
        for start, end, offset in self._ranges:
            if start <= address and address + size_bytes <= end:
                return offset + address - start
        return None


class Spill:
    """The file for tensors that are not contiguous in the source."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = 0

    def add(self, address: int, size_bytes: int) -> int:
        offset = self._end
        rest = memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B") if size_bytes else b""
        while len(rest):
            rest = rest[os.write(self._fd, rest) :]
        self._end += size_bytes
        return offset


def load(path: str) -> Any:
    """What torch makes of the file: mapped where its format allows it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # The format before torch 1.6 cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=False)


def state_dict(document: Any, depth: int = 0) -> dict[str, torch.Tensor]:
    """The dictionary of tensors in what was loaded, at the top or where trainers nest it."""
    if not isinstance(document, Mapping):
        raise Refused(f"it holds a {type(document).__name__}, not a dictionary of tensors")
    tensors = {name: value for name, value in document.items() if isinstance(value, torch.Tensor)}
    if tensors:
        if not all(isinstance(name, str) for name in tensors):
            raise Refused("its tensors are not named")
        return tensors
    for wrapper in WRAPPERS:
        if depth < MAX_DEPTH and isinstance(document.get(wrapper), Mapping):
            return state_dict(document[wrapper], depth + 1)
    raise Refused("it holds no dictionary of tensors")


def table(tensors: Mapping[str, torch.Tensor], file_map: FileMap, spill: Spill) -> Iterator[dict[str, Any]]:
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise Refused(f"tensor {name!r} is sparse, quantised by torch or without data")
        if tensor.dtype not in DTYPES:
            raise Refused(f"tensor {name!r} has the dtype {tensor.dtype}, which safetensors cannot hold")
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        size_bytes = plain.numel() * plain.element_size()
        same = (
            tensor.data_ptr(),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            tensor.is_conj(),
            tensor.is_neg(),
        )
        if size_bytes and same in seen:
            yield {"name": name, "same_as": seen[same]}
            continue
        seen[same] = name
        offset = file_map.offset_of(plain.data_ptr(), size_bytes)
        spilled = offset is None
        if spilled:
            offset = spill.add(plain.data_ptr(), size_bytes)
        shape = list(plain.shape)
        yield {"name": name, "dtype": DTYPES[plain.dtype], "shape": shape, "offset": offset, "spilled": spilled}


def main() -> None:
    source_fd, spill_fd = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    sandbox.restrict(sandbox.Limits(**json.loads(sys.argv[3]), open_files=64))
    try:
        tensors = state_dict(load(f"/proc/self/fd/{source_fd}"))
        entries = list(table(tensors, FileMap(source_fd), Spill(spill_fd)))
    except Refused as refusal:
        sys.exit(str(refusal))
    except Exception as error:  # noqa: BLE001 -- whatever torch raises for a bad file is the answer, in one line
        first = str(error).strip().split("\n", 1)[0]
        sys.exit(f"{type(error).__name__}: {first}")
    json.dump({"tensors": entries}, sys.stdout)


if __name__ == "__main__":
    main()
