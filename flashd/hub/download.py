# SPDX-License-Identifier: Apache-2.0
"""Downloads the files of a revision into our own folder: in parallel, verified, and never twice.

    FOLDER/NAME          a complete file, whose digest matches the hub's
    FOLDER/NAME.part     its beginning, where the next attempt resumes after an interruption, a cancellation or a crash
    FOLDER/lock          held by the one process that downloads into the folder

huggingface_hub's `hf_hub_download` starts again after a crash (it no longer shares partial files between processes), so
we use its lower layers: its session, its headers and its `http_get`, which resumes within and between attempts.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO, cast

from huggingface_hub import hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers, disable_progress_bars

from flashd._version import __version__
from flashd.checkpoint.header import MAX_HEADER_BYTES
from flashd.checkpoint.source.reader import pooling_path
from flashd.durable import writing
from flashd.errors import Busy, Cancelled, FlashdError, Internal, InvalidSource, StoreFull, TransferFailed
from flashd.hub.repository import Needed, RepositoryFile, Revision, asking, patiently, unreachable
from flashd.units import MiB, format_bytes

_AT_ONCE = 4
_START_BYTES = 1 * MiB  # contains the header of almost every shard
_LENGTH_BYTES = 8
_RESERVE_BYTES = 64 * MiB


class _Enough(Exception):
    """Raised when the wanted number of bytes has been written."""


class _Target:
    """A partial file for http_get, which limits writes to the announced size, and stops them when cancelled."""

    def __init__(self, path: Path, file: IO[bytes], limit_bytes: int, on_bytes: Callable[[int], None]) -> None:
        self._path = path
        self._file = file
        self._limit_bytes = limit_bytes
        self._on_bytes = on_bytes

    def write(self, chunk: bytes) -> int:
        room_bytes = self._limit_bytes - self._file.tell()
        left = memoryview(chunk)[:room_bytes]
        with writing(self._path):
            while left:  # an unbuffered write may be short, for example on a nearly full disk
                left = left[self._file.write(left) :]
        self._on_bytes(self._file.tell())
        if len(chunk) > room_bytes:
            raise _Enough
        return len(chunk)

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def truncate(self) -> int:
        return self._file.truncate()


class Download:
    """The locked folder of one revision.

    Threads end with the context; downloaded bytes are kept for the next attempt.
    """

    def __init__(self, revision: Revision, folder: Path, token: str | None) -> None:
        self._revision = revision
        self._folder = folder
        self._headers = build_hf_headers(token=token, library_name="flashd", library_version=__version__)
        self._stop = threading.Event()
        self._present: dict[str, int] = {}
        self.downloaded_bytes = 0
        self._mutex = threading.Lock()

    def __contains__(self, file: RepositoryFile) -> bool:
        """Tells whether a file is complete and verified."""
        return file.cached is not None or (self._folder / file.name).exists()

    def open(self, file: RepositoryFile) -> int:
        """Opens a downloaded file, and returns its descriptor."""
        return os.open(file.cached or self._folder / file.name, os.O_RDONLY | os.O_CLOEXEC)

    def present_bytes(self, files: Iterable[RepositoryFile]) -> int:
        """Returns the number of downloaded bytes of these files."""
        return sum(self._present_bytes(file) for file in files)

    def check_space(self, needed: Needed, store: Path) -> None:
        """Checks the free space for the download, and for the store if it is on the same disk. Raises StoreFull."""
        left_bytes = needed.size_bytes - self.present_bytes(needed.files)
        need_bytes = left_bytes + (needed.size_bytes if _is_same_disk(self._folder, store) else 0)
        free_bytes = max(0, shutil.disk_usage(self._folder).free - _RESERVE_BYTES)
        if need_bytes > free_bytes:
            what = f"{format_bytes(left_bytes)} are still to be downloaded to {self._folder}"
            sizes = f"{format_bytes(need_bytes)} must be free on that disk, but only {format_bytes(free_bytes)} are"
            raise StoreFull(f"{what}: {sizes}", hint="free some space, or set XDG_CACHE_HOME to a larger disk")

    def fetch(self, file: RepositoryFile) -> None:
        """Downloads a whole file.

        Raises the errors of `asking`, TransferFailed or StoreFull, and keeps its beginning.
        """
        if file in self:
            return
        part = self._get(file, file.size_bytes)
        if not self._matches(part, file):
            part.unlink()
            self._present[file.name] = 0
            hint = "pull again; if the error persists, the file on the hub is damaged"
            raise TransferFailed(f"{file.name} of {self._revision.repository} does not match its digest", hint=hint)
        with writing(self._folder):
            with part.open("rb") as opened:
                os.fsync(opened.fileno())  # a file under its final name counts as complete
            part.rename(self._folder / file.name)

    def fetch_header(self, file: RepositoryFile) -> bytes:
        """Downloads a safetensors file up to the end of its header. Further bytes received are kept."""
        path = self._get(file, min(file.size_bytes, _START_BYTES))
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            if length > MAX_HEADER_BYTES:
                raise InvalidSource(f"{file.name} of {self._revision.repository} is not a safetensors file")
            self._get(file, min(file.size_bytes, _LENGTH_BYTES + length))
            opened.seek(0)
            return opened.read(_LENGTH_BYTES + length)

    def each(
        self, files: Iterable[RepositoryFile], do: Callable[[RepositoryFile], object]
    ) -> queue.SimpleQueue[RepositoryFile | BaseException]:
        """Processes files, a few in parallel. Puts finished files into the queue, or the first error.

        The threads are daemon threads, because one that waits for a silent server may be left behind.
        """
        done: queue.SimpleQueue[RepositoryFile | BaseException] = queue.SimpleQueue()
        waiting: queue.SimpleQueue[RepositoryFile] = queue.SimpleQueue()
        for file in files:
            waiting.put(file)

        def work() -> None:
            while not self._stop.is_set():
                try:
                    file = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    do(file)
                except BaseException as error:  # noqa: BLE001 -- the end of a thread; the reader of the queue raises it
                    done.put(error if isinstance(error, FlashdError) else _defect(error))
                    self._stop.set()  # after the error, because the others only report that they were stopped
                    return
                done.put(file)

        for number in range(min(_AT_ONCE, waiting.qsize())):
            threading.Thread(target=work, name=f"flashd download {number}", daemon=True).start()
        return done

    def stop(self) -> None:
        """Requests the end of the threads."""
        self._stop.set()

    def clear(self) -> None:
        """Removes the files, and leftovers of other commits."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for other in self._folder.parent.iterdir():
            with suppress(OSError), (other / "lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other)
        with suppress(OSError):
            self._folder.parent.rmdir()

    def _get(self, file: RepositoryFile, wanted_bytes: int) -> Path:
        """Downloads at least `wanted_bytes` of a file into its partial file, after the end of an earlier attempt."""
        path = self._folder / f"{file.name}.part"
        self._present_bytes(file)
        with asking(self._revision.repository, self._revision.commit):
            patiently(lambda: self._try_to_get(file, path, wanted_bytes), self._stop.wait)
        return path

    def _try_to_get(self, file: RepositoryFile, path: Path, wanted_bytes: int) -> None:
        url = hf_hub_url(self._revision.repository, pooling_path(file.name), revision=self._revision.commit)
        headers = dict(self._headers)
        if wanted_bytes < file.size_bytes:
            headers["Range"] = f"bytes=0-{wanted_bytes - 1}"
        with writing(path):
            opened = path.open("ab+", buffering=0)
        with opened:
            present_bytes = opened.seek(0, os.SEEK_END)
            if present_bytes >= wanted_bytes:
                return
            target = _Target(path, opened, wanted_bytes, lambda present_bytes: self._progressed(file, present_bytes))
            self._progressed(file, present_bytes)
            try:
                http_get(
                    url, cast(BinaryIO, target), resume_size=present_bytes, headers=headers, expected_size=wanted_bytes
                )
            except _Enough:
                return
            except (HfHubHTTPError, OfflineModeIsEnabled):
                raise
            except HTTPError as error:  # it has already retried as long as there was progress
                raise unreachable(error) from None
            except OSError:  # the library's error for a body that ended early
                what = f"{file.name} of {self._revision.repository} ended early"
                raise TransferFailed(what, hint="pull again to resume it") from None

    def _matches(self, path: Path, file: RepositoryFile) -> bool:
        with path.open("rb") as opened:
            if file.sha256:
                return hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
            content = opened.read()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)  # gitformat-pack(5)
        return blob.hexdigest() == file.git_sha1

    def _present_bytes(self, file: RepositoryFile) -> int:
        if file in self:
            return file.size_bytes
        if file.name not in self._present:
            part = self._folder / f"{file.name}.part"
            self._present[file.name] = part.stat().st_size if part.exists() else 0
        return self._present[file.name]

    def _progressed(self, file: RepositoryFile, present_bytes: int) -> None:
        """Reports progress. Raises Cancelled if the download was stopped."""
        with self._mutex:
            self.downloaded_bytes += max(0, present_bytes - self._present[file.name])
            self._present[file.name] = present_bytes
        if self._stop.is_set():
            raise Cancelled("the download was cancelled")


@contextmanager
def downloading(revision: Revision, cache: Path, token: str | None) -> Iterator[Download]:
    """Prepares the download of a revision. Raises Busy while another process of this user downloads the same."""
    disable_progress_bars("huggingface_hub.http_get")
    owner = repo_folder_name(repo_id=revision.repository, repo_type="model")
    folder = cache / "hub" / owner / revision.commit
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "lock").open("wb")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            hint = "wait for it, or cancel it: see flash jobs"
            raise Busy(f"{revision.repository} is already being pulled", hint=hint) from None
        download = Download(revision, folder, token)
        try:
            yield download
        finally:
            download.stop()


def _is_same_disk(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return one.stat().st_dev == other.stat().st_dev
    return False


def _defect(error: BaseException) -> FlashdError:
    """Returns an error without the original message, which may contain a URL with a signature."""
    defect = Internal(f"the download failed: {type(error).__name__}", hint="this is a bug in flashd: please report it")
    defect.__cause__ = error
    return defect
