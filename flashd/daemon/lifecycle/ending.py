# SPDX-License-Identifier: Apache-2.0
"""The ways in which the daemon ends, which differ in what they leave for the next one."""

from __future__ import annotations

import asyncio
import enum

from flashd.daemon.lifecycle.settings import Settings
from flashd.errors import Unavailable
from flashd.service_manager import ServiceManager

RESTART_STATUS = 75  # RestartForceExitStatus= of the unit; native/keeper.cpp knows it too


class How(enum.Enum):
    """The ways to end."""

    FOR_GOOD = "for good"  # nothing is left: engines end, and the folder of sockets is removed
    LEAVING = "leaving"  # the next daemon may be about to start, so descriptors kept by the service manager are left
    RESTARTING = "restarting"  # the same, and the service manager shall start the next daemon

    @property
    def exit_status(self) -> int:
        return RESTART_STATUS if self is How.RESTARTING else 0


class Ending:
    """The requested end, set once by a signal or a bus call. Later requests have no effect."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self.how = How.LEAVING

    def ask(self, how: How) -> None:
        if not self._asked.is_set():
            self.how = how
            self._asked.set()

    @property
    def is_asked(self) -> bool:
        return self._asked.is_set()

    async def wait(self) -> None:
        await self._asked.wait()


def restart(ending: Ending, manager: ServiceManager, settings: Settings) -> None:
    """Ends the daemon so that the service manager starts the next one.

    Raises Unavailable if there is no service manager, or InvalidArgument if the settings are invalid.
    """
    if not manager.is_there:
        hint = "stop it with flash stop, and start it by hand again; a daemon started by flash start can be restarted"
        raise Unavailable("this flashd was started by hand, so no service manager would start it again", hint=hint)
    settings.next()
    ending.ask(How.RESTARTING)
