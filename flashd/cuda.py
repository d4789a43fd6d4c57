# SPDX-License-Identifier: Apache-2.0
"""What can be asked of CUDA's driver? Which GPUs there are, and their memory: made, handed on as a file descriptor,
mapped, registered. Control only: bytes are moved by the native streamer.

The daemon and its clients share this module. Importing it needs neither a driver nor `cuda-python`; `gpus()` is empty
where one of them is missing, and `why_none()` says which. Sizes in bytes; addresses are the device's, as plain numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from flashd.errors import DeviceFailed, FlashdError, OutOfMemory
from flashd.units import MiB, format_bytes

_OUT_OF_MEMORY = 2
_READ_ONLY = 0x08  # CU_MEMHOSTREGISTER_READ_ONLY
_DEVICE_MAP = 0x02  # CU_MEMHOSTREGISTER_DEVICEMAP


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as its driver describes it.

    `is_integrated` and `reads_host_pages`: it shares the machine's memory, and reads any of it. `exports_memory`: its
    allocations can be handed to other processes as file descriptors, which everything here rests on.
    """

    ordinal: int
    model: str
    uuid: str
    total_bytes: int
    is_integrated: bool
    reads_host_pages: bool
    maps_memory: bool
    exports_memory: bool
    registers_memory: bool

    @property
    def name(self) -> str:
        """As torch names it."""
        return f"cuda:{self.ordinal}"

    @property
    def is_unified(self) -> bool:
        """Whether host memory is its memory, so that a copy there would be a second one of the same."""
        return self.is_integrated or self.reads_host_pages


def gpus() -> list[Gpu]:
    """All GPUs that this process may use."""
    if why_none():
        return []
    return [_describe(ordinal) for ordinal in range(_call("cuDeviceGetCount"))]


def wake_up() -> None:
    """Does now what the first calls would do, which takes a third of a second or more; errors are for them to raise."""
    with contextlib.suppress(FlashdError):
        for gpu in gpus():
            context(gpu.ordinal)
            used_bytes(gpu)  # NVML takes as long, once


@functools.cache
def why_none() -> str:
    """Why there is no GPU to be used here; empty if there is a driver that answers."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    try:
        _driver()
    except DeviceFailed as error:
        return f"{error.message} ({error.hint})"
    return ""


@functools.cache
def context(ordinal: int) -> int:
    """The primary context of a GPU, the one that torch uses too, kept from now on; the calling thread is in it then."""
    handle = _call("cuDevicePrimaryCtxRetain", _call("cuDeviceGet", ordinal))
    return int(handle)


def enter(ordinal: int) -> None:
    """Every thread must, before it calls what follows."""
    _call("cuCtxSetCurrent", _driver().CUcontext(context(ordinal)))


def synchronize(ordinal: int) -> None:
    """Returns when the GPU has done all that this process asked of it."""
    enter(ordinal)
    _call("cuCtxSynchronize")


def memory_info(ordinal: int) -> tuple[int, int]:
    """(free, total) by the driver's own account, of which other processes take part."""
    enter(ordinal)
    free, total = _call("cuMemGetInfo")
    return int(free), int(total)


def rounded(size_bytes: int) -> int:
    """What an allocation for so many bytes takes. Every card says 2 MiB; `allocate` would tell if one came to differ,
    and whoever maps an allocation must know its size to the byte."""
    return max(1, -(-size_bytes // (2 * MiB))) * 2 * MiB


def granularity(ordinal: int) -> int:
    """What allocations are rounded up to."""
    minimum = _driver().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(_call("cuMemGetAllocationGranularity", _properties(ordinal), minimum))


def allocate(ordinal: int, size_bytes: int) -> int:
    """A descriptor of fresh memory on a GPU; the memory lives as long as somebody has the descriptor or a mapping.

    `size_bytes` is a multiple of `granularity`. Raises OutOfMemory or DeviceFailed.
    """
    enter(ordinal)
    try:
        handle = _call("cuMemCreate", size_bytes, _properties(ordinal), 0)
    except OutOfMemory:
        free_bytes, total_bytes = memory_info(ordinal)
        raise OutOfMemory(
            f"cuda:{ordinal} has no {format_bytes(size_bytes)}: {format_bytes(free_bytes)} of "
            f"{format_bytes(total_bytes)} are free, by its driver",
            hint="other programs use the card (see nvidia-smi): end one, or lower memory.device_budget",
        ) from None
    try:
        return int(_call("cuMemExportToShareableHandle", handle, _fd_handle(), 0))
    finally:
        _call("cuMemRelease", handle)


class Window:
    """Addresses of this process at which one allocation after the other can be shown, until it is closed.

    Whoever remembers such an address, as captured graphs do, finds there whatever is shown at the time.
    """

    def __init__(self, ordinal: int, size_bytes: int) -> None:
        """`size_bytes` is a multiple of `granularity`. Raises DeviceFailed."""
        enter(ordinal)
        self._ordinal = ordinal
        self.size_bytes = size_bytes
        self._shown_bytes = 0
        self._address = int(_call("cuMemAddressReserve", size_bytes, 0, 0, 0))

    @property
    def address(self) -> int:
        return self._address

    def show(self, fd: int, mapped_bytes: int, *, is_writable: bool) -> None:
        """Maps the allocation behind a descriptor at the start, in place of what was shown before. The descriptor stays
        the caller's; `mapped_bytes` is the whole allocation.

        Nothing on the device may use the window meanwhile: synchronise first. Raises DeviceFailed if the descriptor is
        not of such memory, or of more than the window; then nothing is shown.
        """
        enter(self._ordinal)
        self.hide()
        if mapped_bytes > self.size_bytes:
            raise DeviceFailed(f"{mapped_bytes} bytes cannot be shown in a window of {self.size_bytes}")
        handle = _call("cuMemImportFromShareableHandle", fd, _fd_handle())
        try:
            place = _call("cuMemGetAllocationPropertiesFromHandle", handle).location
            if (int(place.type), int(place.id)) != (1, self._ordinal):  # CU_MEM_LOCATION_TYPE_DEVICE
                raise DeviceFailed(f"that memory is not on cuda:{self._ordinal}", hint="it is on another device")
            _call("cuMemMap", self._address, mapped_bytes, 0, handle, 0)
            self._shown_bytes = mapped_bytes
            self._allow(is_writable=is_writable)
        except BaseException:
            self.hide()
            raise
        finally:
            _call("cuMemRelease", handle)  # the mapping keeps what it needs

    def protect(self) -> None:
        """From here on what is shown may only be read."""
        enter(self._ordinal)
        self._allow(is_writable=False)

    def hide(self) -> None:
        """Shows nothing: the addresses stay, and using them is an error. Synchronise first."""
        if self._shown_bytes:
            enter(self._ordinal)
            _call("cuMemUnmap", self._address, self._shown_bytes)
            self._shown_bytes = 0

    def close(self) -> None:
        """Nothing on the device may use it any more: synchronise first."""
        if self._address:
            self.hide()
            _call("cuMemAddressFree", self._address, self.size_bytes)
            self._address = 0

    def _allow(self, *, is_writable: bool) -> None:
        driver = _driver()
        access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self._ordinal
        flags = driver.CUmemAccess_flags
        access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if is_writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        _call("cuMemSetAccess", self._address, self._shown_bytes, [access], 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Mapping(Window):
    """GPU memory, named by a descriptor, at an address of this process, until it is closed."""

    def __init__(self, ordinal: int, fd: int, size_bytes: int, *, is_writable: bool) -> None:
        """`size_bytes` is the whole allocation. Raises DeviceFailed if the descriptor is not of such memory."""
        super().__init__(ordinal, size_bytes)
        try:
            self.show(fd, size_bytes, is_writable=is_writable)
        except BaseException:
            self.close()
            raise


class HostView:
    """A memfd mapped for reading, until it is closed."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        """mmap(2) by hand: the mmap module gives no address for what is mapped for reading."""
        self.size_bytes = size_bytes
        address = _libc().mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address == ctypes.c_void_p(-1).value:
            reason = os.strerror(ctypes.get_errno())
            raise OutOfMemory(f"{size_bytes} bytes of an arena cannot be mapped: {reason}")
        self.address = int(address)

    def close(self) -> None:
        if self.address:
            _libc().munmap(self.address, self.size_bytes)
            self.address = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Registration(HostView):
    """A memfd mapped for reading and made known to a GPU: copied by the device itself, and readable by its kernels."""

    def __init__(self, ordinal: int, fd: int, size_bytes: int) -> None:
        """Takes 0.05 s a GB or more. Raises DeviceFailed where the driver cannot, as some cannot."""
        super().__init__(fd, size_bytes)
        self._ordinal = ordinal
        self._is_registered = False
        try:
            enter(ordinal)
            _call("cuMemHostRegister", self.address, size_bytes, _READ_ONLY | _DEVICE_MAP)
            self._is_registered = True
        except BaseException:
            self.close()
            raise

    @property
    def device_address(self) -> int:
        """Where the GPU's kernels see it."""
        enter(self._ordinal)
        return int(_call("cuMemHostGetDevicePointer", self.address, 0))

    def close(self) -> None:
        """Nothing on the device may use it any more: synchronise first."""
        if self._is_registered:
            enter(self._ordinal)
            _call("cuMemHostUnregister", self.address)
            self._is_registered = False
        super().close()


def register(ordinal: int, address: int, size_bytes: int) -> None:
    """Makes memory of this process, already present, known to a GPU."""
    enter(ordinal)
    _call("cuMemHostRegister", address, size_bytes, 0)


def unregister(ordinal: int, address: int) -> None:
    enter(ordinal)
    _call("cuMemHostUnregister", address)


def read(ordinal: int, address: int, size_bytes: int) -> bytes:
    """A little of a device's memory; for more there is the streamer."""
    enter(ordinal)
    buffer = ctypes.create_string_buffer(size_bytes)
    _call("cuMemcpyDtoH", ctypes.addressof(buffer), address, size_bytes)
    return buffer.raw


def copy_to_device(ordinal: int, target: int, address: int, size_bytes: int) -> None:
    """One plain copy of registered memory, awaited: what benchmarks hold the streamer's copies against."""
    enter(ordinal)
    _call("cuMemcpyHtoDAsync", target, address, size_bytes, 0)
    synchronize(ordinal)


def used_bytes(gpu: Gpu) -> int:
    """What all processes together use of a card, by NVML; by the driver where NVML does not answer."""
    with contextlib.suppress(Exception):  # one exception type per cause, and integrated GPUs answer NotSupported
        nvml = _nvml()
        return int(nvml.device_get_memory_info_v2(nvml.device_get_handle_by_uuid(f"GPU-{gpu.uuid}")).used)
    free_bytes, total_bytes = memory_info(gpu.ordinal)
    return total_bytes - free_bytes


def process_bytes(gpu: Gpu) -> dict[int, int]:
    """What each process has of a card, by process id, as NVML sees it from here; empty where it does not tell."""
    with contextlib.suppress(Exception):  # as above
        nvml = _nvml()
        running = nvml.device_get_compute_running_processes_v3(nvml.device_get_handle_by_uuid(f"GPU-{gpu.uuid}"))
        told = [(int(process.pid), int(process.used_gpu_memory)) for process in running]
        return {pid: used_bytes for pid, used_bytes in told if used_bytes < gpu.total_bytes}  # not "unavailable", -1
    return {}


@functools.cache
def _nvml() -> Any:
    from cuda.bindings import nvml

    nvml.init_v2()
    return nvml


@functools.cache
def _driver() -> Any:
    """The driver's bindings, initialised. Raises DeviceFailed."""
    try:
        from cuda.bindings import driver
    except ImportError:
        hint = "pip install 'flashd[cuda]'"
        raise DeviceFailed("cuda-python is not installed", hint=hint) from None
    _check(driver.cuInit, 0)
    return driver


def _call(name: str, *arguments: Any) -> Any:
    """The result of a driver call, or its results. Raises OutOfMemory or DeviceFailed."""
    return _check(getattr(_driver(), name), *arguments)


def _check(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    name = function.__name__
    try:
        status, *results = function(*arguments)
    except RuntimeError as error:  # the driver lacks the entry point
        raise DeviceFailed(f"{name}: {error}", hint="a newer NVIDIA driver may have it") from None
    if int(status) == _OUT_OF_MEMORY:
        raise OutOfMemory(f"{name}: the device has no such memory", hint="evict a model")
    if int(status):
        raise DeviceFailed(f"{name}: {status.name}", hint="nvidia-smi and the kernel's log (dmesg) may tell more")
    return results[0] if len(results) == 1 else tuple(results)


def _describe(ordinal: int) -> Gpu:
    device = _call("cuDeviceGet", ordinal)
    names = _driver().CUdevice_attribute

    def has(attribute: str) -> bool:
        return bool(_call("cuDeviceGetAttribute", getattr(names, f"CU_DEVICE_ATTRIBUTE_{attribute}"), device))

    raw = bytes(_call("cuDeviceGetUuid", device).bytes).hex()
    return Gpu(
        ordinal=ordinal,
        model=_call("cuDeviceGetName", 128, device).split(b"\0", 1)[0].decode(),
        uuid="-".join((raw[:8], raw[8:12], raw[12:16], raw[16:20], raw[20:])),
        total_bytes=int(_call("cuDeviceTotalMem", device)),
        is_integrated=has("INTEGRATED"),
        reads_host_pages=has("PAGEABLE_MEMORY_ACCESS"),
        maps_memory=has("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"),
        exports_memory=has("HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED"),
        registers_memory=has("HOST_REGISTER_SUPPORTED"),
    )


def _properties(ordinal: int) -> Any:
    driver = _driver()
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = ordinal
    properties.requestedHandleTypes = _fd_handle()
    return properties


def _fd_handle() -> Any:
    return _driver().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
