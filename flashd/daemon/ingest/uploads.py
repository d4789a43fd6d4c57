# SPDX-License-Identifier: Apache-2.0
"""Makes models from files that a caller has opened: collects them over several messages, then converts them.

Callers send descriptors: the daemon never opens a path for a caller, who could otherwise read files with its rights.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dbus_next import Variant

from flashd.checkpoint.source.reader import SourceFiles
from flashd.daemon.access.limits import Limits, Scarce
from flashd.daemon.access.ownership import Ownership
from flashd.daemon.events import Events
from flashd.daemon.ingest.conversions import Conversions, Request
from flashd.daemon.job import Job, JobState, Owner, Result
from flashd.daemon.jobs import Jobs
from flashd.dbus import wire
from flashd.dbus.collected_files import CollectedFiles
from flashd.dbus.object_tree import EVERYBODY, Caller
from flashd.errors import Cancelled, InvalidArgument
from flashd.store.catalog import Catalog, Origin
from flashd.tasks import aside


@dataclass(frozen=True, slots=True)
class _Upload:
    """An import: the future model, and the files sent for it."""

    name: str
    owner_uid: int
    private: bool | None
    aliases: tuple[str, ...]
    replace: bool
    files: CollectedFiles

    def source(self) -> SourceFiles:
        return SourceFiles.from_fds(self.files.take())


class Uploads:
    """The imports that are waiting for files."""

    def __init__(
        self,
        catalog: Catalog,
        jobs: Jobs,
        conversions: Conversions,
        limits: Limits,
        ownership: Ownership,
        events: Events,
    ) -> None:
        self._catalog = catalog
        self._jobs = jobs
        self._conversions = conversions
        self._limits = limits
        self._ownership = ownership
        self._uploads: dict[int, _Upload] = {}
        events.job_ended.subscribe(self._ended)
        events.peer_left.subscribe(self._peer_left)

    def begin(
        self,
        caller: Caller,
        name: str,
        files: Mapping[str, int],
        *,
        more: bool,
        aliases: tuple[str, ...],
        replace: bool,
        owner_uid: int,
        private: bool | None,
    ) -> Job:
        """Begins an import. Raises InvalidArgument, AlreadyExists or LimitExceeded without making a job."""
        name = self._catalog.check_free(name, replace=replace, owner_uid=owner_uid)
        self._check_limits(caller, name, len(files))
        collected = CollectedFiles("import", caller.peer)
        model = self._catalog.get(name)
        is_private = private if private is not None else model is not None and model.private
        audience = self._ownership.private_to(owner_uid) if is_private else EVERYBODY
        with contextlib.ExitStack() as on_error:
            on_error.callback(collected.close)
            collected.add(files, more=more)
            owner = Owner(caller.peer, caller.uid)
            job = self._jobs.create("import", name, owner, collecting=True, audience=audience)
            on_error.pop_all()
        self._uploads[job.number] = _Upload(name, owner_uid, private, aliases, replace, collected)
        if not more:
            self._start(job)
        return job

    def add(self, caller: Caller, job: Job, files: Mapping[str, int], *, more: bool) -> None:
        upload = self._uploads.get(job.number)
        if upload is not None:
            upload.files.check_sender(caller, job.number)
        if upload is None or upload.files.is_complete:
            raise InvalidArgument(f"job {job.number} is not waiting for files: it is {job.state}")
        self._limits.check(Scarce.DESCRIPTORS, caller, self._descriptors(), len(files))
        upload.files.add(files, more=more)
        if not more:
            self._start(job)

    def _check_limits(self, caller: Caller, name: str, files: int) -> None:
        waiting = (job.owner for job in self._jobs if job.state is JobState.COLLECTING)
        self._limits.check(Scarce.IMPORTS, caller, waiting)
        self._limits.check(Scarce.DESCRIPTORS, caller, self._descriptors(), files)
        if self._catalog.get(name) is None:
            to_come = (job.owner for job in self._jobs if job.kind == "import" and not job.finished)
            models = (Owner("", model.owner_uid) for model in self._catalog.models())
            self._limits.check(Scarce.MODELS, caller, itertools.chain(models, to_come))

    def _descriptors(self) -> Iterator[Owner]:
        """Yields the holder of each open descriptor."""
        for number, upload in self._uploads.items():
            yield from itertools.repeat(self._jobs.get(number).owner, len(upload.files))

    def _ended(self, job: Job) -> None:
        """Closes the files of an import that was cancelled before they were taken."""
        upload = self._uploads.pop(job.number, None)
        if upload is not None:
            aside(upload.files.close)

    def _peer_left(self, peer: str) -> None:
        for number, upload in list(self._uploads.items()):
            if upload.files.is_cut_short(peer):
                self._jobs.get(number).fail(Cancelled("its caller left the bus before all files were sent"))

    def _start(self, job: Job) -> None:
        upload = self._uploads[job.number]
        origin = Origin("import", f"imported by user {job.owner.uid}")
        request = Request(
            upload.source, upload.name, origin, upload.owner_uid, upload.private, upload.aliases, upload.replace
        )

        async def work(job: Job) -> Result:
            model = await self._conversions.run(job, request)
            return {"model": Variant("o", wire.model_path(model.name))}

        job.start(work)
