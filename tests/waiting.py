# SPDX-License-Identifier: Apache-2.0
"""Returns when what a test waits for has come about; fails if it does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


async def eventually(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    """Of a condition that is a coroutine function or not."""
    deadline = time.monotonic() + timeout_s
    while True:
        holds = condition()
        if asyncio.iscoroutine(holds):
            holds = await holds
        if holds:
            return
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.02)
