# SPDX-License-Identifier: Apache-2.0
"""The free space of the store, as last reported by its disk.

A disk may hang, so a thread asks it, and callers do not wait long: after a moment they get the last answer.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from flashd.daemon.events import Events
from flashd.store.catalog import Catalog
from flashd.store.looks import Look
from flashd.tasks import Background

log = logging.getLogger(__name__)

_PATIENCE_S = 0.5


@dataclass(frozen=True, slots=True)
class Room:
    """The answer of the disk. `leftover_bytes` belong to images that are unfinished or could not be removed."""

    free_bytes: int
    leftover_bytes: int


class StoreRoom:
    """Asks the disk before each read of the value, and after each change of the store.

    The constructor waits for the first answer, since it runs before the daemon serves calls.
    """

    def __init__(self, catalog: Catalog, background: Background, events: Events) -> None:
        self._catalog = catalog
        self._background = background
        self._events = events
        self._look: Look[Room] | None = None
        self._is_silent = False
        self._is_telling = False
        self.known = self._asked()
        events.model_published.subscribe(lambda model: self._tell_soon())
        events.model_removed.subscribe(lambda model: self._tell_soon())
        events.job_ended.subscribe(lambda job: self._tell_soon())

    async def refresh(self) -> None:
        """Updates `known`, unless the disk does not answer."""
        if self._look is None or self._look.has_ended:
            try:
                self._look = Look(lambda at: self._asked(), ())
            except RuntimeError:  # the machine has no threads left
                return
            self._is_silent = False
        elif self._is_silent:
            return
        try:
            self.known = await self._look.result(_PATIENCE_S)
        except TimeoutError:
            if not self._is_silent:
                log.warning("the store's file system does not answer, so its free space is unknown")
            self._is_silent = True

    def _tell_soon(self) -> None:
        if not self._is_telling:
            self._is_telling = True
            self._background.start(self._tell())

    async def _tell(self) -> None:
        before = self.known
        try:
            await self.refresh()
        finally:
            self._is_telling = False
        if self.known != before:
            self._events.manager_changed()

    def _asked(self) -> Room:
        return Room(self._catalog.free_bytes(), self._catalog.images.leftover_bytes())
