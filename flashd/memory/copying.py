# SPDX-License-Identifier: Apache-2.0
"""How do bytes get from one arena in host memory into another, as fast as memory allows?

The kernel copies from memfd to memfd (copy_file_range(2)): pages that are written whole need not be zeroed first, which
of ordinary pages is half of the work. Huge pages are only given to what is mapped, so those are read into.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import itertools
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from flashd.errors import Cancelled, TransferFailed
from flashd.memory.arena import Arena, HugePages
from flashd.units import MiB

_PART_BYTES = 16 * MiB
_UNABLE = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM}
_MOST_THREADS = 4  # a few fill the memory's bandwidth


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of one arena that belong into another, which is not sealed yet."""

    source: Arena
    source_offset: int
    offset: int
    length: int


class Copies:
    """Copies under way into one arena; to be awaited by `finish`, whatever happens."""

    def __init__(self, copies: Sequence[Copy], target: Arena, huge_pages: HugePages) -> None:
        self.done_bytes = 0
        self._parts = iter([part for copy in copies for part in _split(copy)])
        self._target = target
        self._is_mapped = huge_pages is not HugePages.NONE
        self._lock = threading.Lock()
        self._stop = threading.Event()
        threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS) if copies else 0
        self._workers = [asyncio.ensure_future(asyncio.to_thread(self._work)) for _ in range(threads)]

    def cancel(self) -> None:
        self._stop.set()

    async def finish(self) -> None:
        """Returns when nothing is written any more. Raises TransferFailed, or Cancelled after `cancel`."""
        is_cancelled = False
        while pending := [worker for worker in self._workers if not worker.done()]:
            try:
                await asyncio.wait(pending)
            except asyncio.CancelledError:
                is_cancelled = True
                self._stop.set()
        failures = [failure for worker in self._workers if (failure := worker.exception())]
        if is_cancelled:
            raise asyncio.CancelledError
        if failures:
            raise failures[0]

    def _work(self) -> None:
        while True:
            with self._lock:
                part = next(self._parts, None)
            if part is None:
                return
            if self._stop.is_set():
                raise Cancelled("the copy was cancelled")
            try:
                self._copy(part)
            except OSError as error:
                raise TransferFailed(f"copy from arena to arena: {error.strerror}") from None
            with self._lock:
                self.done_bytes += part.length

    def _copy(self, part: Copy) -> None:
        done = 0
        while done < part.length:
            start, offset, rest = part.source_offset + done, part.offset + done, part.length - done
            count = 0
            if not self._is_mapped:
                try:
                    count = os.copy_file_range(part.source.fd, self._target.fd, rest, start, offset)
                except OSError as error:
                    if error.errno not in _UNABLE:
                        raise
                    self._is_mapped = True  # huge pages that an earlier daemon was configured for, or an old kernel
            if self._is_mapped:
                place = (ctypes.c_char * rest).from_address(self._target.address + offset)
                count = os.preadv(part.source.fd, [place], start)
            if not count:
                raise TransferFailed("copy from arena to arena: it ends too early")
            done += count


def _split(copy: Copy) -> Sequence[Copy]:
    starts = itertools.takewhile(lambda start: start < copy.length, itertools.count(0, _PART_BYTES))
    return [
        Copy(copy.source, copy.source_offset + start, copy.offset + start, min(_PART_BYTES, copy.length - start))
        for start in starts
    ]
