# SPDX-License-Identifier: Apache-2.0
"""How do the bytes of an arena become torch tensors without a copy?

Imports torch only when called: clients that do not ask for tensors do not need it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import mmap
import operator
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashd import cuda
from flashd.checkpoint.header import ALIASES, Header
from flashd.errors import DeviceFailed, InvalidArgument, OutOfMemory, Unsupported
from flashd.units import format_bytes

if TYPE_CHECKING:
    import torch

    from flashd.streamer import Extent

DTYPES = "flashd.dtypes"  # in the metadata: a JSON object from names of tensors to what torch calls their dtype


@dataclass(frozen=True, slots=True)
class StandIn:
    """How a tensor of a dtype that safetensors does not know is stored: as another dtype, of a longer shape."""

    dtype: str
    shape_suffix: tuple[int, ...] = ()


STAND_INS = {
    "complex128": StandIn("F64", (2,)),
    "complex32": StandIn("F16", (2,)),
    "bits16": StandIn("U16"),
    **{f"{sign}int{bits}": StandIn("U8") for sign in ("", "u") for bits in range(1, 8)},
    **dict.fromkeys(("float4_e2m1fn_x2", "bits8", "bits1x8", "bits2x4", "bits4x2"), StandIn("U8")),
}


def torch_tensors(base: torch.Tensor, layout: Header) -> dict[str, torch.Tensor]:
    """Tensors by name over the data region of a checkpoint, tied ones under all their names.

    They keep the region alive and are for reading: the mapping is read-only, so writing to one ends the process
    (SIGSEGV), or, on a GPU, the use of its context. Raises Unsupported for dtypes that torch has not (F4, F6).
    """
    typed = functools.cache(lambda dtype: base[: len(base) // dtype.itemsize * dtype.itemsize].view(dtype))

    def place(extent: Extent, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """One call of torch's a tensor: a model has hundreds, and a lease of it is to cost milliseconds."""
        if extent.offset % dtype.itemsize:
            return base[extent.offset : extent.end].view(dtype).view(shape)  # torch says what is wrong with it
        whole: torch.Tensor = typed(dtype)
        strides = tuple(itertools.accumulate(shape[:0:-1], operator.mul, initial=1))[::-1] if shape else ()
        return whole.as_strided(shape, strides, whole.storage_offset() + extent.offset // dtype.itemsize)

    return named_tensors(layout, place)


def named_tensors(
    layout: Header, place: Callable[[Extent, torch.dtype, tuple[int, ...]], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors by name, each where `place` says that its extent is; otherwise like `torch_tensors`."""
    dtypes = stood_in_for(layout)
    tensors = {}
    for info in layout.tensors:
        dtype, shape = _dtype(info.dtype), info.shape
        if original := dtypes.get(info.name):
            dtype, shape = _named(original), shape[: len(shape) - len(STAND_INS[original].shape_suffix)]
        tensors[info.name] = place(info.extent, dtype, shape)
    tensors |= {alias: tensors[name] for alias, name in aliases(layout).items()}
    return tensors


def mapped(fd: int, size_bytes: int, mapped_bytes: int, *, memory: str, gpu_uuid: str) -> torch.Tensor:
    """One tensor of bytes over a leased arena, on the GPU of that uuid.

    `memory` says what the descriptor is of: host, or cuda. Raises DeviceFailed if this process has no such GPU.
    """
    gpu = next((gpu for gpu in cuda.gpus() if gpu.uuid == gpu_uuid), None)
    if gpu is None:
        reason = cuda.why_none() or "CUDA_VISIBLE_DEVICES hides it from this process"
        raise DeviceFailed(f"the weights are on GPU {gpu_uuid}, which is not to be used here", hint=reason)
    cuda.enter(gpu.ordinal)
    with contextlib.ExitStack() as on_error:
        mapping: cuda.Mapping | cuda.HostView
        if memory == "cuda":
            mapping = on_error.enter_context(cuda.Mapping(gpu.ordinal, fd, mapped_bytes, is_writable=False))
            address = mapping.address
        elif gpu.reads_host_pages:
            mapping = on_error.enter_context(cuda.HostView(fd, mapped_bytes))
            address = mapping.address
        else:
            mapping = registration = on_error.enter_context(cuda.Registration(gpu.ordinal, fd, mapped_bytes))
            address = registration.device_address
        tensor = device_bytes_tensor(mapping, address, size_bytes, gpu.ordinal)
        if size_bytes:  # the tensor keeps it from here on
            on_error.pop_all()
        return tensor


def bytes_tensor(region: memoryview) -> torch.Tensor:
    """One tensor of bytes over all of a region, sharing its memory."""
    import torch

    if not len(region):
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(region, dtype=torch.uint8)


def private_bytes_tensor(fd: int, size_bytes: int) -> torch.Tensor:
    """One tensor of bytes over an arena in host memory, mapped privately: whoever writes to it changes their own copy
    of that page. The descriptor stays the caller's. Raises InvalidArgument if the arena is shorter than that, and
    OutOfMemory."""
    import torch

    if not size_bytes:
        return torch.empty(0, dtype=torch.uint8)
    if os.fstat(fd).st_size < size_bytes:  # a page beyond the end of a file is a SIGBUS
        raise InvalidArgument(f"the arena has {os.fstat(fd).st_size} bytes, and its layout says {size_bytes}")
    with mapping_of(size_bytes):
        mapping = mmap.mmap(fd, size_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    return bytes_tensor(memoryview(mapping))


@contextlib.contextmanager
def mapping_of(size_bytes: int) -> Iterator[None]:
    """Raises OutOfMemory if the kernel maps nothing so large."""
    try:
        yield
    except OSError as error:
        hint = "this process may not take more (ulimit -v), or the machine has no more"
        raise OutOfMemory(f"{format_bytes(size_bytes)} of memory: {error.strerror}", hint=hint) from None


def device_bytes_tensor(
    mapping: cuda.Window | cuda.HostView, address: int, size_bytes: int, ordinal: int
) -> torch.Tensor:
    """One tensor of bytes over memory that is mapped for a GPU; the mapping is closed when the last tensor over it is
    gone and the GPU has done with it."""
    import torch

    if not size_bytes:
        return torch.empty(0, dtype=torch.uint8, device=f"cuda:{ordinal}")
    return torch.as_tensor(_DeviceBytes(mapping, address, size_bytes, ordinal), device=f"cuda:{ordinal}")


class _DeviceBytes:
    """What torch takes tensors from (Numba's CUDA array interface, version 3), and keeps as long as they live."""

    def __init__(self, mapping: cuda.Window | cuda.HostView, address: int, size_bytes: int, ordinal: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),  # torch refuses to hear of memory that is for reading only
            "strides": None,
            "version": 3,
        }
        self._finalizer = weakref.finalize(self, _end, mapping, ordinal)
        self._finalizer.atexit = False  # the driver is gone by then, and takes all mappings with it


def _end(mapping: cuda.Window | cuda.HostView, ordinal: int) -> None:
    cuda.synchronize(ordinal)
    mapping.close()


def aliases(layout: Header) -> Mapping[str, str]:
    """Further name → stored name, of tensors that are stored once."""
    found = json.loads(layout.metadata.get(ALIASES, "{}"))
    return {alias: name for alias, name in found.items() if isinstance(name, str)}


def stood_in_for(layout: Header) -> Mapping[str, str]:
    """Name → torch's name of the dtype, for tensors that are stored as another."""
    found: dict[str, str] = json.loads(layout.metadata.get(DTYPES, "{}"))
    sound = isinstance(found, dict) and all(isinstance(dtype, str) for dtype in found.values())
    stored = {info.name: (info.dtype, info.shape) for info in layout.tensors}
    for name, dtype in found.items() if sound else ():
        stand_in = STAND_INS.get(dtype)
        kind, shape = stored.get(name, ("", ()))
        if stand_in is None or kind != stand_in.dtype or not _ends_with(shape, stand_in.shape_suffix):
            sound = False
    if not sound:
        raise Unsupported(f"{DTYPES} says what cannot be", hint="a newer flashd may have written it: update this one")
    return found


def _ends_with(shape: tuple[int, ...], suffix: tuple[int, ...]) -> bool:
    return shape[len(shape) - len(suffix) :] == suffix


def _named(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise Unsupported(f"torch {torch.__version__} has no dtype {name}", hint="a newer one may have it")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """How safetensors names it. Raises Unsupported."""
    for name, known in _dtypes().items():
        if known is dtype:
            return name
    raise Unsupported(f"safetensors has no name for {dtype}")


def _dtype(name: str) -> torch.dtype:
    if name not in _dtypes():
        raise Unsupported(f"torch has no dtype for {name}", hint="read these tensors with the safetensors library")
    return _dtypes()[name]


@functools.cache
def _dtypes() -> Mapping[str, torch.dtype]:
    import torch

    return {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
        "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
        "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64, "C64": torch.complex64,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
    }  # fmt: skip
