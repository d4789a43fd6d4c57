# SPDX-License-Identifier: Apache-2.0
"""Converts models that callers download, while the files are still arriving.

The daemon has no network access: it makes a job, and the caller downloads, reports progress, and passes each file as a
descriptor when it is complete. Awaited files are represented by stand-ins (source/incremental.py), so that space is
reserved, and the conversion begins, before the large files have arrived. If the caller fails or leaves, the job fails
without a trace in the store; the caller keeps the downloaded files for the next attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from dbus_next import Variant

from flashd.checkpoint.source.incremental import LateFiles
from flashd.checkpoint.writing import Progress
from flashd.daemon.access.limits import Limits, Scarce
from flashd.daemon.access.ownership import Ownership
from flashd.daemon.events import Events
from flashd.daemon.ingest.conversions import Conversions, Request
from flashd.daemon.job import Job, Owner, Result
from flashd.daemon.jobs import Jobs
from flashd.dbus import wire
from flashd.dbus.collected_files import CollectedFiles
from flashd.dbus.object_tree import Caller
from flashd.errors import Busy, Cancelled, FlashdError, InvalidArgument, NotAuthorized, Unavailable
from flashd.store.catalog import Catalog, Origin
from flashd.tasks import Stop, aside, in_thread

MAX_TEXT = 1000  # limit of texts from callers


@dataclass(slots=True)
class _Pull:
    """A pull: the request and its state.

    The sender of `announcements` is the peer that downloads; they become `files` when all are announced.
    """

    name: str
    owner_uid: int
    repository: str = ""
    revision: str = ""
    origin: str = ""
    aliases: tuple[str, ...] = ()
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    announced: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    announcements: CollectedFiles = field(default_factory=lambda: CollectedFiles("pull"))
    mutex: threading.Lock = field(default_factory=threading.Lock)
    awaited: set[str] = field(default_factory=set)
    files: LateFiles | None = None
    error: FlashdError | None = None
    converted_bytes: int = 0
    converted_early_bytes: int = 0

    def begin(self, downloader: str, origin: str, aliases: tuple[str, ...]) -> None:
        self.announcements.sender, self.origin, self.aliases = downloader, origin, aliases
        self.begun.set()

    async def announce(self, files: Mapping[str, int], awaited: Collection[str], *, more: bool) -> None:
        if unknown := set(awaited) - files.keys():
            raise InvalidArgument(f"{min(unknown)!r} is awaited, but has no stand-in")
        self.announcements.add(files, more=more)
        self.awaited |= set(awaited)
        if not more:
            await in_thread(self._open)
            self.announced.set()
            self.note_arrival()

    def _open(self, _: Stop) -> None:
        with self.mutex:
            self.files = LateFiles.expecting(self.announcements.take(), self.awaited)

    def note_arrival(self) -> None:
        if not self.opened().awaited:
            self.arrived.set()

    def opened(self) -> LateFiles:
        assert self.files is not None, "it is announced"
        return self.files

    def close(self) -> None:
        with self.mutex:  # files being opened by a thread are closed too
            self.announcements.close()
            if self.files is not None:
                self.files.close()


class Pulls:
    """The running pulls, by the number of their job.

    `send` starts a process that downloads for a caller who does not, and returns an awaitable for its end.
    """

    def __init__(
        self,
        catalog: Catalog,
        jobs: Jobs,
        conversions: Conversions,
        limits: Limits,
        ownership: Ownership,
        send: Callable[[Job], Awaitable[Awaitable[None]]],
        events: Events,
    ) -> None:
        events.job_ended.subscribe(self._ended)
        events.peer_left.subscribe(self._peer_left)
        self._limits = limits
        self._ownership = ownership
        self._catalog = catalog
        self._jobs = jobs
        self._conversions = conversions
        self._send = send
        self._pulls: dict[int, _Pull] = {}

    def request(self, caller: Caller, repository: str, revision: str, name: str, owner_uid: int) -> Job:
        """Begins a pull that another program will `claim` and download. Raises InvalidArgument or AlreadyExists."""
        for text in (repository, revision):
            _check_text(text)
        name = self._catalog.check_free(name or repository, replace=True, owner_uid=owner_uid)
        pull = _Pull(name, owner_uid, repository, revision)
        job = self._started(caller, pull)
        job.report("waiting")
        return job

    def claim(self, caller: Caller, job: Job) -> tuple[str, str, str]:
        """Assigns a requested pull to another program of the same user. Returns (repository, revision, name)."""
        pull = self._pulls.get(job.number)
        if pull is None or caller.uid not in {job.owner.uid, os.getuid()}:
            raise NotAuthorized(f"job {job.number} is not a pull that you may download")
        if pull.announcements.sender:
            raise Busy(f"another program already downloads for job {job.number}")
        pull.announcements.sender = caller.peer
        return pull.repository, pull.revision, pull.name

    def begin(self, caller: Caller, origin: str, name: str, aliases: tuple[str, ...], owner_uid: int) -> Job:
        """Begins a pull that the caller downloads. Raises InvalidArgument or AlreadyExists without making a job."""
        _check_text(origin)
        pull = _Pull(self._catalog.check_free(name, replace=True, owner_uid=owner_uid), owner_uid)
        pull.begin(caller.peer, origin, aliases)
        return self._started(caller, pull)

    def begin_claimed(self, caller: Caller, job: Job, origin: str) -> None:
        """Begins a pull that the caller has claimed, when its origin is known."""
        _check_text(origin)
        self._own(caller, job).begin(caller.peer, origin, ())

    def _started(self, caller: Caller, pull: _Pull) -> Job:
        async def work(job: Job) -> Result:
            job.begin("downloading" if pull.announcements.sender else "waiting")
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
        if not pull.announcements.sender:
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
        """Waits until a program downloads for the pull. Raises Unavailable if none does."""
        sent = asyncio.ensure_future(await self._send(job))
        begun = asyncio.ensure_future(pull.begun.wait())
        try:
            await asyncio.wait({sent, begun}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            begun.cancel()
        if not pull.begun.is_set():
            hint = f"see flashd's journal for the reason, or use flash pull {pull.repository}"
            raise Unavailable("the download process ended at once", hint=hint)

    async def add(
        self, caller: Caller, job: Job, files: Mapping[str, int], awaited: Collection[str], *, more: bool
    ) -> None:
        """Adds files: until the call without `more`, existing ones and stand-ins; later, files that have arrived."""
        pull = self._own(caller, job)
        if not pull.announced.is_set():
            self._limits.check(Scarce.DESCRIPTORS, caller, self._descriptors(), len(files))
            await pull.announce(files, awaited, more=more)
            return
        if awaited or more or pull.files is None:
            raise InvalidArgument(
                f"all files of job {job.number} have already been announced", hint="send only files that have arrived"
            )
        for name, fd in files.items():
            pull.converted_early_bytes = pull.converted_bytes
            with contextlib.closing(CollectedFiles("pull", caller.peer)) as one:  # empty once a thread has taken it
                one.add({name: fd}, more=False)
                await in_thread(functools.partial(_arrived, pull.files, one))
        pull.note_arrival()
        if pull.arrived.is_set():
            job.report("converting", pull.converted_bytes)

    def tell(self, caller: Caller, job: Job, done_bytes: int, total_bytes: int) -> None:
        """Reports the progress of the download. Late reports are ignored."""
        pull = self._own(caller, job)
        if not pull.arrived.is_set():
            job.report_bytes(min(done_bytes, total_bytes), total_bytes)

    def fail(self, caller: Caller, job: Job, error: FlashdError) -> None:
        """Ends a pull with the caller's error, whose text is untrusted."""
        self._end(job, self._own(caller, job), type(error)(_words(error.message), hint=_words(error.hint)))

    def _ended(self, job: Job) -> None:
        pull = self._pulls.pop(job.number, None)
        if pull is not None:
            aside(pull.close)

    def _peer_left(self, peer: str) -> None:
        for number, pull in list(self._pulls.items()):
            if pull.announcements.sender == peer and not pull.arrived.is_set():
                what = "the downloading program left the bus before the end of the download"
                error = Cancelled(what, hint="pull again to resume it")
                self._end(self._jobs.get(number), pull, error)

    def _descriptors(self) -> Iterator[Owner]:
        """Yields the holder of each open descriptor."""
        for number, pull in self._pulls.items():
            count = len(pull.announcements) + sum(1 for _ in pull.files or ())
            yield from itertools.repeat(self._jobs.get(number).owner, count)

    def _own(self, caller: Caller, job: Job) -> _Pull:
        pull = self._pulls.get(job.number)
        if pull is None:
            raise InvalidArgument(f"job {job.number} is not waiting for files: it is {job.state}")
        pull.announcements.check_sender(caller, job.number)
        return pull

    @staticmethod
    def _end(job: Job, pull: _Pull, error: FlashdError) -> None:
        pull.error = pull.error or error
        job.cancel()


def _arrived(files: LateFiles, arrived: CollectedFiles, _: Stop) -> None:
    with arrived.taken() as fds:
        for name, fd in fds.items():
            files.arrived(name, fd)


def _progress(job: Job, pull: _Pull) -> Progress:
    """Returns a function for the converted bytes, which any thread may call. They are shown after the download."""
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
        raise InvalidArgument(f"{text[:80]!r} is not a valid origin of a model", hint="use OWNER/NAME")


def _words(text: str) -> str:
    return "".join(character for character in text[:MAX_TEXT] if character.isprintable())
