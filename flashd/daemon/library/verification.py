# SPDX-License-Identifier: Apache-2.0
"""Verifies checkpoints on disk against their digests: those of one model, or all."""

from __future__ import annotations

import logging
from collections.abc import Callable

from dbus_next import Variant

from flashd.checkpoint.files import Checkpoint, verify
from flashd.daemon.access.ownership import Ownership
from flashd.daemon.job import Job, Owner, Result
from flashd.daemon.jobs import Jobs
from flashd.errors import CorruptCheckpoint, NotFound, TransferFailed
from flashd.io.streamer import Options
from flashd.store.catalog import Catalog, Model
from flashd.tasks import in_thread

Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)

_PRIVATE = "(private)"  # in place of a name


class Verification:
    """Verifications as jobs."""

    def __init__(self, catalog: Catalog, jobs: Jobs, ownership: Ownership, options: Options) -> None:
        self._catalog = catalog
        self._jobs = jobs
        self._ownership = ownership
        self._options = options

    def verify(self, name: str, owner: Owner) -> Job:
        model = self._catalog.get(name)
        if model is None:
            raise NotFound(f"there is no model {name!r}", hint="flash list shows the models there are")
        checkpoint = self._catalog.checkpoint(model.checkpoint_id)

        async def work(job: Job) -> Result:
            job.begin("reading")
            await self._verify(checkpoint, job.progress_from_thread())
            return {"size_bytes": Variant("t", checkpoint.manifest.data_bytes)}

        return self._jobs.run("verify", name, owner, work, audience=self._ownership.audience_of(name))

    def scrub(self, owner: Owner, sees: Callable[[Model], bool]) -> Job:
        """Verifies all checkpoints. The result, which all may read, names only models that everybody `sees`."""
        return self._jobs.run("scrub", "", owner, lambda job: self._scrub(job, sees))

    async def _scrub(self, job: Job, sees: Callable[[Model], bool]) -> Result:
        """Reads all checkpoints in turn, and goes on after a corrupt one."""
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
            except (CorruptCheckpoint, TransferFailed) as error:  # an unreadable checkpoint is as good as damaged
                self._catalog.check_there()
                log.error("%s", error)
                corrupt.update(users[checkpoint.id])
            read_bytes += checkpoint.manifest.data_bytes
        return {
            "checked": Variant("u", len(users)),
            "corrupt": Variant("as", sorted(corrupt)),
            "size_bytes": Variant("t", total_bytes),
        }

    def _open_all(self, users: dict[str, list[str]]) -> tuple[list[Checkpoint], set[str]]:
        """Opens all checkpoints. Returns them, and the models of those that cannot be opened."""
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
            with self._catalog.reading(checkpoint.id):
                verify(checkpoint, options=self._options, on_progress=tell, cancelled=cancelled)

        await in_thread(blocking)


def _shifted(tell: Progress, before_bytes: int, total_bytes: int) -> Progress:
    """Returns a progress callback for one part of a larger operation."""
    return lambda done_bytes, _: tell(before_bytes + done_bytes, total_bytes)
