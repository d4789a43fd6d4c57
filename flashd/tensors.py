# SPDX-License-Identifier: Apache-2.0
"""Makes torch tensors over the bytes of an arena, without a copy.

torch is imported in functions only, because clients that use no tensors do not need it.
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

from flashd.checkpoint.dtypes import DTYPES
from flashd.checkpoint.header import ALIASES, Header
from flashd.errors import DeviceFailed, InvalidArgument, OutOfMemory, Unsupported
from flashd.io import cuda
from flashd.units import format_bytes

if TYPE_CHECKING:
    import torch

    from flashd.io.streamer import Extent

DTYPES_KEY = "flashd.dtypes"  # in the metadata: a JSON object from names of tensors to torch's names of their dtypes


@dataclass(frozen=True, slots=True)
class StandIn:
    """The stored form of a dtype unknown to safetensors: another dtype, with a longer shape."""

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
    """Returns tensors by name over the data region of a checkpoint, tied tensors under all their names.

    The tensors keep the region alive. The mapping is read-only, so writing to one ends the process (SIGSEGV) or, on a
    GPU, makes its context unusable. Raises Unsupported for dtypes that torch lacks (F4, F6).
    """
    typed = functools.cache(lambda dtype: base[: len(base) // dtype.itemsize * dtype.itemsize].view(dtype))

    def place(extent: Extent, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Places a tensor with a single call of torch, so that a lease of hundreds of tensors takes milliseconds."""
        if extent.offset % dtype.itemsize:
            return base[extent.offset : extent.end].view(dtype).view(shape)  # torch's own error says what is wrong
        whole: torch.Tensor = typed(dtype)
        strides = tuple(itertools.accumulate(shape[:0:-1], operator.mul, initial=1))[::-1] if shape else ()
        return whole.as_strided(shape, strides, whole.storage_offset() + extent.offset // dtype.itemsize)

    return named_tensors(layout, place)


def named_tensors(
    layout: Header, place: Callable[[Extent, torch.dtype, tuple[int, ...]], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns tensors by name like `torch_tensors`, each of them made by `place` from its extent."""
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
    """Maps a leased arena as one tensor of bytes, on the GPU with this UUID.

    `memory` is the kind of memory behind the descriptor: "host" or "cuda". Raises DeviceFailed if this process has no
    such GPU.
    """
    gpu = next((gpu for gpu in cuda.gpus() if gpu.uuid == gpu_uuid), None)
    if gpu is None:
        reason = cuda.why_none() or "include this GPU in CUDA_VISIBLE_DEVICES, or unset that variable"
        raise DeviceFailed(f"the weights are on GPU {gpu_uuid}, which this process cannot use", hint=reason)
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
        if size_bytes:  # the tensor owns it from here on
            on_error.pop_all()
        return tensor


def bytes_tensor(region: memoryview) -> torch.Tensor:
    """Makes one tensor of bytes over all of a region, sharing its memory."""
    import torch

    if not len(region):
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(region, dtype=torch.uint8)


def private_bytes_tensor(fd: int, size_bytes: int) -> torch.Tensor:
    """Maps an arena in host memory privately, as one tensor of bytes: writes change this process's copy of a page.

    The caller still has to close the descriptor. Raises InvalidArgument if the arena is shorter than `size_bytes`, or
    OutOfMemory.
    """
    import torch

    if not size_bytes:
        return torch.empty(0, dtype=torch.uint8)
    if os.fstat(fd).st_size < size_bytes:  # reading a page beyond the end of the file would raise SIGBUS
        raise InvalidArgument(f"the arena has {os.fstat(fd).st_size} bytes, but its layout {size_bytes}")
    with mapping_of(size_bytes):
        mapping = mmap.mmap(fd, size_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    return bytes_tensor(memoryview(mapping))


@contextlib.contextmanager
def mapping_of(size_bytes: int) -> Iterator[None]:
    """Turns the kernel's refusal to map memory of this size into OutOfMemory."""
    try:
        yield
    except OSError as error:
        hint = "raise the limit of the process (ulimit -v), or free memory of the machine"
        raise OutOfMemory(f"{format_bytes(size_bytes)} of memory: {error.strerror}", hint=hint) from None


def device_bytes_tensor(
    mapping: cuda.Window | cuda.HostView, address: int, size_bytes: int, ordinal: int
) -> torch.Tensor:
    """Makes one tensor of bytes over memory that is mapped for a GPU.

    The mapping is closed when the last tensor over it is gone and the GPU's work on it has ended.
    """
    import torch

    if not size_bytes:
        return torch.empty(0, dtype=torch.uint8, device=f"cuda:{ordinal}")
    return torch.as_tensor(_DeviceBytes(mapping, address, size_bytes, ordinal), device=f"cuda:{ordinal}")


class _DeviceBytes:
    """Memory as torch accepts it for a tensor (Numba's CUDA array interface, version 3). The tensor keeps it alive."""

    def __init__(self, mapping: cuda.Window | cuda.HostView, address: int, size_bytes: int, ordinal: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),  # torch rejects memory declared as read-only
            "strides": None,
            "version": 3,
        }
        self._finalizer = weakref.finalize(self, _end, mapping, ordinal)
        self._finalizer.atexit = False  # the driver has ended by then, and all mappings with it


def _end(mapping: cuda.Window | cuda.HostView, ordinal: int) -> None:
    cuda.synchronize(ordinal)
    mapping.close()


def aliases(layout: Header) -> Mapping[str, str]:
    """Maps additional names of tied tensors to the stored names."""
    found = json.loads(layout.metadata.get(ALIASES, "{}"))
    return {alias: name for alias, name in found.items() if isinstance(name, str)}


def stood_in_for(layout: Header) -> Mapping[str, str]:
    """Maps names of tensors that are stored as another dtype to torch's name of their own dtype."""
    found: dict[str, str] = json.loads(layout.metadata.get(DTYPES_KEY, "{}"))
    sound = isinstance(found, dict) and all(isinstance(dtype, str) for dtype in found.values())
    stored = {info.name: (info.dtype, info.shape) for info in layout.tensors}
    for name, dtype in found.items() if sound else ():
        stand_in = STAND_INS.get(dtype)
        kind, shape = stored.get(name, ("", ()))
        if stand_in is None or kind != stand_in.dtype or not _ends_with(shape, stand_in.shape_suffix):
            sound = False
    if not sound:
        raise Unsupported(
            f"{DTYPES_KEY} says what cannot be", hint="update flashd, since a newer version may have written it"
        )
    return found


def _ends_with(shape: tuple[int, ...], suffix: tuple[int, ...]) -> bool:
    return shape[len(shape) - len(suffix) :] == suffix


def _named(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise Unsupported(f"torch {torch.__version__} has no dtype {name}", hint="a newer version may have it")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype in safetensors. Raises Unsupported."""
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
    from flashd.checkpoint.torch_dtypes import TORCH_DTYPES

    # Tensors of 4-bit floats have other shapes in torch, which counts pairs: they are not handed out as such.
    return {name: dtype for name, dtype in TORCH_DTYPES.items() if DTYPES[name].bits >= 8}
