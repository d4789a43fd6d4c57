# SPDX-License-Identifier: Apache-2.0
"""How does a model that its caller downloads become one of ours while it is still arriving?

The daemon has no network and wants none: it makes a job, and the caller downloads, tells how far it is, and hands over
each file as a descriptor when all of it is there. What is awaited is represented by stand-ins (checkpoint/late.py), so
that room is reserved, and the conversion begins, before the large files have arrived. If the caller fails or leaves, so
does the job, and nothing stays here; what was downloaded is the caller's, and waits for the next attempt.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from dbus_next import Variant

from flashd import wire
from flashd.checkpoint.convert import Progress
from flashd.checkpoint.late import LateFiles
from flashd.daemon.conversions import Conversions, Request
from flashd.daemon.exports import Caller
from flashd.daemon.jobs import Job, Jobs, Owner, Result
from flashd.daemon.limits import Limits, Scarce
from flashd.daemon.ownership import Ownership
from flashd.errors import Busy, Cancelled, FlashdError, InvalidArgument, NotAuthorized, Unavailable
from flashd.store.catalog import Catalog, Origin

MAX_FILES = 1024  # of one pull: a client cannot use up our descriptors
MAX_TEXT = 1000  # of what a caller may make us say


@dataclass(slots=True)
class _Pull:
    """What is asked for, who downloads it (a peer, empty if nobody yet), and what has come of it.

    Descriptors in `fds` are ours, as are those of `files`, which they become when all are announced.
    """

    name: str
    owner_uid: int
    repository: str = ""
    revision: str = ""
    downloader: str = ""
    origin: str = ""
    aliases: tuple[str, ...] = ()
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    announced: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    fds: dict[str, int] = field(default_factory=dict)
    awaited: set[str] = field(default_factory=set)
    files: LateFiles | None = None
    error: FlashdError | None = None
    converted_bytes: int = 0
    converted_early_bytes: int = 0

    def begin(self, downloader: str, origin: str, aliases: tuple[str, ...]) -> None:
        self.downloader, self.origin, self.aliases = downloader, origin, aliases
        self.begun.set()

    def announce(self, files: Mapping[str, int], awaited: Collection[str], *, more: bool) -> None:
        if clash := self.fds.keys() & files.keys():
            raise InvalidArgument(f"{min(clash)!r} was sent twice")
        if len(self.fds) + len(files) > MAX_FILES:
            raise InvalidArgument(f"more than {MAX_FILES} files in one pull", hint="send the files of one model")
        if unknown := set(awaited) - files.keys():
            raise InvalidArgument(f"{min(unknown)!r} is awaited, and nothing stands in for it")
        self.fds |= {name: os.dup(fd) for name, fd in files.items()}
        self.awaited |= set(awaited)
        if not more:
            fds, self.fds = self.fds, {}
            self.files = LateFiles.expecting(fds, self.awaited)
            self.announced.set()
            self.note_arrival()

    def note_arrival(self) -> None:
        if not self.opened().awaited:
            self.arrived.set()

    def opened(self) -> LateFiles:
        assert self.files is not None, "it is announced"
        return self.files

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.popitem()[1])
        if self.files is not None:
            self.files.close()


class Pulls:
    """Pulls under way, by the number of their job. `send` has somebody download for a caller who does not, and
    returns what ends when they do."""

    def __init__(
        self,
        catalog: Catalog,
        jobs: Jobs,
        conversions: Conversions,
        limits: Limits,
        ownership: Ownership,
        send: Callable[[Job], Awaitable[Awaitable[None]]],
    ) -> None:
        self._limits = limits
        self._ownership = ownership
        self._catalog = catalog
        self._jobs = jobs
        self._conversions = conversions
        self._send = send
        self._pulls: dict[int, _Pull] = {}

    def request(self, caller: Caller, repository: str, revision: str, name: str, owner_uid: int) -> Job:
        """A pull that somebody else will `claim` and download. Raises InvalidArgument or AlreadyExists."""
        for text in (repository, revision):
            _check_text(text)
        name = self._catalog.check_free(name or repository, replace=True, owner_uid=owner_uid)
        pull = _Pull(name, owner_uid, repository, revision)
        job = self._started(caller, pull)
        job.report("waiting")
        return job

    def claim(self, caller: Caller, job: Job) -> tuple[str, str, str]:
        """(repository, revision, name) of what a user asked for, to another program of that user's, once."""
        pull = self._pulls.get(job.number)
        if pull is None or caller.uid not in {job.owner.uid, os.getuid()}:
            raise NotAuthorized(f"job {job.number} is not a pull that you may download")
        if pull.downloader:
            raise Busy(f"somebody downloads for job {job.number} already")
        pull.downloader = caller.peer
        return pull.repository, pull.revision, pull.name

    def begin(self, caller: Caller, origin: str, name: str, aliases: tuple[str, ...], owner_uid: int) -> Job:
        """A pull that the caller downloads. Raises InvalidArgument or AlreadyExists before there is a job."""
        _check_text(origin)
        pull = _Pull(self._catalog.check_free(name, replace=True, owner_uid=owner_uid), owner_uid)
        pull.begin(caller.peer, origin, aliases)
        return self._started(caller, pull)

    def begin_claimed(self, caller: Caller, job: Job, origin: str) -> None:
        """It is known what will be downloaded for a pull that the caller has claimed."""
        _check_text(origin)
        self._own(caller, job).begin(caller.peer, origin, ())

    def _started(self, caller: Caller, pull: _Pull) -> Job:
        async def work(job: Job) -> Result:
            job.begin("downloading" if pull.downloader else "waiting")
            try:
                return await self._work(job, pull)
            except asyncio.CancelledError:
                if pull.error:
                    raise pull.error from None
                raise

        job = self._jobs.create(
            "pull", pull.name, Owner(caller.peer, caller.uid), audience=self._ownership.audience_of(pull.name)
        )
        self._pulls[job.number] = pull
        job.start(work)
        return job

    async def _work(self, job: Job, pull: _Pull) -> Result:
        if not pull.downloader:
            await self._until_begun(job, pull)
        job.report("downloading")
        origin = Origin("hub", pull.origin)
        model = self._catalog.get(pull.name)
        if model is None or model.origin != origin:
            await pull.announced.wait()
            request = Request(pull.opened, pull.name, origin, pull.owner_uid, aliases=pull.aliases)
            model = await self._conversions.run_beside(request, _progress(job, pull), pull.arrived)
        early = Variant("t", pull.converted_early_bytes)
        return {"model": Variant("o", wire.model_path(model.name)), "converted_early_bytes": early}

    async def _until_begun(self, job: Job, pull: _Pull) -> None:
        """Raises Unavailable if nobody downloads it."""
        sent = asyncio.ensure_future(await self._send(job))
        begun = asyncio.ensure_future(pull.begun.wait())
        try:
            await asyncio.wait({sent, begun}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            begun.cancel()
        if not pull.begun.is_set():
            hint = f"flashd's journal may say why; flash pull {pull.repository} downloads without it"
            raise Unavailable("the process that downloads ended at once", hint=hint)

    async def add(
        self, caller: Caller, job: Job, files: Mapping[str, int], awaited: Collection[str], *, more: bool
    ) -> None:
        """Until the call that says no more: what there is, and what stands in. Afterwards: what has arrived."""
        pull = self._own(caller, job)
        if not pull.announced.is_set():
            self._limits.check(Scarce.DESCRIPTORS, caller, self._descriptors(), len(files))
            pull.announce(files, awaited, more=more)
            return
        if awaited or more or pull.files is None:
            raise InvalidArgument(f"all files of job {job.number} were announced", hint="send what has arrived")
        ours = {name: os.dup(fd) for name, fd in files.items()}
        try:
            for name, fd in ours.items():
                pull.converted_early_bytes = pull.converted_bytes
                await asyncio.to_thread(pull.files.arrived, name, fd)
        finally:
            for fd in ours.values():
                os.close(fd)
        pull.note_arrival()
        if pull.arrived.is_set():
            job.report("converting", pull.converted_bytes)

    def tell(self, caller: Caller, job: Job, done_bytes: int, total_bytes: int) -> None:
        """How far the download is; what is told too late is ignored."""
        pull = self._own(caller, job)
        if not pull.arrived.is_set():
            job.report_bytes(min(done_bytes, total_bytes), total_bytes)

    def fail(self, caller: Caller, job: Job, error: FlashdError) -> None:
        """The caller could not download it, and says why. The words are a stranger's."""
        self._end(job, self._own(caller, job), type(error)(_words(error.message), hint=_words(error.hint)))

    def ended(self, job: Job) -> None:
        """To be told of finished jobs."""
        pull = self._pulls.pop(job.number, None)
        if pull is not None:
            pull.close()

    def peer_left(self, peer: str) -> None:
        for number, pull in list(self._pulls.items()):
            if pull.downloader == peer and not pull.arrived.is_set():
                what = "who downloaded it left the bus before all of it was there"
                error = Cancelled(what, hint="pull again: it goes on where it stopped")
                self._end(self._jobs.get(number), pull, error)

    def _descriptors(self) -> Iterator[Owner]:
        """Who has those that are open."""
        for number, pull in self._pulls.items():
            yield from itertools.repeat(self._jobs.get(number).owner, len(pull.fds) + sum(1 for _ in pull.files or ()))

    def _own(self, caller: Caller, job: Job) -> _Pull:
        pull = self._pulls.get(job.number)
        if pull is None:
            raise InvalidArgument(f"job {job.number} waits for no files: it is {job.state}")
        if pull.downloader != caller.peer:
            raise NotAuthorized(f"job {job.number} is not a pull of yours")
        return pull

    @staticmethod
    def _end(job: Job, pull: _Pull, error: FlashdError) -> None:
        pull.error = pull.error or error
        job.cancel()


def _progress(job: Job, pull: _Pull) -> Progress:
    """A function that any thread may call with what is converted; it is shown once nothing more is downloaded."""
    loop = asyncio.get_running_loop()

    def converted(done_bytes: int, total_bytes: int) -> None:
        pull.converted_bytes = done_bytes
        if pull.arrived.is_set():
            job.report_bytes(done_bytes, total_bytes)

    def from_thread(done_bytes: int, total_bytes: int) -> None:
        loop.call_soon_threadsafe(converted, done_bytes, total_bytes)

    return from_thread


def _check_text(text: str) -> None:
    if not text.isprintable() or not 0 < len(text) <= MAX_TEXT:
        raise InvalidArgument(f"{text[:80]!r} is not where a model can come from", hint="use OWNER/NAME")


def _words(text: str) -> str:
    return "".join(character for character in text[:MAX_TEXT] if character.isprintable())
