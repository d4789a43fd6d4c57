# SPDX-License-Identifier: Apache-2.0
"""The CUDA driver: lists GPUs, and allocates, exports, maps and registers memory. The native streamer moves bytes.

The daemon and its clients share this module. Importing it needs neither a driver nor `cuda-python`; `gpus()` is empty
if one of them is missing, and `why_none()` says which. Sizes are in bytes; addresses are the device's, as plain
numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from flashd.closing import Closing
from flashd.errors import DeviceFailed, FlashdError, OutOfMemory
from flashd.units import MiB, format_bytes

_OUT_OF_MEMORY = 2
_READ_ONLY = 0x08  # CU_MEMHOSTREGISTER_READ_ONLY
_DEVICE_MAP = 0x02  # CU_MEMHOSTREGISTER_DEVICEMAP


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as described by its driver.

    `is_integrated`: it shares the machine's memory. `reads_host_pages`: its kernels can read all pages of a process, as
    on many discrete cards too. `exports_memory`: its allocations can be passed to other processes as file descriptors,
    which flashd requires. `registers_read_only`: memory mapped read-only can be registered with it; newer drivers
    refuse that.
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
    registers_read_only: bool = True

    @property
    def name(self) -> str:
        """torch's name of the GPU."""
        return f"cuda:{self.ordinal}"

    @property
    def is_unified(self) -> bool:
        """True if the GPU uses host memory as its own, so that a copy would only duplicate data.

        `reads_host_pages` does not tell, because discrete cards do that too, with heterogeneous memory management (HMM)
        or over a coherent link (GH200).
        """
        return self.is_integrated


def gpus() -> list[Gpu]:
    """Lists the GPUs that this process may use."""
    if why_none():
        return []
    return [_describe(ordinal) for ordinal in range(_call("cuDeviceGetCount"))]


def wake_up() -> None:
    """Initialises the driver, which takes a third of a second or more. Errors are left to the first calls."""
    with contextlib.suppress(FlashdError):
        for gpu in gpus():
            context(gpu.ordinal)
            used_bytes(gpu)  # the initialisation of NVML takes as long


@functools.cache
def why_none() -> str:
    """Explains why no GPU can be used; empty if a driver answers."""
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
    """Retains and enters the primary context of a GPU, which torch uses too, and returns it."""
    handle = _call("cuDevicePrimaryCtxRetain", _call("cuDeviceGet", ordinal))
    return int(handle)


def enter(ordinal: int) -> None:
    """Enters the context of a GPU, as every thread must before it calls the following functions."""
    _call("cuCtxSetCurrent", _driver().CUcontext(context(ordinal)))


def synchronize(ordinal: int) -> None:
    """Waits until all GPU work of this process has ended."""
    enter(ordinal)
    _call("cuCtxSynchronize")


def memory_info(ordinal: int) -> tuple[int, int]:
    """Returns (free, total) memory as counted by the driver, including other processes."""
    enter(ordinal)
    free, total = _call("cuMemGetInfo")
    return int(free), int(total)


def rounded(size_bytes: int) -> int:
    """Rounds a size up to that of an allocation. All known cards have a granularity of 2 MiB; `allocate` would detect
    another one. The exact size is needed for mapping an allocation.
    """
    return max(1, -(-size_bytes // (2 * MiB))) * 2 * MiB


def granularity(ordinal: int) -> int:
    """Returns the granularity of allocations."""
    minimum = _driver().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(_call("cuMemGetAllocationGranularity", _properties(ordinal), minimum))


def allocate(ordinal: int, size_bytes: int) -> int:
    """Allocates GPU memory, and returns a descriptor. The memory lives as long as a descriptor or a mapping exists.

    `size_bytes` is a multiple of `granularity`. Raises OutOfMemory or DeviceFailed.
    """
    enter(ordinal)
    try:
        handle = _call("cuMemCreate", size_bytes, _properties(ordinal), 0)
    except OutOfMemory:
        free_bytes, total_bytes = memory_info(ordinal)
        raise OutOfMemory(
            f"cuda:{ordinal} has no {format_bytes(size_bytes)}: {format_bytes(free_bytes)} of "
            f"{format_bytes(total_bytes)} are free, according to its driver",
            hint="end another program that uses the card (see nvidia-smi), or lower memory.device_budget",
        ) from None
    try:
        return int(_call("cuMemExportToShareableHandle", handle, _fd_handle(), 0))
    finally:
        _call("cuMemRelease", handle)


class Window(Closing):
    """A fixed range of addresses at which allocations can be mapped one after another, until `close`.

    Captured graphs, which contain such addresses, use the allocation that is mapped when they run.
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
        """Maps the allocation behind a descriptor at the start of the window, in place of the previous one.

        `mapped_bytes` is the size of the whole allocation. The caller closes the descriptor. The GPU must not use the
        window meanwhile: synchronise first. Raises DeviceFailed, with nothing mapped, if the descriptor is not GPU
        memory, or is larger than the window.
        """
        enter(self._ordinal)
        self.hide()
        if mapped_bytes > self.size_bytes:
            raise DeviceFailed(f"{mapped_bytes} bytes do not fit into a window of {self.size_bytes}")
        handle = _call("cuMemImportFromShareableHandle", fd, _fd_handle())
        try:
            place = _call("cuMemGetAllocationPropertiesFromHandle", handle).location
            if (int(place.type), int(place.id)) != (1, self._ordinal):  # CU_MEM_LOCATION_TYPE_DEVICE
                raise DeviceFailed(f"the memory is not on cuda:{self._ordinal}", hint="it is on another device")
            _call("cuMemMap", self._address, mapped_bytes, 0, handle, 0)
            self._shown_bytes = mapped_bytes
            self._allow(is_writable=is_writable)
        except BaseException:
            self.hide()
            raise
        finally:
            _call("cuMemRelease", handle)  # the mapping keeps the memory alive

    def protect(self) -> None:
        """Makes the current mapping read-only."""
        enter(self._ordinal)
        self._allow(is_writable=False)

    def hide(self) -> None:
        """Unmaps the allocation and keeps the addresses, whose use is then an error. Synchronise first."""
        if self._shown_bytes:
            enter(self._ordinal)
            _call("cuMemUnmap", self._address, self._shown_bytes)
            self._shown_bytes = 0

    def close(self) -> None:
        """Closes it. Synchronise first, because the GPU must not use it any more."""
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


class Mapping(Window):
    """A mapping of GPU memory from a descriptor, until `close`."""

    def __init__(self, ordinal: int, fd: int, size_bytes: int, *, is_writable: bool) -> None:
        """`size_bytes` is the size of the whole allocation. Raises DeviceFailed if the descriptor is not GPU memory."""
        super().__init__(ordinal, size_bytes)
        try:
            self.show(fd, size_bytes, is_writable=is_writable)
        except BaseException:
            self.close()
            raise


class HostView(Closing):
    """A memfd mapped for reading, until `close`."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        """Maps with mmap(2) directly, because the mmap module does not give the address of a read-only mapping."""
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


class Registration(HostView):
    """A memfd mapped for reading and registered with a GPU, which can copy from it, and read it in kernels."""

    def __init__(self, ordinal: int, fd: int, size_bytes: int) -> None:
        """Takes 0.05 s per GB or more. Raises DeviceFailed if the driver cannot register read-only mappings
        (`Gpu.registers_read_only`).
        """
        super().__init__(fd, size_bytes)
        self._ordinal = ordinal
        self._is_registered = False
        try:
            register(ordinal, self.address, size_bytes, is_read_only=True)
            self._is_registered = True
        except BaseException:
            self.close()
            raise

    @property
    def device_address(self) -> int:
        """Address for the GPU's kernels."""
        enter(self._ordinal)
        return int(_call("cuMemHostGetDevicePointer", self.address, 0))

    def close(self) -> None:
        """Closes it. Synchronise first, because the GPU must not use it any more."""
        if self._is_registered:
            unregister(self._ordinal, self.address)
            self._is_registered = False
        super().close()


class WritableRegistration:
    """A read-only mapping of memory that could be mapped writable, registered with a GPU until `close`.

    For drivers that register only writable mappings. It is writable only while the driver pins it, and is never
    written.
    """

    def __init__(self, ordinal: int, address: int, size_bytes: int) -> None:
        """Registers a mapping, which the caller must keep until `close`. Raises DeviceFailed."""
        self.address = address
        self._ordinal = ordinal
        protect(address, size_bytes, is_writable=True)
        try:
            register(ordinal, address, size_bytes)
        finally:
            protect(address, size_bytes, is_writable=False)

    def close(self) -> None:
        """Closes it. Synchronise first, because the GPU must not use it any more."""
        unregister(self._ordinal, self.address)


def protect(address: int, size_bytes: int, *, is_writable: bool) -> None:
    """Sets the protection of whole pages of a mapping (mprotect(2)). Raises OutOfMemory."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
    if _libc().mprotect(address, size_bytes, protection) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise OutOfMemory(f"the protection of {size_bytes} bytes cannot be changed: {reason}")


def register(ordinal: int, address: int, size_bytes: int, *, is_read_only: bool = False) -> None:
    """Pins memory of this process and registers it with a GPU. It must be mapped writable, unless `is_read_only`.

    Raises DeviceFailed.
    """
    enter(ordinal)
    _call("cuMemHostRegister", address, size_bytes, _DEVICE_MAP | (_READ_ONLY if is_read_only else 0))


def unregister(ordinal: int, address: int) -> None:
    enter(ordinal)
    _call("cuMemHostUnregister", address)


def read(ordinal: int, address: int, size_bytes: int) -> bytes:
    """Reads a little of a device's memory; the streamer is for larger amounts."""
    enter(ordinal)
    buffer = ctypes.create_string_buffer(size_bytes)
    _call("cuMemcpyDtoH", ctypes.addressof(buffer), address, size_bytes)
    return buffer.raw


def copy_to_device(ordinal: int, target: int, address: int, size_bytes: int) -> None:
    """Copies registered memory once and waits. Benchmarks compare the streamer with this."""
    enter(ordinal)
    _call("cuMemcpyHtoDAsync", target, address, size_bytes, 0)
    synchronize(ordinal)


def used_bytes(gpu: Gpu) -> int:
    """Returns the memory of a card that all processes use, from NVML, or from the driver if NVML does not answer."""
    with contextlib.suppress(Exception):  # one exception type per cause, and integrated GPUs answer NotSupported
        nvml = _nvml()
        return int(nvml.device_get_memory_info_v2(nvml.device_get_handle_by_uuid(f"GPU-{gpu.uuid}")).used)
    free_bytes, total_bytes = memory_info(gpu.ordinal)
    return total_bytes - free_bytes


def process_bytes(gpu: Gpu) -> dict[int, int]:
    """Returns the memory of a card by process id, as NVML reports it here; empty if it does not."""
    with contextlib.suppress(Exception):  # as above
        nvml = _nvml()
        running = nvml.device_get_compute_running_processes_v3(nvml.device_get_handle_by_uuid(f"GPU-{gpu.uuid}"))
        told = [(int(process.pid), int(process.used_gpu_memory)) for process in running]
        return {pid: used_bytes for pid, used_bytes in told if used_bytes < gpu.total_bytes}  # not "unavailable", -1
    return {}


@functools.cache
def _nvml() -> ModuleType:
    from cuda.bindings import nvml

    nvml.init_v2()
    bindings: ModuleType = nvml
    return bindings


@functools.cache
def _driver() -> ModuleType:
    """Returns the driver's bindings after initialising them. Raises DeviceFailed."""
    try:
        from cuda.bindings import driver
    except ImportError:
        hint = "pip install 'flashd[cuda]'"
        raise DeviceFailed("cuda-python is not installed", hint=hint) from None
    _check(driver.cuInit, 0)
    bindings: ModuleType = driver
    return bindings


def _call(name: str, *arguments: object) -> Any:
    """Calls a driver function, and returns its result or results. Raises OutOfMemory or DeviceFailed."""
    return _check(getattr(_driver(), name), *arguments)


def _check(function: Callable[..., tuple[Any, ...]], *arguments: object) -> Any:
    name = function.__name__
    try:
        status, *results = function(*arguments)
    except RuntimeError as error:  # the driver lacks the entry point
        raise DeviceFailed(f"{name}: {error}", hint="a newer NVIDIA driver may support it") from None
    if int(status) == _OUT_OF_MEMORY:
        raise OutOfMemory(f"{name}: the device is out of memory", hint="evict a model")
    if int(status):
        raise DeviceFailed(f"{name}: {status.name}", hint="see nvidia-smi and the kernel's log (dmesg)")
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
        registers_read_only=has("READ_ONLY_HOST_REGISTER_SUPPORTED"),
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
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
