# SPDX-License-Identifier: Apache-2.0
"""Does the daemon still live? Signs of life for the service manager, and its status line.

The event loop itself gives the signs, so that a daemon that answers nobody any more is killed and started again
(systemd.service(5), WatchdogSec). Nor does it give them while something ails us that only that can mend. Worker threads
are not asked: all of them may rightly be busy for minutes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from flashd.daemon.service_manager import ServiceManager
from flashd.daemon.threads import Routine

log = logging.getLogger(__name__)

_STATUS_S = 5.0


class Watchdog(Routine):
    """Tells the service manager every so often."""

    def __init__(
        self,
        manager: ServiceManager,
        patience_s: float | None,
        summary: Callable[[], str],
        ailment: Callable[[], str] = lambda: "",
    ) -> None:
        """`ailment` says what is wrong with us, if anything."""
        super().__init__("watchdog", self._tell)
        self._manager = manager
        self._wants_signs = patience_s is not None
        self._interval_s = min(patience_s / 3, _STATUS_S) if patience_s else _STATUS_S
        self._summary = summary
        self._ailment = ailment
        self._told = ""
        self._ailed = ""

    async def _tell(self) -> None:
        ailment = self._ailment()
        if ailment and not self._ailed:
            log.error("%s: the daemon should be started anew", ailment)
        self._ailed = ailment
        summary = ailment or self._summary()
        if self._wants_signs and not ailment:
            self._manager.tell("WATCHDOG=1")
        if summary != self._told and self._manager.tell(f"STATUS={summary}"):
            self._told = summary
        await asyncio.sleep(self._interval_s)
