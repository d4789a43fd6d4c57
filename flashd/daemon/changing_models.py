# SPDX-License-Identifier: Apache-2.0
"""Models whose record is being changed: made private or public, renamed, or removed.

The record is written in a thread. Decisions that depend on it, such as who may use a model, must be made before or
after the change, never by a record that is about to be replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class Changes:
    """Running changes of models, on one event loop."""

    def __init__(self) -> None:
        self._under_way: dict[str, list[asyncio.Event]] = {}

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Marks a model as being changed for the duration of the block."""
        ended = asyncio.Event()
        self._under_way.setdefault(name, []).append(ended)
        try:
            yield
        finally:
            self._under_way[name].remove(ended)
            if not self._under_way[name]:
                del self._under_way[name]
            ended.set()

    async def settled(self, name: str) -> None:
        """Waits until no change of this model is running."""
        while changes := self._under_way.get(name):
            await changes[0].wait()
