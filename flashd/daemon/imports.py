# SPDX-License-Identifier: Apache-2.0
"""How do files that a caller has opened become a model? Collected over several messages, then converted.

What reaches us are descriptors: the daemon never opens a path for a caller, so nobody can read with its rights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from dbus_next import Variant

from flashd import wire
from flashd.checkpoint.source import SourceFiles
from flashd.daemon.conversions import Conversions, Request
from flashd.daemon.exports import Caller
from flashd.daemon.jobs import Job, Jobs, JobState, Owner, Result
from flashd.errors import Cancelled, InvalidArgument, NotAuthorized
from flashd.store.catalog import Catalog, Origin

MAX_FILES = 1024  # of one import: a client cannot use up our descriptors


@dataclass(slots=True)
class _Collection:
    """Descriptors that are ours, until `take` hands them on."""

    name: str
    aliases: tuple[str, ...]
    replace: bool
    fds: dict[str, int] = field(default_factory=dict)

    def add(self, files: Mapping[str, int]) -> None:
        if clash := self.fds.keys() & files.keys():
            raise InvalidArgument(f"{min(clash)!r} was sent twice")
        if len(self.fds) + len(files) > MAX_FILES:
            raise InvalidArgument(f"more than {MAX_FILES} files in one import", hint="send the files of one model")
        self.fds |= {name: os.dup(fd) for name, fd in files.items()}

    def take(self) -> SourceFiles:
        fds, self.fds = self.fds, {}
        return SourceFiles.from_fds(fds)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.popitem()[1])


class Imports:
    """Imports that wait for files, and their start."""

    def __init__(self, catalog: Catalog, jobs: Jobs, conversions: Conversions) -> None:
        self._catalog = catalog
        self._jobs = jobs
        self._conversions = conversions
        self._collections: dict[int, _Collection] = {}

    def begin(
        self,
        caller: Caller,
        name: str,
        files: Mapping[str, int],
        *,
        more: bool,
        aliases: tuple[str, ...],
        replace: bool,
    ) -> Job:
        """Raises InvalidArgument or AlreadyExists before there is a job."""
        name = self._catalog.check_free(name, replace=replace)
        collection = _Collection(name, aliases, replace)
        collection.add(files)
        job = self._jobs.create("import", name, Owner(caller.peer, caller.uid), collecting=True)
        self._collections[job.number] = collection
        if not more:
            self._start(job)
        return job

    def add(self, caller: Caller, job: Job, files: Mapping[str, int], *, more: bool) -> None:
        if job.owner.peer != caller.peer:
            raise NotAuthorized(f"job {job.number} is another caller's import")
        if job.state is not JobState.COLLECTING:
            raise InvalidArgument(f"job {job.number} waits for no files: it is {job.state}")
        self._collections[job.number].add(files)
        if not more:
            self._start(job)

    def ended(self, job: Job) -> None:
        """To be told of finished jobs: files of one that was cancelled while it collected are closed."""
        collection = self._collections.pop(job.number, None)
        if collection is not None:
            collection.close()

    def peer_left(self, peer: str) -> None:
        for number in list(self._collections):
            job = self._jobs.get(number)
            if job.owner.peer == peer and job.state is JobState.COLLECTING:
                job.fail(Cancelled("its caller left the bus before all files were sent"))

    def _start(self, job: Job) -> None:
        collection = self._collections[job.number]
        origin = Origin("import", f"imported by user {job.owner.uid}")
        request = Request(collection.take, collection.name, origin, collection.aliases, collection.replace)

        async def work(job: Job) -> Result:
            model = await self._conversions.run(job, request)
            return {"model": Variant("o", wire.model_path(model.name))}

        job.start(work)
