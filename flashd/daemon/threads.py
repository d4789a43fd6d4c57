# SPDX-License-Identifier: Apache-2.0
"""How does work run beside the calls that asked for it, in a thread or a task, and how does it end?"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from flashd.errors import FlashdError

log = logging.getLogger(__name__)

T = TypeVar("T")


async def in_thread(work: Callable[[Callable[[], bool]], T]) -> T:
    """Runs `work(cancelled)` in a thread and waits until it has ended, also when we are cancelled.

    `work` asks `cancelled()` often and then raises. If it finishes all the same, it has finished: its result counts.
    """
    stop = threading.Event()
    future = asyncio.get_running_loop().run_in_executor(None, work, stop.is_set)
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            stop.set()
    if stop.is_set() and future.exception() is not None:
        raise asyncio.CancelledError
    return future.result()


class Background:
    """Small things that nobody waits for, such as noting that a model was used; `close` waits for them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._run(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    @staticmethod
    async def _run(work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except FlashdError as error:
            log.warning("%s", error)
        except Exception:  # a boundary: nobody waits for the outcome
            log.exception("defect in background work")
