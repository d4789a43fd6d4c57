# SPDX-License-Identifier: Apache-2.0
"""Work in threads and tasks in the background of calls, with defined ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

from flashd.errors import Busy, Cancelled, FlashdError

log = logging.getLogger(__name__)

T = TypeVar("T")

_AFTER_DEFECT_S = 1.0
_LAST_PATIENCE_S = 0.5  # grace for a thread that has been asked to end


class Stop:
    """A request to end work in a thread, which calls this object to look for it.

    `commit` decides between work and request: it raises if the request came before; a later request has no effect.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._is_committed = False

    def __call__(self) -> bool:
        return self._is_set

    def set(self) -> bool:
        """Asks the work to end. Returns False if the work has passed `commit`."""
        with self._lock:
            self._is_set = not self._is_committed
            return self._is_set

    def commit(self) -> None:
        """Declares that the work begins its irrevocable part. Raises Cancelled if it was asked to end before."""
        with self._lock:
            if self._is_set:
                raise Cancelled("it was cancelled")
            self._is_committed = True


async def in_thread(work: Callable[[Stop], T], on_end: Callable[[], None] = lambda: None) -> T:
    """Runs `work(stop)` in a new thread and waits for its end; when we are cancelled, only a moment longer.

    `work` calls `stop()` often and raises when it returns true. If it finishes in spite of that, its result counts. A
    thread that hangs, for example in a file system, is abandoned, so `work` must own everything it uses, and call
    `stop.commit()` before any change that others can see. `on_end` is called at the actual end of the thread.
    """
    loop = asyncio.get_running_loop()
    stop, outcome = Stop(), loop.create_future()
    patience: asyncio.Future[None] = loop.create_future()

    def ended(result: T | None, error: BaseException | None) -> None:
        on_end()
        if error is not None:
            outcome.set_exception(error)
            outcome.exception()  # retrieved, lest asyncio log it when no caller waits any more
        else:
            outcome.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = work(stop)
        except BaseException as raised:  # noqa: BLE001 -- it is raised where the result is awaited
            error = raised
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(ended, result, error)

    try:
        threading.Thread(target=run, name="work", daemon=True).start()
    except RuntimeError:
        on_end()
        raise Busy("the machine has no threads left", hint="try again later") from None
    while not outcome.done():
        try:
            await asyncio.wait([outcome, patience], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if stop.set():
                loop.call_later(_LAST_PATIENCE_S, _give_up, patience)
        if patience.done() and not outcome.done():
            raise asyncio.CancelledError
    if stop() and outcome.exception() is not None:
        raise asyncio.CancelledError
    result: T = outcome.result()
    return result


def _give_up(patience: asyncio.Future[None]) -> None:
    if not patience.done():
        patience.set_result(None)


async def outlast(*ended: asyncio.Future[Any], on_cancel: Callable[[], None] = lambda: None) -> bool:
    """Waits for all these futures even when cancelled, since memory and files must outlive the work that uses them.

    Returns whether it was cancelled, which the caller has to obey; `on_cancel` is called at once when that happens.
    Exceptions of the futures are not raised here.
    """
    is_cancelled = False
    while pending := [each for each in ended if not each.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError:
            is_cancelled = True
            on_cancel()
    for each in ended:
        if not each.cancelled():
            each.exception()  # retrieved, lest asyncio log it as never retrieved
    return is_cancelled


async def run_to_end(step: Coroutine[Any, Any, None]) -> bool:
    """Runs a step to its end even when cancelled, and raises its exception.

    Returns whether it was cancelled meanwhile, which the caller has to obey.
    """
    task = asyncio.ensure_future(step)
    is_cancelled = await outlast(task)
    task.result()
    return is_cancelled


def aside(work: Callable[[], None]) -> None:
    """Runs work that may hang, such as closing a caller's file, in a thread without waiting for it."""
    try:
        threading.Thread(target=work, name="aside", daemon=True).start()
    except RuntimeError:
        log.error("background work was dropped: the machine has no threads left")


def close_all(fds: Iterable[int]) -> None:
    """Closes all these descriptors. Errors of close are ignored: we could not repair a failed last flush."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def tell_defect(task: asyncio.Task[Any]) -> None:
    """Logs an exception of a task, as the done callback of a task that is never awaited."""
    if not task.cancelled() and (defect := task.exception()) is not None:
        log.error("defect in %s", task.get_name(), exc_info=defect)


async def end(task: asyncio.Task[Any] | None) -> None:
    """Cancels a task, if any, and waits for its end."""
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Routine:
    """Work that is repeated from `start` to `close`. An unexpected exception ends its round and is logged once."""

    def __init__(self, name: str, one_round: Callable[[], Awaitable[None]]) -> None:
        """`one_round` does the work once, after waiting until it is due."""
        self._name = name
        self._one_round = one_round
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False

    def start(self) -> None:
        self._is_closing = False
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def close(self) -> None:
        self._is_closing = True  # a round that must not be interrupted may ignore the cancellation
        await end(self._task)

    async def _run(self) -> None:
        told = ""
        while not self._is_closing:
            try:
                await self._one_round()
            except Exception as defect:  # a boundary: no caller waits for the outcome
                if repr(defect) != told:
                    told = repr(defect)
                    log.exception("defect in %s", self._name)
                await asyncio.sleep(_AFTER_DEFECT_S)


class Background:
    """Small background work, such as recording that a model was used. Only `close` waits for it."""

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
        except Exception:  # a boundary: no caller waits for the outcome
            log.exception("defect in background work")


@contextlib.contextmanager
def logged(what: str) -> Iterator[None]:
    """Logs an error in the block and goes on, for work without a caller."""
    try:
        yield
    except (FlashdError, OSError) as error:
        log.warning("%s: %s", what, error)
