# SPDX-License-Identifier: Apache-2.0
"""How do files that a caller has opened become a model? Collected over several messages, then converted.

What reaches us are descriptors: the daemon never opens a path for a caller, so nobody can read with its rights.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from dbus_next import Variant

from flashd import wire
from flashd.checkpoint.source import SourceFiles
from flashd.daemon.conversions import Conversions, Request
from flashd.daemon.exports import EVERYBODY, Caller
from flashd.daemon.jobs import Job, Jobs, JobState, Owner, Result
from flashd.daemon.limits import Limits, Scarce
from flashd.daemon.ownership import Ownership
from flashd.errors import Cancelled, InvalidArgument, NotAuthorized
from flashd.store.catalog import Catalog, Origin

MAX_FILES = 1024  # of one import: a client cannot use up our descriptors


@dataclass(slots=True)
class _Collection:
    """Descriptors that are ours, until `take` hands them on; `holder` is who sent them."""

    holder: Caller
    name: str
    owner_uid: int
    private: bool | None
    aliases: tuple[str, ...]
    replace: bool
    fds: dict[str, int] = field(default_factory=dict)

    def add(self, files: Mapping[str, int]) -> None:
        if clash := self.fds.keys() & files.keys():
            raise InvalidArgument(f"{min(clash)!r} was sent twice")
        if len(self.fds) + len(files) > MAX_FILES:
            raise InvalidArgument(f"more than {MAX_FILES} files in one import", hint="send the files of one model")
        for name, fd in files.items():
            self.fds[name] = os.dup(fd)

    def take(self) -> SourceFiles:
        fds, self.fds = self.fds, {}
        return SourceFiles.from_fds(fds)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.popitem()[1])


class Imports:
    """Imports that wait for files, and their start."""

    def __init__(
        self, catalog: Catalog, jobs: Jobs, conversions: Conversions, limits: Limits, ownership: Ownership
    ) -> None:
        self._catalog = catalog
        self._jobs = jobs
        self._conversions = conversions
        self._limits = limits
        self._ownership = ownership
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
        owner_uid: int,
        private: bool | None,
    ) -> Job:
        """Raises InvalidArgument, AlreadyExists or LimitExceeded before there is a job."""
        name = self._catalog.check_free(name, replace=replace, owner_uid=owner_uid)
        self._check_limits(caller, name, len(files))
        collection = _Collection(caller, name, owner_uid, private, aliases, replace)
        model = self._catalog.get(name)
        is_private = private if private is not None else model is not None and model.private
        audience = self._ownership.private_to(owner_uid) if is_private else EVERYBODY
        with contextlib.ExitStack() as on_error:
            on_error.callback(collection.close)
            collection.add(files)
            owner = Owner(caller.peer, caller.uid)
            job = self._jobs.create("import", name, owner, collecting=True, audience=audience)
            on_error.pop_all()
        self._collections[job.number] = collection
        if not more:
            self._start(job)
        return job

    def add(self, caller: Caller, job: Job, files: Mapping[str, int], *, more: bool) -> None:
        if job.owner.peer != caller.peer:
            raise NotAuthorized(f"job {job.number} is another caller's import")
        if job.state is not JobState.COLLECTING:
            raise InvalidArgument(f"job {job.number} waits for no files: it is {job.state}")
        self._limits.check(Scarce.DESCRIPTORS, caller, self._descriptors(), len(files))
        self._collections[job.number].add(files)
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

    def _descriptors(self) -> Iterator[Caller]:
        """Who has sent each of those that are open."""
        for collection in self._collections.values():
            yield from itertools.repeat(collection.holder, len(collection.fds))

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
        request = Request(
            collection.take,
            collection.name,
            origin,
            collection.owner_uid,
            collection.private,
            collection.aliases,
            collection.replace,
        )

        async def work(job: Job) -> Result:
            model = await self._conversions.run(job, request)
            return {"model": Variant("o", wire.model_path(model.name))}

        job.start(work)
