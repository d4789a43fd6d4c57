# SPDX-License-Identifier: Apache-2.0
"""Cancellable transfers into an arena, from the disk or another tier, by the native streamer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.sharing import Run, find_shared
from flashd.errors import CorruptCheckpoint, DeviceFailed, FlashdError
from flashd.io.streamer import (
    Digests,
    Extent,
    OpenFile,
    Options,
    Read,
    Staging,
    Transfer,
    TransferResult,
    blake3,
    download,
    load,
    load_device,
    upload,
    write_device,
)
from flashd.memory.arena import Arena, HostArena, View
from flashd.memory.copying import Copies, Copy
from flashd.memory.device import Device, Kind
from flashd.tasks import outlast
from flashd.units import MiB, format_bytes

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_POLL_S = 0.02
_SMALLEST_STAGING_BYTES = 16 * MiB
_WORTH_COPYING_BYTES = 16 * MiB  # a shorter run is read from the disk, whose reads it would interrupt


@dataclass(frozen=True, slots=True)
class Region:
    """An arena and its device."""

    device: Device
    arena: Arena

    @property
    def is_device(self) -> bool:
        """True if the streamer needs a device's driver to reach it. Unified memory is ordinary memory."""
        return self.device.kind in {Kind.CUDA, Kind.SIMULATED}


Residents = Sequence[tuple[Checkpoint, Region]]


class Mover(Protocol):
    """Fills arenas. Cancelling one of its coroutines ends the transfer before it returns."""

    async def load(
        self, checkpoint: Checkpoint, target: Region, on_progress: Progress, *, residents: Residents = ()
    ) -> None:
        """Loads from the store, except bytes that it copies from these residents in host memory."""

    async def copy(self, checkpoint: Checkpoint, source: Region, target: Region, on_progress: Progress) -> None:
        """Copies from another tier."""

    async def matches(self, checkpoint: Checkpoint, region: Region) -> bool:
        """Compares an arena with a few of a checkpoint's digests."""


class StreamMover:
    """The mover that uses the native streamer."""

    def __init__(
        self,
        options: Options,
        *,
        verify: bool,
        staging_bytes: int,
        on_loaded: Callable[[Checkpoint, TransferResult], None] = lambda checkpoint, result: None,
    ) -> None:
        self._options = options
        self._verify = verify
        self._staging_bytes = max(staging_bytes, _SMALLEST_STAGING_BYTES)
        self._on_loaded = on_loaded
        self._staging: dict[str, asyncio.Future[Staging]] = {}

    async def prepare(self, device: Device) -> None:
        """Allocates the staging memory of a device, which takes long, before the first transfer needs it."""
        await self._staging_of(device)

    async def load(
        self, checkpoint: Checkpoint, target: Region, on_progress: Progress, *, residents: Residents = ()
    ) -> None:
        if not checkpoint.extent.length:
            return
        runs = await asyncio.to_thread(_runs, checkpoint, residents)
        arenas = [region.arena for _, region in residents]
        with checkpoint.open_weights() as store:
            if target.is_device:
                await self._load_device(checkpoint, store, arenas, runs, target, on_progress)
            else:
                await self._load_host(checkpoint, store, arenas, runs, target, on_progress)

    async def _load_host(
        self,
        checkpoint: Checkpoint,
        store: OpenFile,
        arenas: Sequence[Arena],
        runs: Sequence[Run],
        target: Region,
        on_progress: Progress,
    ) -> None:
        """Copies bytes from residents in separate threads while the disk is read."""
        start, size_bytes = checkpoint.extent.offset, checkpoint.extent.length
        digests = checkpoint.digests() if self._verify else None
        shared = [
            Copy(arenas[run.source], run.source_offset, run.offset, run.length)
            for run in runs
            if run.source is not None
        ]
        copies = Copies(shared, target.arena, target.device.huge_pages)
        read_bytes = 0
        try:
            for run in runs:
                if run.source is not None:
                    continue
                is_last = run.offset + run.length == size_bytes
                transfer = load(
                    [store],
                    [Read(0, start + run.source_offset, 0, run.length)],
                    address=target.arena.address + run.offset,
                    size_bytes=target.arena.mapped_bytes - run.offset if is_last else run.length,
                    options=self._options,
                    digests=digests.part(run.offset, run.length) if digests else None,
                    populate=True,
                )
                tell = _beside(on_progress, copies, read_bytes, size_bytes)
                self._on_loaded(checkpoint, await _finished(transfer, tell))
                read_bytes += run.length
        except BaseException:
            copies.cancel()
            with contextlib.suppress(FlashdError):
                await copies.finish()
            raise
        await copies.finish()
        on_progress(size_bytes, size_bytes)

    async def _load_device(
        self,
        checkpoint: Checkpoint,
        store: OpenFile,
        arenas: Sequence[Arena],
        runs: Sequence[Run],
        target: Region,
        on_progress: Progress,
    ) -> None:
        """Runs one transfer after the other. Bytes from host memory were verified when they were loaded there."""
        start, size_bytes = checkpoint.extent.offset, checkpoint.extent.length
        staging = await self._staging_of(target.device)
        digests = checkpoint.digests() if self._verify else None
        for run in runs:
            tell = _shifted(on_progress, run.offset, size_bytes)
            address = target.arena.address + run.offset
            if run.source is None:
                transfer = load_device(
                    store,
                    Extent(start + run.source_offset, run.length),
                    target=address,
                    staging=staging,
                    options=self._options,
                    digests=digests.part(run.offset, run.length) if digests else None,
                )
                self._on_loaded(checkpoint, await _finished(transfer, tell))
                continue
            async with _viewed(arenas[run.source]) as view:
                transfer = upload(
                    address=view.address + run.source_offset,
                    size_bytes=run.length,
                    target=address,
                    is_registered=view.is_registered,
                    staging=staging,
                    options=self._options,
                )
                await _finished(transfer, tell)

    async def copy(self, checkpoint: Checkpoint, source: Region, target: Region, on_progress: Progress) -> None:
        size_bytes = checkpoint.manifest.data_bytes
        if not size_bytes:
            return
        staging = await self._staging_of((target if target.is_device else source).device)
        async with _viewed(source.arena) as view:
            if target.is_device:
                transfer = upload(
                    address=view.address,
                    size_bytes=size_bytes,
                    target=target.arena.address,
                    is_registered=view.is_registered,
                    staging=staging,
                    options=self._options,
                )
            else:
                transfer = download(
                    source=view.address,
                    address=target.arena.address,
                    size_bytes=size_bytes,
                    is_registered=False,  # the arena is new
                    staging=staging,
                    options=self._options,
                )
            await _finished(transfer, on_progress)

    async def save(self, region: Region, extent: Extent, file: OpenFile) -> bytes:
        """Writes an arena of a device to an extent at the end of a file, which is then truncated there and fsynced.

        Returns the digests of its blocks.
        """
        staging = await self._staging_of(region.device)
        async with _viewed(region.arena) as view:
            transfer = write_device(
                file,
                source=view.address,
                size_bytes=extent.length,
                target_offset=extent.offset,
                staging=staging,
                options=self._options,
            )
            return (await _finished(transfer, lambda done, total: None)).digests

    async def matches(self, checkpoint: Checkpoint, region: Region) -> bool:
        block_bytes, size_bytes = checkpoint.manifest.digest_block_bytes, checkpoint.manifest.data_bytes
        table = checkpoint.digests().table
        blocks = -(-size_bytes // block_bytes)

        def compare() -> bool:
            with region.arena.viewed() as view:
                for index in {0, blocks // 2, blocks - 1} if blocks else set():
                    start = index * block_bytes
                    data = region.device.read(view.address + start, min(block_bytes, size_bytes - start))
                    if blake3(data) != table[32 * index : 32 * index + 32]:
                        return False
            return True

        return await asyncio.to_thread(compare)

    async def register(self, arena: HostArena, device: Device) -> None:
        """Registers a host arena with a GPU, in a thread. Without that, copies go through staging memory."""
        if device.gpu is None or not device.gpu.registers_memory:
            return
        try:
            await asyncio.to_thread(arena.register, device.gpu.ordinal)
        except DeviceFailed as error:
            log.warning("copies to %s go through staging memory: %s", device.name, error.message)

    async def _staging_of(self, device: Device) -> Staging:
        if device.name not in self._staging:
            self._staging[device.name] = asyncio.ensure_future(
                asyncio.to_thread(lambda: Staging(device.driver, device.context(), size_bytes=self._staging_bytes))
            )
        made = self._staging[device.name]
        try:
            return await asyncio.shield(made)
        except Exception:
            self._staging.pop(device.name, None)  # the next one tries again
            raise


def _runs(checkpoint: Checkpoint, residents: Residents) -> Sequence[Run]:
    size_bytes = checkpoint.manifest.data_bytes
    tables = []
    for resident, _ in residents:
        try:
            tables.append(resident.digests())
        except CorruptCheckpoint as error:  # it may be deleted but still in use
            log.info("nothing is copied from %s: %s", resident.id[:12], error.message)
            tables.append(Digests(0, b""))
    if not any(table.table for table in tables):
        return [Run(None, 0, 0, size_bytes)]
    runs = find_shared(checkpoint.digests(), size_bytes, tables, least_bytes=_WORTH_COPYING_BYTES)
    if shared_bytes := sum(run.length for run in runs if run.source is not None):
        log.info(
            "%s of the %s of %s are already in memory",
            *(format_bytes(shared_bytes), format_bytes(size_bytes), checkpoint.id[:12]),
        )
    return runs


def _shifted(tell: Progress, before_bytes: int, total_bytes: int) -> Progress:
    """Returns a progress callback for one part of a larger transfer."""
    return lambda done_bytes, _: tell(before_bytes + done_bytes, total_bytes)


def _beside(tell: Progress, copies: Copies, before_bytes: int, total_bytes: int) -> Progress:
    """Returns a progress callback for one part of a larger transfer, while copies run at the same time."""
    return lambda done_bytes, _: tell(before_bytes + done_bytes + copies.done_bytes, total_bytes)


@asynccontextmanager
async def _viewed(arena: Arena) -> AsyncIterator[View]:
    """Maps an arena for reading. Unmapping it is done in a thread, because it takes long after reading."""
    stack = contextlib.ExitStack()
    try:
        yield stack.enter_context(arena.viewed())
    finally:
        unmapped = asyncio.get_running_loop().run_in_executor(None, stack.close)
        is_cancelled = await outlast(unmapped)
    unmapped.result()
    if is_cancelled:
        raise asyncio.CancelledError


async def _finished(transfer: Transfer, on_progress: Progress) -> TransferResult:
    """Waits for a transfer. In all cases, no I/O is in flight when this returns."""
    ended = asyncio.get_running_loop().run_in_executor(None, transfer.wait)
    try:
        while not ended.done():
            on_progress(transfer.done_bytes, transfer.total_bytes)
            await asyncio.wait({ended}, timeout=_POLL_S)
    finally:
        transfer.cancel()  # no effect on a finished transfer
        await outlast(ended)
    result = ended.result()
    on_progress(transfer.total_bytes, transfer.total_bytes)
    return result
