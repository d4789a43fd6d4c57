# SPDX-License-Identifier: Apache-2.0
"""How do bytes get into an arena? From the disk, or from another tier: by the native streamer, cancellable."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.sharing import Run, find_shared
from flashd.errors import CorruptCheckpoint, DeviceFailed, FlashdError
from flashd.memory.arena import Arena, HostArena, View
from flashd.memory.copying import Copies, Copy
from flashd.memory.device import Device, Kind
from flashd.streamer import (
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
from flashd.units import MiB, format_bytes

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_POLL_S = 0.02
_SMALLEST_STAGING_BYTES = 16 * MiB
_WORTH_COPYING_BYTES = 16 * MiB  # the disk is not made to begin anew for less


@dataclass(frozen=True, slots=True)
class Region:
    """An arena, and the device it is on."""

    device: Device
    arena: Arena

    @property
    def is_device(self) -> bool:
        """Whether the streamer reaches it by a device's driver only. Unified memory is ordinary memory."""
        return self.device.kind in {Kind.CUDA, Kind.SIMULATED}


Residents = Sequence[tuple[Checkpoint, Region]]


class Mover(Protocol):
    """Fills arenas. Cancelling a coroutine ends its transfer before it returns."""

    async def load(
        self, checkpoint: Checkpoint, target: Region, on_progress: Progress, *, residents: Residents = ()
    ) -> None:
        """From the store, but for what one of these checkpoints in host memory has as well."""

    async def copy(self, checkpoint: Checkpoint, source: Region, target: Region, on_progress: Progress) -> None:
        """From another tier."""

    async def matches(self, checkpoint: Checkpoint, region: Region) -> bool:
        """Whether an arena has the bytes of a checkpoint, by a few of its digests."""


class StreamMover:
    """The mover of the product."""

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
        """Makes the staging memory of a device, which takes a while, before anybody waits for it."""
        await self._staging_of(device)

    async def load(
        self, checkpoint: Checkpoint, target: Region, on_progress: Progress, *, residents: Residents = ()
    ) -> None:
        if not checkpoint.extent.length:
            return
        runs = await asyncio.to_thread(_runs, checkpoint, residents)
        arenas = [region.arena for _, region in residents]
        with checkpoint.weights_path.open("rb") as file:
            store = OpenFile(file.fileno(), str(checkpoint.weights_path))
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
        """What others have is copied in threads of its own while the disk is read."""
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
        """By one transfer after the other. What comes from host memory was compared with digests on its way there."""
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
                    is_registered=False,  # the arena is fresh
                    staging=staging,
                    options=self._options,
                )
            await _finished(transfer, on_progress)

    async def save(self, region: Region, extent: Extent, file: OpenFile) -> bytes:
        """Writes an arena of a device to its place in a file, which then ends there and is fsynced.

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
        """Makes a host arena known to a GPU, in a thread; without it copies there go through staging memory."""
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
        except CorruptCheckpoint as error:  # perhaps it was deleted, and is still in use
            log.info("nothing is copied from %s: %s", resident.id[:12], error.message)
            tables.append(Digests(0, b""))
    if not any(table.table for table in tables):
        return [Run(None, 0, 0, size_bytes)]
    runs = find_shared(checkpoint.digests(), size_bytes, tables, least_bytes=_WORTH_COPYING_BYTES)
    if shared_bytes := sum(run.length for run in runs if run.source is not None):
        log.info(
            "%s of the %s of %s are in memory already",
            *(format_bytes(shared_bytes), format_bytes(size_bytes), checkpoint.id[:12]),
        )
    return runs


def _shifted(tell: Progress, before_bytes: int, total_bytes: int) -> Progress:
    """Progress of one part of something larger."""
    return lambda done_bytes, _: tell(before_bytes + done_bytes, total_bytes)


def _beside(tell: Progress, copies: Copies, before_bytes: int, total_bytes: int) -> Progress:
    """Progress of one part of something larger, while something else goes on."""
    return lambda done_bytes, _: tell(before_bytes + done_bytes + copies.done_bytes, total_bytes)


@asynccontextmanager
async def _viewed(arena: Arena) -> AsyncIterator[View]:
    """Maps an arena for reading. Mapping it takes no time; unmapping what was read does, and is done in a thread."""
    stack = contextlib.ExitStack()
    try:
        yield stack.enter_context(arena.viewed())
    finally:
        unmapped = asyncio.get_running_loop().run_in_executor(None, stack.close)
        is_cancelled = await _outlast(unmapped)
    unmapped.result()
    if is_cancelled:
        raise asyncio.CancelledError


async def _finished(transfer: Transfer, on_progress: Progress) -> TransferResult:
    """Waits for a transfer; whatever happens, nothing is in flight any more when this returns."""
    ended = asyncio.get_running_loop().run_in_executor(None, transfer.wait)
    try:
        while not ended.done():
            on_progress(transfer.done_bytes, transfer.total_bytes)
            await asyncio.wait({ended}, timeout=_POLL_S)
    finally:
        transfer.cancel()  # of no effect on one that has ended
        await _outlast(ended)
    result = ended.result()
    on_progress(transfer.total_bytes, transfer.total_bytes)
    return result


async def _outlast(ended: asyncio.Future[Any]) -> bool:
    """Waits whatever happens: files and memory must outlive what is in flight, however often we are cancelled.

    Tells whether we were.
    """
    is_cancelled = False
    while not ended.done():
        try:
            await asyncio.wait({ended})
        except asyncio.CancelledError:
            is_cancelled = True
    ended.exception()  # looked at, though nobody may want it
    return is_cancelled
