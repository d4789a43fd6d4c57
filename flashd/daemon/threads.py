# SPDX-License-Identifier: Apache-2.0
"""How does work run beside the calls that asked for it, in a thread or a task, and how does it end?"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from flashd.errors import FlashdError

log = logging.getLogger(__name__)

T = TypeVar("T")

_AFTER_DEFECT_S = 1.0


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


def tell_defect(task: asyncio.Task[Any]) -> None:
    """A done callback for a task that nobody waits for."""
    if not task.cancelled() and (defect := task.exception()) is not None:
        log.error("defect in %s", task.get_name(), exc_info=defect)


async def end(task: asyncio.Task[Any] | None) -> None:
    """Cancels a task, if there is one, and waits until it has ended."""
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Routine:
    """What is done again and again from `start` until `close`. A defect ends one round, and is told once."""

    def __init__(self, name: str, one_round: Callable[[], Awaitable[None]]) -> None:
        """`one_round` waits for what it does next."""
        self._name = name
        self._one_round = one_round
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False

    def start(self) -> None:
        self._is_closing = False
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def close(self) -> None:
        self._is_closing = True  # a round that must come to its end may not heed the cancel
        await end(self._task)

    async def _run(self) -> None:
        told = ""
        while not self._is_closing:
            try:
                await self._one_round()
            except Exception as defect:  # a boundary: nobody waits for the outcome
                if repr(defect) != told:
                    told = repr(defect)
                    log.exception("defect in %s", self._name)
                await asyncio.sleep(_AFTER_DEFECT_S)


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
