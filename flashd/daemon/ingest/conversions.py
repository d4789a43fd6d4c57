# SPDX-License-Identifier: Apache-2.0
"""Converts sources to models, each in a thread when its turn has come. The catalog publishes the result.

The thread may hang in a file system that does not answer. Then its job is reported as stalled, other conversions get
their turn, and a cancellation ends the job at once: the thread is abandoned, and removes its draft when it returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashd.checkpoint.convert import convert
from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.lora.plan import base_of
from flashd.checkpoint.source.incremental import LateFiles
from flashd.checkpoint.source.reader import SourceFiles
from flashd.checkpoint.writing import Progress
from flashd.daemon.ingest.turns import Turn, Turns
from flashd.daemon.job import Job
from flashd.daemon.lifecycle.journal import fields
from flashd.errors import CorruptCheckpoint, InvalidArgument
from flashd.io.streamer import Options
from flashd.store.catalog import Catalog, Model, Origin
from flashd.store.names import check_name
from flashd.store.reflinks import share_blocks
from flashd.tasks import Stop, in_thread
from flashd.units import format_bytes

log = logging.getLogger(__name__)

_BESIDE = 2  # most sources that are converted while they arrive; others wait for all their files first


@dataclass(frozen=True, slots=True)
class Request:
    """A source to convert, with the name and owner of the model. `open_source` is called once, when its turn comes."""

    open_source: Callable[[], SourceFiles]
    name: str
    origin: Origin
    owner_uid: int
    private: bool | None = None  # None: like the replaced version, if there is one
    aliases: Sequence[str] = ()
    replace: bool = True


class Conversions:
    """Converts sources to models. `on_stalled` is called repeatedly while a conversion makes no progress."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        options: Options,
        python: Callable[[], str],
        on_published: Callable[[Model], None],
        on_stalled: Callable[[], None] = lambda: None,
    ) -> None:
        self._catalog = catalog
        self._options = options
        self._python = python
        self._on_published = on_published
        self._turns = Turns(on_stalled)
        self._arriving = 0

    async def run(self, job: Job, request: Request) -> Model:
        """Converts and publishes a model. Raises the errors of the catalog and the conversion, without any change."""

        def said(is_stalled: bool) -> None:
            job.report("stalled" if is_stalled else "converting")

        job.report("waiting")
        turn = await self._turns.take(request.owner_uid, said)
        try:
            job.begin("converting")
        except BaseException:
            self._turns.end(turn)
            raise
        tell = job.progress_from_thread()
        return await self._in_turn(request, tell, turn)

    async def run_beside(self, request: Request, on_progress: Progress, arrived: asyncio.Event) -> Model:
        """Converts a source that is still arriving, in addition to the turns of others.

        If too many such conversions are running, it waits until the source has `arrived`.
        """
        if self._arriving >= _BESIDE:
            await arrived.wait()
        if arrived.is_set():
            return await self._in_turn(request, on_progress, await self._turns.take(request.owner_uid))
        self._arriving += 1
        return await self._run(request, on_progress, self._one_has_arrived)

    def _one_has_arrived(self) -> None:
        self._arriving -= 1

    async def _in_turn(self, request: Request, on_progress: Progress, turn: Turn) -> Model:
        def tell(done_bytes: int, total_bytes: int) -> None:
            turn.moved()
            on_progress(done_bytes, total_bytes)

        return await self._run(request, tell, functools.partial(self._turns.end, turn))

    async def _run(self, request: Request, on_progress: Progress, on_end: Callable[[], None]) -> Model:
        before = self._model_of(request)
        try:
            return await in_thread(lambda stop: self._convert(request, on_progress, stop), on_end)
        finally:  # a model without the disk's confirmation exists all the same
            model = self._model_of(request)
            if model is not None and model != before:
                about = fields(model=model.name, size_bytes=model.size_bytes)
                log.info("%s is a model: %s", model.name, format_bytes(model.size_bytes), extra=about)
                self._on_published(model)

    def _model_of(self, request: Request) -> Model | None:
        with contextlib.suppress(InvalidArgument):  # the conversion reports the error
            return self._catalog.get(check_name(request.name))
        return None

    def _convert(self, request: Request, on_progress: Progress, stop: Stop) -> Model:
        name = self._catalog.check_free(request.name, replace=request.replace, owner_uid=request.owner_uid)
        with contextlib.ExitStack() as stack:
            files = stack.enter_context(request.open_source())
            if isinstance(files, LateFiles):
                files.wait_for_headers(stop)
            need_bytes = sum(os.fstat(files[name].fd).st_size for name in files)
            base, is_private = None, request.private  # a model derived from a private base is private too
            if (recorded := base_of(files)) is not None:
                found = self._catalog.find_base(recorded, of=name, owner_uid=request.owner_uid)
                if found.private and is_private is None:
                    is_private = True
                base = stack.enter_context(self._catalog.reading(found.checkpoint_id))
                need_bytes += 2 * base.manifest.data_bytes  # merged weights are temporarily stored twice
            with self._catalog.draft(need_bytes) as draft:
                manifest = convert(
                    files,
                    draft.directory,
                    python=self._python(),
                    base=base,
                    note=request.origin.location,
                    options=self._options,
                    on_progress=on_progress,
                    cancelled=stop,
                )
                stop.commit()
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
        """Shares blocks with other checkpoints in the store, if the file system can."""
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
            log.info("%s of %s are shared with other checkpoints", format_bytes(shared_bytes), new.id[:12])
