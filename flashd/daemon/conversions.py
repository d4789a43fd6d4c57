# SPDX-License-Identifier: Apache-2.0
"""How do sources become models? One conversion at a time, in a thread, published by the catalog."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashd.checkpoint.convert import convert
from flashd.checkpoint.source import SourceFiles
from flashd.daemon.jobs import Job
from flashd.daemon.threads import in_thread
from flashd.errors import Cancelled
from flashd.store.catalog import Catalog, Model, Origin
from flashd.streamer import Options


@dataclass(frozen=True, slots=True)
class Request:
    """What to convert, and what to call it. `open_source` is called once, when its turn has come."""

    open_source: Callable[[], SourceFiles]
    name: str
    origin: Origin
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

    async def run(self, job: Job, request: Request) -> Model:
        """Converts and publishes. Raises what the catalog and the conversion raise; then nothing has changed."""
        job.report("waiting")
        async with self._turn:
            job.begin("converting")
            tell = job.progress_from_thread()
            model = await in_thread(lambda cancelled: self._convert(request, tell, cancelled))
        self._on_published(model)
        return model

    def _convert(
        self, request: Request, on_progress: Callable[[int, int], None], cancelled: Callable[[], bool]
    ) -> Model:
        name = self._catalog.check_free(request.name, replace=request.replace)
        with request.open_source() as files:
            need_bytes = sum(os.fstat(files[name].fd).st_size for name in files)
            with self._catalog.draft(need_bytes) as draft:
                manifest = convert(
                    files,
                    draft.directory,
                    python=self._python(),
                    note=request.origin.location,
                    options=self._options,
                    on_progress=on_progress,
                    cancelled=cancelled,
                )
                if cancelled():
                    raise Cancelled("the conversion was cancelled")
                return draft.publish(name, manifest, request.origin, aliases=request.aliases, replace=request.replace)
