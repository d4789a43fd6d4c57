# SPDX-License-Identifier: Apache-2.0
"""The caller's side of a pull: passes the files of a revision to the daemon as they arrive.

The daemon first gets the data for planning the checkpoint: the small files, and a stand-in with the header for each
shard (source/incremental.py). If its store is too full, it refuses before the large files are downloaded. Then each
shard follows when it is complete and matches its digest.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Generic

from flashd.checkpoint.source.reader import MAX_SIDE_FILE_BYTES, Index, parse_index
from flashd.config.paths import cache_folder
from flashd.durable import writing
from flashd.errors import FlashdError, NotFound
from flashd.hub import PullOutcome, variants
from flashd.hub.download import Download, downloading
from flashd.hub.receiver import J, Receiver
from flashd.hub.repository import Needed, RepositoryFile, Revision, choose, look_up

_REPORT_S = 0.5
_POLL_S = 0.1


def pull(
    client: Receiver[J],
    repository: str,
    *,
    revision: str,
    name: str,
    aliases: Sequence[str] = (),
    token: str | None = None,
    on_progress: Callable[[J], None] | None = None,
    job: J | None = None,
) -> PullOutcome:
    """Pulls a model as described at `Client.pull`. `job` is a claimed job, if any."""
    started = time.monotonic()
    name = name or repository
    with _failing(client, job):
        wanted, variant = variants.split(repository)
        found = variants.chosen(look_up(wanted, revision, token), variant)
        job = client.begin_pull(found.origin, name, aliases=aliases, job=job)
    with _failing(client, job):
        if _is_there(client, job.subject, found):
            job.wait(on_progress)
            return PullOutcome(job.subject, repository, found.commit, True, 0, 0, time.monotonic() - started)
        with downloading(found, cache_folder(), token) as download:
            needed = choose(found, lambda file: _index(download, file))
            download.check_space(needed, Path(client.status().store_path))
            result = _Feeding(client, job, download, needed, on_progress).run()
            download.clear()
    return PullOutcome(
        job.subject, repository, found.commit, False, download.downloaded_bytes, result["converted_early_bytes"],
        time.monotonic() - started,
    )  # fmt: skip


@contextmanager
def _failing(client: Receiver[J], job: J | None) -> Iterator[None]:
    """Ends the job with the error raised in the block.

    If the job has failed before, its own error is raised instead.
    """
    try:
        yield
    except FlashdError as error:
        if job is not None:
            job.refresh()
            if job.error_name:
                job.wait()
            if not job.finished:
                client.fail_pull(job, error)
        raise
    except BaseException:
        if job is not None:
            job.cancel()
        raise


def _is_there(client: Receiver[J], name: str, found: Revision) -> bool:
    try:
        model = client.model(name)
    except NotFound:
        return False
    return model.name == name and model.source == found.origin


def _index(download: Download, file: RepositoryFile) -> Index:
    download.fetch(file)
    fd = download.open(file)
    with os.fdopen(fd, "rb") as opened:
        return parse_index(opened.read(MAX_SIDE_FILE_BYTES), file.name)


class _Feeding(Generic[J]):
    """The transfer of one job's files to the daemon."""

    def __init__(
        self, client: Receiver[J], job: J, download: Download, needed: Needed, on_progress: Callable[[J], None] | None
    ) -> None:
        self._client = client
        self._job = job
        self._download = download
        self._needed = needed
        self._on_progress = on_progress
        self._reported_at = 0.0

    def run(self) -> dict[str, int]:
        late = [file for file in self._needed.weights if file not in self._download]
        self._wait(self._needed.others, self._download.fetch)
        headers: dict[str, bytes] = {}

        def fetch_header(file: RepositoryFile) -> None:
            headers[file.name] = self._download.fetch_header(file) if file.name.endswith(".safetensors") else b""

        self._wait(late, fetch_header)
        fds: dict[str, int] = {}
        try:
            for file in self._needed.files:
                fds[file.name] = _stand_in(file, headers[file.name]) if file in late else self._download.open(file)
            self._client.feed_pull(self._job, fds, awaited=[file.name for file in late])
        finally:
            for fd in fds.values():
                os.close(fd)
        self._wait(late, self._download.fetch, self._hand_over)
        return dict(self._job.wait(self._on_progress))

    def _wait(
        self,
        files: Iterable[RepositoryFile],
        do: Callable[[RepositoryFile], object],
        then: Callable[[RepositoryFile], None] = lambda file: None,
    ) -> None:
        """Waits until all files are done. Raises the error of a file, or that of the job."""
        files = list(files)
        done = self._download.each(files, do)
        for _ in files:
            while True:
                self._report()
                try:
                    outcome = done.get(timeout=_POLL_S)
                    break
                except queue.Empty:
                    continue
            if isinstance(outcome, BaseException):
                raise outcome
            then(outcome)

    def _hand_over(self, file: RepositoryFile) -> None:
        fd = self._download.open(file)
        try:
            self._client.feed_pull(self._job, {file.name: fd})
        finally:
            os.close(fd)

    def _report(self) -> None:
        if time.monotonic() - self._reported_at < _REPORT_S:
            return
        self._reported_at = time.monotonic()
        present_bytes = self._download.present_bytes(self._needed.files)
        self._client.tell_pull(self._job, present_bytes, self._needed.size_bytes)  # refused if the job has ended
        if self._on_progress:
            self._job.refresh()
            self._on_progress(self._job)


def _stand_in(file: RepositoryFile, header: bytes) -> int:
    fd = os.memfd_create(file.name, os.MFD_CLOEXEC)
    with writing(Path(file.name)):  # the limit on file sizes (setrlimit(2)) applies here too
        os.write(fd, header)
        os.ftruncate(fd, file.size_bytes)
    return fd
