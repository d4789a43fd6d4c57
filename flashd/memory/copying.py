# SPDX-License-Identifier: Apache-2.0
"""Copies bytes from one arena in host memory into another, as fast as memory allows.

The kernel copies from memfd to memfd (copy_file_range(2)): pages that are written completely need not be zeroed first,
which would be half of the work for ordinary pages. Huge pages are only used for mapped memory, so arenas with huge
pages are filled by reading into the mapping.
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
from flashd.tasks import outlast
from flashd.units import MiB

_PART_BYTES = 16 * MiB
_UNABLE = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM}
_MOST_THREADS = 4  # a few threads use up the memory's bandwidth


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of one arena to copy into another, which is not sealed yet."""

    source: Arena
    source_offset: int
    offset: int
    length: int


class Copies:
    """Running copies into one arena. `finish` must be awaited in all cases."""

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
        """Waits until all writes have ended. Raises TransferFailed, or Cancelled after `cancel`."""
        is_cancelled = await outlast(*self._workers, on_cancel=self._stop.set)
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
                    self._is_mapped = True  # huge pages of an earlier daemon's configuration, or an old kernel
            if self._is_mapped:
                place = (ctypes.c_char * rest).from_address(self._target.address + offset)
                count = os.preadv(part.source.fd, [place], start)
            if not count:
                raise TransferFailed("copy from arena to arena: the source is too short")
            done += count


def _split(copy: Copy) -> Sequence[Copy]:
    starts = itertools.takewhile(lambda start: start < copy.length, itertools.count(0, _PART_BYTES))
    return [
        Copy(copy.source, copy.source_offset + start, copy.offset + start, min(_PART_BYTES, copy.length - start))
        for start in starts
    ]
