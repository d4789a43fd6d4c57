# SPDX-License-Identifier: Apache-2.0
"""What is done to models in the store? Pinned, renamed, verified, removed; and what nobody needs is collected."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from dbus_next import Variant

from flashd.checkpoint.files import Checkpoint, verify
from flashd.daemon.exports import Audience
from flashd.daemon.jobs import Job, Jobs, Owner, Result
from flashd.daemon.threads import Background, in_thread
from flashd.errors import Busy, CorruptCheckpoint
from flashd.memory.residency import Residency
from flashd.store.catalog import Catalog, Collected, Model
from flashd.streamer import Options

Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)

_PRIVATE = "(private)"  # in place of a name


class Models:
    """Operations on models; what the bus object of a model calls. Writing to disk happens in threads."""

    def __init__(
        self,
        catalog: Catalog,
        residency: Residency,
        jobs: Jobs,
        background: Background,
        *,
        options: Options,
        is_wanted: Callable[[str], bool],
        on_change: Callable[[str], None],
        on_audience_change: Callable[[str], None],
        on_remove: Callable[[Model], None],
        audience_of: Callable[[str], Audience],
    ) -> None:
        """`is_wanted` tells whether a model is active or about to be, `audience_of` who may know of it; the others hear
        of models."""
        self._catalog = catalog
        self._residency = residency
        self._jobs = jobs
        self._background = background
        self._options = options
        self._is_wanted = is_wanted
        self._on_change = on_change
        self._on_audience_change = on_audience_change
        self._on_remove = on_remove
        self._audience_of = audience_of
        self._reading: list[str] = []  # checkpoints being verified

    async def set_pinned(self, name: str, pinned: bool) -> None:
        await asyncio.to_thread(self._catalog.set_pinned, name, pinned)
        self._on_change(name)

    async def set_aliases(self, name: str, aliases: Sequence[str]) -> None:
        await asyncio.to_thread(self._catalog.set_aliases, name, aliases)
        self._on_change(name)

    async def set_private(self, name: str, private: bool) -> None:
        """Raises Busy while it is active, or about to be: whoever may ask its engine was decided when it started."""
        if self._is_wanted(name):
            raise Busy(f"{name} is active, or about to be", hint="swap to another model first, or park it: flash park")
        await asyncio.to_thread(self._catalog.set_private, name, private)
        self._on_audience_change(name)

    async def evict(self, model: Model) -> None:
        """Raises Busy while it is leased, active or pinned."""
        if self.is_pinned(model.checkpoint_id):
            raise Busy(f"{model.name} is pinned", hint=f"flash unpin {model.name} first")
        await self._residency.evict(*self._catalog.forms(model.checkpoint_id))

    def is_pinned(self, form: str) -> bool:
        """Whether the checkpoint of a pinned model is this, or this is an image of it."""
        checkpoint_id = self._catalog.checkpoint_of(form)
        return any(model.pinned and model.checkpoint_id == checkpoint_id for model in self._catalog.models())

    async def remove(self, name: str) -> None:
        """Raises Busy while it is active, or a swap to it is under way."""
        if self._is_wanted(name):
            raise Busy(f"{name} is active, or about to be", hint="swap to another model first, or park it: flash park")
        model = self._catalog.get(name)
        await asyncio.to_thread(self._catalog.remove, name)
        if model is not None:
            self._on_remove(model)
        self.collect_soon()

    def verify(self, name: str, owner: Owner) -> Job:
        checkpoint = self._catalog.checkpoint(self._catalog.resolve(name).checkpoint_id)

        async def work(job: Job) -> Result:
            job.begin("reading")
            await self._verify(checkpoint, job.progress_from_thread())
            return {"size_bytes": Variant("t", checkpoint.manifest.data_bytes)}

        return self._jobs.run("verify", name, owner, work, audience=self._audience_of(name))

    def scrub(self, owner: Owner, sees: Callable[[Model], bool]) -> Job:
        """Reads all; the result, which all may read, names only models that everybody `sees`."""
        return self._jobs.run("scrub", "", owner, lambda job: self._scrub(job, sees))

    async def collect(self) -> Collected:
        """Deletes what nobody needs any more, from disk and from memory."""
        in_use = {*map(self._catalog.checkpoint_of, self._residency.in_use()), *self._reading}
        collected = await asyncio.to_thread(self._catalog.collect, in_use)
        for checkpoint_id in collected.checkpoint_ids:
            with contextlib.suppress(Busy):
                await self._residency.evict(checkpoint_id)
        if collected.checkpoint_ids:
            log.info("%d checkpoints deleted, %d bytes", len(collected.checkpoint_ids), collected.freed_bytes)
        return collected

    def collect_soon(self) -> None:
        async def collect() -> None:
            await self.collect()

        self._background.start(collect())

    def collect_if_unused(self, checkpoint_id: str) -> None:
        """To be told of checkpoints that nobody holds any more: one that no model points to may be deleted now."""
        if not any(model.checkpoint_id == checkpoint_id for model in self._catalog.models()):
            self.collect_soon()

    async def _scrub(self, job: Job, sees: Callable[[Model], bool]) -> Result:
        """One checkpoint after the other; a corrupt one is noted, and the rest is read all the same."""
        job.begin("reading")
        users: dict[str, list[str]] = {}
        for model in self._catalog.models():
            for checkpoint_id in (model.checkpoint_id, *model.previous):
                users.setdefault(checkpoint_id, []).append(model.name if sees(model) else _PRIVATE)
        checkpoints, corrupt = self._open_all(users)
        total_bytes = sum(checkpoint.manifest.data_bytes for checkpoint in checkpoints)
        read_bytes = 0
        for checkpoint in checkpoints:
            try:
                await self._verify(checkpoint, _shifted(job.progress_from_thread(), read_bytes, total_bytes))
            except CorruptCheckpoint as error:
                log.error("%s", error)
                corrupt.update(users[checkpoint.id])
            read_bytes += checkpoint.manifest.data_bytes
        return {
            "checked": Variant("u", len(users)),
            "corrupt": Variant("as", sorted(corrupt)),
            "size_bytes": Variant("t", total_bytes),
        }

    def _open_all(self, users: dict[str, list[str]]) -> tuple[list[Checkpoint], set[str]]:
        """The checkpoints, and the models of those that cannot even be opened."""
        checkpoints, corrupt = [], set()
        for checkpoint_id, names in users.items():
            try:
                checkpoints.append(self._catalog.checkpoint(checkpoint_id))
            except CorruptCheckpoint as error:
                log.error("%s", error)
                corrupt.update(names)
        return checkpoints, corrupt

    async def _verify(self, checkpoint: Checkpoint, tell: Progress) -> None:
        def blocking(cancelled: Callable[[], bool]) -> None:
            verify(checkpoint, options=self._options, on_progress=tell, cancelled=cancelled)

        with self._kept(checkpoint.id):
            await in_thread(blocking)

    @contextlib.contextmanager
    def _kept(self, checkpoint_id: str) -> Iterator[None]:
        self._reading.append(checkpoint_id)
        try:
            yield
        finally:
            self._reading.remove(checkpoint_id)


def _shifted(tell: Progress, before_bytes: int, total_bytes: int) -> Progress:
    """Progress of one part of something larger."""
    return lambda done_bytes, _: tell(before_bytes + done_bytes, total_bytes)
