# SPDX-License-Identifier: Apache-2.0
"""Runs scans of file systems that may never answer in separate threads.

A thread that hangs in open(2), stat(2) or readdir(2) on a mount without its server cannot be ended. So a scan records
the place it is at; the caller goes on without that place, and scans it again when the thread has returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

At = Callable[[Path], bool]  # records the place of a scan; returns False if the scan has to skip it


class Look(Generic[T]):
    """Runs `work(at)` in a thread. Must be created and awaited on the event loop."""

    def __init__(self, work: Callable[[At], T], skip: Collection[Path]) -> None:
        self._work = work
        self._skip = frozenset(skip)
        self._is_abandoned = False
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[T] = self._loop.create_future()
        self.place = Path()
        self._since = time.monotonic()
        threading.Thread(target=self._run, name="look into folders", daemon=True).start()

    @property
    def has_ended(self) -> bool:
        return self._outcome.done()

    async def result(self, patience_s: float) -> T:
        """Returns the result of `work`. Raises its exception, or TimeoutError if it stays at one `place` for longer."""
        while not self._outcome.done():
            left_s = self._since + patience_s - time.monotonic()
            if left_s <= 0:
                self._is_abandoned = True
                self._outcome.add_done_callback(
                    lambda outcome: outcome.exception()
                )  # the result is not needed any more
                raise TimeoutError
            await asyncio.wait([self._outcome], timeout=left_s)
        return self._outcome.result()

    def _at(self, place: Path) -> bool:
        if self._is_abandoned or place in self._skip:
            return False
        self.place, self._since = place, time.monotonic()
        return True

    def _run(self) -> None:
        try:
            result = self._work(self._at)
        except BaseException as error:  # noqa: BLE001 -- it is raised where the result is awaited
            self._tell(self._fail, error)
        else:
            self._tell(self._succeed, result)

    def _tell(self, how: Callable[..., None], what: object) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and no caller waits
            self._loop.call_soon_threadsafe(how, what)

    def _fail(self, error: BaseException) -> None:
        if not self._outcome.cancelled():
            self._outcome.set_exception(error)

    def _succeed(self, result: T) -> None:
        if not self._outcome.cancelled():
            self._outcome.set_result(result)
