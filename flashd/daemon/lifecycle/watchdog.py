# SPDX-License-Identifier: Apache-2.0
"""Keep-alives and the status line for the service manager.

The event loop itself sends keep-alives, so that a daemon that no longer answers is killed and restarted
(systemd.service(5), WatchdogSec). It also stops sending them in a state that only a restart can fix. Worker threads are
not involved, because all of them may be legitimately busy for minutes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from flashd.daemon.lifecycle.service_manager import ServiceManager
from flashd.tasks import Routine

log = logging.getLogger(__name__)

_STATUS_S = 5.0


class Watchdog(Routine):
    """Sends keep-alives and the status at regular intervals."""

    def __init__(
        self,
        manager: ServiceManager,
        patience_s: float | None,
        summary: Callable[[], str],
        ailment: Callable[[], str] = lambda: "",
    ) -> None:
        """`ailment` returns a problem that only a restart can fix, or an empty string."""
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
            log.error("%s: the daemon has to be restarted", ailment)
        self._ailed = ailment
        summary = ailment or self._summary()
        if self._wants_signs and not ailment:
            self._manager.tell("WATCHDOG=1")
        if summary != self._told and self._manager.tell(f"STATUS={summary}"):
            self._told = summary
        await asyncio.sleep(self._interval_s)
