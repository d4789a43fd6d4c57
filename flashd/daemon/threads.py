# SPDX-License-Identifier: Apache-2.0
"""How does blocking work run beside the event loop, and end when its job is cancelled?"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

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
