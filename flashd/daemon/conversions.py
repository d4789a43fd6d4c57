# SPDX-License-Identifier: Apache-2.0
"""How do sources become models? One conversion at a time, in a thread, published by the catalog."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashd.checkpoint.convert import Progress, convert
from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.late import LateFiles
from flashd.checkpoint.merging import base_of
from flashd.checkpoint.source import SourceFiles
from flashd.daemon.jobs import Job
from flashd.daemon.threads import in_thread
from flashd.errors import Cancelled, CorruptCheckpoint
from flashd.store.catalog import Catalog, Model, Origin
from flashd.store.reflinks import share_blocks
from flashd.streamer import Options
from flashd.units import format_bytes

log = logging.getLogger(__name__)

_BESIDE = 2  # sources that arrive at once: each keeps a thread of the few that there are until all of it has come


@dataclass(frozen=True, slots=True)
class Request:
    """What to convert, what to call it, and whose it will be. `open_source` is called once, when its turn has come."""

    open_source: Callable[[], SourceFiles]
    name: str
    origin: Origin
    owner_uid: int
    private: bool | None = None  # None: as it was, if there is one to replace
    aliases: Sequence[str] = ()
    replace: bool = True


class Conversions:
    """The queue of conversions. Two at a time would only make the disk seek."""

    def __init__(
        self, catalog: Catalog, *, options: Options, python: Callable[[], str], on_published: Callable[[Model], None]
    ) -> None:
        self._catalog = catalog
        self._options = options
        self._python = python
        self._on_published = on_published
        self._turn = asyncio.Lock()
        self._beside = asyncio.Semaphore(_BESIDE)

    async def run(self, job: Job, request: Request) -> Model:
        """Converts and publishes. Raises what the catalog and the conversion raise; then nothing has changed."""
        job.report("waiting")
        async with self._turn:
            job.begin("converting")
            return await self._run(request, job.progress_from_thread())

    async def run_beside(self, request: Request, on_progress: Progress, arrived: asyncio.Event) -> Model:
        """For a source that still arrives: beside the others, if few do that already, else when it has `arrived`."""
        if self._beside.locked():
            await arrived.wait()
        async with self._turn if arrived.is_set() else self._beside:
            return await self._run(request, on_progress)

    async def _run(self, request: Request, on_progress: Progress) -> Model:
        model = await in_thread(lambda cancelled: self._convert(request, on_progress, cancelled))
        self._on_published(model)
        return model

    def _convert(self, request: Request, on_progress: Progress, cancelled: Callable[[], bool]) -> Model:
        name = self._catalog.check_free(request.name, replace=request.replace, owner_uid=request.owner_uid)
        with contextlib.ExitStack() as stack:
            files = stack.enter_context(request.open_source())
            if isinstance(files, LateFiles):
                files.wait_for_headers(cancelled)
            need_bytes = sum(os.fstat(files[name].fd).st_size for name in files)
            base, is_private = None, request.private  # what is made of what nobody may see, nobody may see
            if (recorded := base_of(files)) is not None:
                found = self._catalog.find_base(recorded, of=name, owner_uid=request.owner_uid)
                if found.private and is_private is None:
                    is_private = True
                base = stack.enter_context(self._catalog.reading(found.checkpoint_id))
                need_bytes += 2 * base.manifest.data_bytes  # what is merged lies there twice for a while
            with self._catalog.draft(need_bytes) as draft:
                manifest = convert(
                    files,
                    draft.directory,
                    python=self._python(),
                    base=base,
                    note=request.origin.location,
                    options=self._options,
                    on_progress=on_progress,
                    cancelled=cancelled,
                )
                if cancelled():
                    raise Cancelled("the conversion was cancelled")
                self._share(Checkpoint(draft.directory, manifest))
                return draft.publish(
                    name,
                    manifest,
                    request.origin,
                    aliases=request.aliases,
                    replace=request.replace,
                    owner_uid=request.owner_uid,
                    private=is_private,
                )

    def _share(self, new: Checkpoint) -> None:
        """What the store has already takes no room twice, where the file system can share it."""
        made = new.manifest
        alike = [
            model.checkpoint_id
            for model in sorted(self._catalog.models(), key=lambda model: model.created_at, reverse=True)
            if (model.size_bytes, model.tensor_count, model.dtype) == (made.data_bytes, made.tensor_count, made.dtype)
        ]
        others = []
        for checkpoint_id in dict.fromkeys(alike):
            with contextlib.suppress(CorruptCheckpoint):
                others.append(self._catalog.checkpoint(checkpoint_id))
        if shared_bytes := share_blocks(new, others):
            log.info("%s of %s share their room with other checkpoints", format_bytes(shared_bytes), new.id[:12])
