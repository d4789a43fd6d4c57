# SPDX-License-Identifier: Apache-2.0
"""Does the daemon still live? Signs of life for the service manager, and its status line.

The event loop itself gives the signs, so that a daemon that answers nobody any more is killed and started again
(systemd.service(5), WatchdogSec). Nor does it give them while something ails us that only that can mend. Worker threads
are not asked: all of them may rightly be busy for minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from flashd.daemon.service_manager import ServiceManager

log = logging.getLogger(__name__)

_STATUS_S = 5.0


class Watchdog:
    """Tells the service manager every so often, until `close`."""

    def __init__(
        self,
        manager: ServiceManager,
        patience_s: float | None,
        summary: Callable[[], str],
        ailment: Callable[[], str] = lambda: "",
    ) -> None:
        """`ailment` says what is wrong with us, if anything."""
        self._manager = manager
        self._wants_signs = patience_s is not None
        self._interval_s = min(patience_s / 3, _STATUS_S) if patience_s else _STATUS_S
        self._summary = summary
        self._ailment = ailment
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="watchdog")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        told, ailed = "", ""
        while True:
            ailment = self._ailment()
            if ailment and not ailed:
                log.error("%s: the daemon should be started anew", ailment)
            ailed = ailment
            summary = ailment or self._summary()
            if self._wants_signs and not ailment:
                self._manager.tell("WATCHDOG=1")
            if summary != told and not self._manager.tell(f"STATUS={summary}"):
                return  # nobody listens
            told = summary
            await asyncio.sleep(self._interval_s)
