# SPDX-License-Identifier: Apache-2.0
"""Moves bytes between files and memory at the disk's speed: the typed interface of the native streamer.

Plan, then execute: a plan is plain arithmetic (`Read`, `Piece`), and a `Transfer` carries it out in native threads,
without the interpreter lock. Everything is in bytes and seconds.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Literal, Self

import flashd._native as _native  # noqa: PLR0402 -- else mypy does not notice when the types are built
from flashd.errors import (
    Cancelled,
    CorruptCheckpoint,
    DeviceFailed,
    FlashdError,
    InvalidArgument,
    OutOfMemory,
    StoreFull,
    TransferFailed,
)
from flashd.units import GiB, MiB

ALIGNMENT = 4096  # alignment of offset, length and address for O_DIRECT that all devices accept (open(2))
_LARGEST_BLOCK = GiB
_DEEPEST = 1024
_DIGEST_BYTES = 32
_CUDA_OUT_OF_MEMORY = 2


class Backend(StrEnum):
    AUTO = "auto"
    IO_URING = "io_uring"
    THREADS = "threads"


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range in a file."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A descriptor, which the caller closes, and its name for messages."""

    fd: int
    path: str


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a transfer. The defaults were chosen by measurement (tests/bench/results)."""

    block_bytes: int = 8 * MiB
    depth: int = 12  # requests in flight, or threads without io_uring
    backend: Backend = Backend.AUTO
    direct: bool = True
    # One populates 10 GB/s of huge pages, but no more than 2 of ordinary ones. 0: one a processor, four at most.
    populate_threads: int = 0
    digest_threads: int = 2
    copy_threads: int = 0  # for memory that no device can copy by itself; 0: one a processor, sixteen at most
    piece_bytes: int = 2 * MiB  # what such a thread sends to a device at once
    pieces: int = 4  # and how many of them are on their way while it fills the next; all must fit into a cache
    page_cache: bool = True  # take what the page cache has; otherwise O_DIRECT passes it by
    on_start: Callable[[Transfer], None] | None = None  # called for every new transfer, in the calling thread

    def _native(self) -> _native.Options:
        if self.block_bytes <= 0 or self.block_bytes % ALIGNMENT:
            hint = f"use a multiple of {ALIGNMENT}, for example 8MiB"
            raise InvalidArgument(f"{self.block_bytes} bytes is not a valid block size", hint=hint)
        if self.block_bytes > _LARGEST_BLOCK:  # a read(2) moves a little less than 2 GiB at most
            raise InvalidArgument(f"{self.block_bytes} bytes is too large a block", hint="use 1GiB or less")
        if not 1 <= self.depth <= _DEEPEST:
            raise InvalidArgument(
                f"{self.depth} is not a valid number of requests in flight", hint=f"use 1 to {_DEEPEST}"
            )
        if min(self.populate_threads, self.copy_threads) < 0 or self.digest_threads < 1:
            raise InvalidArgument("a transfer needs at least one thread for each of its tasks")
        if self.piece_bytes < ALIGNMENT or self.pieces < 1:
            raise InvalidArgument(f"{self.pieces} pieces of {self.piece_bytes} bytes cannot be on their way")
        return _native.Options(
            self.block_bytes,
            self.depth,
            _native.Backend[self.backend.name],
            self.direct,
            self.populate_threads,
            self.digest_threads,
            self.copy_threads,
            self.piece_bytes,
            self.pieces,
            self.page_cache,
        )


@dataclass(frozen=True, slots=True)
class Read:
    """Bytes of file number `file` for an offset of the memory."""

    file: int
    file_offset: int
    memory_offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of file number `file` for an offset of the target file's region."""

    file: int
    source_offset: int
    target_offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Digests:
    """32-byte BLAKE3 digests of consecutive blocks of a data region; the last block may be short."""

    block_bytes: int
    table: bytes

    def part(self, offset: int, length: int) -> Digests:
        """Returns the digests of an extent of the region, which must begin at a block."""
        first, last = offset // self.block_bytes, -(-(offset + length) // self.block_bytes)
        return Digests(self.block_bytes, self.table[first * _DIGEST_BYTES : last * _DIGEST_BYTES])

    def _check_count(self, size_bytes: int, path: str) -> None:
        blocks = -(-size_bytes // self.block_bytes) if self.block_bytes > 0 else 0
        if self.block_bytes <= 0 or len(self.table) != blocks * _DIGEST_BYTES:
            raise CorruptCheckpoint(
                f"{path} has {len(self.table) / _DIGEST_BYTES:g} digests for {blocks} blocks",
                hint="remove the model and convert its source again",
            )


@dataclass(frozen=True, slots=True)
class TransferResult:
    """The outcome of a transfer and its cost.

    `fallback` is the reason why the fastest way was not used; empty if it was. `staging_bytes` is the peak use of
    staging memory.
    """

    size_bytes: int
    seconds: float
    cpu_seconds: float
    populate_cpu_seconds: float
    digest_cpu_seconds: float
    backend: Backend
    direct: bool
    fixed_files: bool
    fixed_buffers: bool
    block_bytes: int
    depth: int
    staging_bytes: int
    fallback: str
    digests: bytes

    @property
    def gb_per_s(self) -> float:
        return self.size_bytes / self.seconds / 1e9 if self.seconds else 0.0


class Transfer:
    """A running transfer. Leaving its context cancels it, if it is still running, and waits for its end.

    Files and memory must stay open and mapped until it has ended.
    """

    def __init__(self, native: _native.Transfer) -> None:
        self._transfer = native

    @property
    def total_bytes(self) -> int:
        return self._transfer.total

    @property
    def done_bytes(self) -> int:
        return self._transfer.done

    @property
    def finished(self) -> bool:
        return self._transfer.finished

    def cancel(self) -> None:
        """Requests its end. Requests in flight (96 MiB by default) still have to be awaited."""
        self._transfer.cancel()

    def wait(self, timeout_s: float | None = None) -> TransferResult:
        """Waits for the end, without the interpreter lock.

        Raises TimeoutError if it is still running after `timeout_s`, or the error with which it ended: Cancelled,
        TransferFailed, StoreFull (no space) or CorruptCheckpoint (a digest does not match).
        """
        if not self._transfer.wait(-1.0 if timeout_s is None else timeout_s):
            raise TimeoutError
        try:
            result = self._transfer.outcome()
        except _native.Error as error:
            raise _translated(error) from None
        return TransferResult(
            result.size,
            result.seconds,
            result.cpu_seconds,
            result.populate_cpu_seconds,
            result.digest_cpu_seconds,
            Backend[result.backend.name],
            result.direct,
            result.fixed_files,
            result.fixed_buffers,
            result.block,
            result.depth,
            result.staging,
            result.fallback,
            result.digests,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._transfer.cancel()
        self._transfer.wait(-1.0)


def load(
    files: Sequence[OpenFile],
    reads: Sequence[Read],
    *,
    address: int,
    size_bytes: int,
    options: Options = Options(),
    digests: Digests | None = None,
    populate: bool = False,
) -> Transfer:
    """Starts reading files into the memory at `address`, each byte directly to its final place.

    With `digests`, each block of the memory is verified; the reads must then fill the memory in order from its start.
    With `populate`, helper threads populate the memory ahead of the reads, which is useful for new memory.
    """
    for read in reads:
        if read.length < 0 or read.memory_offset < 0 or read.memory_offset + read.length > size_bytes:
            raise InvalidArgument(f"a read of {read.length} bytes ends outside the memory of {size_bytes} bytes")
        if not 0 <= read.file < len(files):
            raise InvalidArgument(f"a read names file {read.file} of {len(files)}")
    if digests:
        end = _end_without_holes([(read.memory_offset, read.length) for read in reads], "the memory")
        digests._check_count(end, files[0].path if files else "nothing")
    return _started(
        options,
        lambda: _native.load(
            _pairs(files),
            [(r.file, r.file_offset, r.memory_offset, r.length) for r in reads],
            address,
            size_bytes,
            digests.block_bytes if digests else 0,
            digests.table if digests else b"",
            populate,
            options._native(),
        ),
    )


def copy(
    files: Sequence[OpenFile],
    pieces: Sequence[Piece],
    target: OpenFile,
    *,
    region_offset: int,
    digest_block_bytes: int,
    file_bytes: int = 0,
    options: Options = Options(depth=4),
) -> Transfer:
    """Starts filling `target` from `region_offset` on with pieces of other files, at any offsets.

    Pieces are sorted by target offset (counted from `region_offset`) and leave no hole. `result.digests` has the digest
    of each block of the region. The target (opened for reading and writing) is preallocated, fsynced and cut to size:
    it ends with the pieces, or at `file_bytes` if that is larger, so that several copies can fill it in any order.
    Bytes outside the copied range are not changed. Needs memory for two blocks for each of `options.depth` threads.
    """
    if digest_block_bytes <= 0 or digest_block_bytes % ALIGNMENT or region_offset % ALIGNMENT:
        raise InvalidArgument(f"blocks and region of {target.path} must be multiples of {ALIGNMENT} bytes")
    for piece in pieces:
        if not 0 <= piece.file < len(files):
            raise InvalidArgument(f"a piece names file {piece.file} of {len(files)}")
    _end_without_holes([(piece.target_offset, piece.length) for piece in pieces], target.path)
    return _started(
        options,
        lambda: _native.copy(
            _pairs(files),
            [(p.file, p.source_offset, p.target_offset, p.length) for p in pieces],
            (target.fd, target.path),
            region_offset,
            digest_block_bytes,
            options._native(),
            file_bytes,
        ),
    )


def write(
    target: OpenFile,
    *,
    address: int,
    size_bytes: int,
    target_offset: int = 0,
    options: Options = Options(),
) -> Transfer:
    """Starts writing memory to a file, which is preallocated, fsynced, and truncated to the end of the data."""
    return _started(
        options, lambda: _native.write((target.fd, target.path), target_offset, address, size_bytes, options._native())
    )


def verify(
    file: OpenFile,
    extent: Extent,
    digests: Digests,
    *,
    options: Options = Options(depth=4),
) -> Transfer:
    """Starts comparing an extent with its digests, without keeping the data."""
    digests._check_count(extent.length, file.path)
    return _started(
        options,
        lambda: _native.verify(
            (file.fd, file.path), extent.offset, extent.length, digests.block_bytes, digests.table, options._native()
        ),
    )


class Staging:
    """Pinned memory through which files are transferred to a device, allocated once and shared fairly by all transfers.

    `driver` is `cuda`, or `host` for a device simulated in host memory; `context` is the CUcontext to use. Raises
    OutOfMemory, or DeviceFailed if the driver fails.
    """

    def __init__(
        self, driver: Literal["cuda", "host"], context: int, *, size_bytes: int, block_bytes: int = 8 * MiB
    ) -> None:
        if block_bytes <= 0 or block_bytes % ALIGNMENT or size_bytes < block_bytes:
            hint = f"use at least one block of {block_bytes} bytes"
            raise InvalidArgument(f"{size_bytes} bytes are not enough staging memory", hint=hint)
        try:
            self._staging = _native.staging(driver, context, block_bytes, size_bytes // block_bytes)
        except _native.Error as error:
            raise _translated(error) from None

    @property
    def block_bytes(self) -> int:
        return self._staging.block

    @property
    def size_bytes(self) -> int:
        return self._staging.size

    @property
    def peak_bytes(self) -> int:
        """Peak of its use."""
        return self._staging.peak


def load_device(
    file: OpenFile,
    extent: Extent,
    *,
    target: int,
    staging: Staging,
    options: Options = Options(),
    digests: Digests | None = None,
) -> Transfer:
    """Starts reading an extent into device memory at the device address `target`.

    Reads, copies and, with `digests`, comparisons overlap. Digests are of blocks as large as the staging memory's.
    """
    if digests:
        digests._check_count(extent.length, file.path)
        if digests.block_bytes != staging.block_bytes:
            raise InvalidArgument(
                f"digests of {digests.block_bytes} byte blocks cannot be compared in staging memory of "
                f"{staging.block_bytes} byte blocks",
                hint="set streamer.block to the checkpoints' digest block, 8MiB",
            )
    return _started(
        options,
        lambda: _native.load_device(
            (file.fd, file.path),
            extent.offset,
            extent.length,
            target,
            digests.block_bytes if digests else 0,
            digests.table if digests else b"",
            staging._staging,
            options._native(),
        ),
    )


def write_device(
    target: OpenFile,
    *,
    source: int,
    size_bytes: int,
    staging: Staging,
    target_offset: int = 0,
    options: Options = Options(),
) -> Transfer:
    """Starts writing device memory to a file, which is preallocated, fsynced, and truncated to the end of the data.

    `result.digests` has the digest of each block, as large as the staging memory's.
    """
    return _started(
        options,
        lambda: _native.write_device(
            (target.fd, target.path), target_offset, source, size_bytes, staging._staging, options._native()
        ),
    )


def upload(
    *, address: int, size_bytes: int, target: int, is_registered: bool, staging: Staging, options: Options = Options()
) -> Transfer:
    """Starts copying host memory to a device: by the device itself if it is registered, else through `staging`."""
    return _started(
        options, lambda: _native.upload(address, size_bytes, target, is_registered, staging._staging, options._native())
    )


def download(
    *, source: int, address: int, size_bytes: int, is_registered: bool, staging: Staging, options: Options = Options()
) -> Transfer:
    """Starts copying device memory to host memory: the reverse of `upload`."""
    return _started(
        options,
        lambda: _native.download(source, address, size_bytes, is_registered, staging._staging, options._native()),
    )


def raw_read(path: str, *, offset: int, address: int, size_bytes: int, block_bytes: int, depth: int) -> float:
    """Returns the seconds of a raw sequential O_DIRECT read into populated memory, the reference of benchmarks."""
    try:
        return _native.raw_read(path, offset, address, size_bytes, block_bytes, depth)
    except _native.Error as error:
        raise _translated(error) from None


def blake3(data: bytes | memoryview) -> bytes:
    """Returns the 32-byte BLAKE3 digest of data in memory."""
    return _native.blake3(bytes(data))


def _end_without_holes(ranges: Sequence[tuple[int, int]], what: str) -> int:
    end = 0
    for offset, length in ranges:
        if offset != end or length < 0:
            raise InvalidArgument(f"there is a hole or an overlap at offset {end} of {what}")
        end += length
    return end


def _pairs(files: Sequence[OpenFile]) -> list[tuple[int, str]]:
    return [(file.fd, file.path) for file in files]


def _started(options: Options, start: Callable[[], _native.Transfer]) -> Transfer:
    try:
        transfer = Transfer(start())
    except _native.Error as error:
        raise _translated(error) from None
    if options.on_start is not None:
        options.on_start(transfer)
    return transfer


def _translated(error: _native.Error) -> FlashdError:  # noqa: PLR0911 -- one for each kind
    """Translates a native error, with the operation, the file, the offset and a hint. The only place that does so."""
    kind, operation, number, path, offset = error.args
    where = f" at offset {offset}" if offset is not None else ""
    match kind:
        case "cancelled":
            return Cancelled("the transfer was cancelled")
        case "memory":
            return OutOfMemory(
                f"no memory for a transfer: {operation}: {os.strerror(number)}",
                hint="evict a model, or reserve more huge pages",
            )
        case "truncated":
            hint = "it is truncated: copy or download it again, or convert it again if it is in the store"
            return TransferFailed(f"{path} ends{where}, before the end of its contents", hint=hint)
        case "corrupt":
            return CorruptCheckpoint(
                f"the block{where} of {path} does not match its digest",
                hint="it was damaged on the disk: remove the model and convert its source again",
            )
        case "device":
            if number == _CUDA_OUT_OF_MEMORY:
                return OutOfMemory(f"no device memory for a transfer: {operation}", hint="evict a model")
            return DeviceFailed(f"{operation}: {path}", hint="see nvidia-smi and the kernel's log (dmesg)")
    if number in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return StoreFull(f"{operation} {path}: {os.strerror(number)}", hint="free some space, or remove a model")
    reason = f"{os.strerror(number)} [{errno.errorcode.get(number, number)}]"
    hint = "the disk may be failing: see the kernel's log (dmesg)" if number == errno.EIO else ""
    return TransferFailed(f"{operation} {path}{where}: {reason}", hint=hint)
