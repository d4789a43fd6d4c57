# SPDX-License-Identifier: Apache-2.0
"""Waits for a condition, and fails the test if it does not come about."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

# Longer than anything takes on a machine with three times as much work as cores, so that only defects wait so long.
# Shorter than a test's own limit (pyproject.toml), so that the failure names the condition.
PATIENCE_S = 100.0


def until(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


async def eventually(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> None:
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
