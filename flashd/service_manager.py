# SPDX-License-Identifier: Apache-2.0
"""Notifications to the service manager: systemd, or our own keeper (sd_notify(3), native/keeper.cpp)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Sequence

from flashd.tasks import Routine

log = logging.getLogger(__name__)

_BARRIER_S = 5.0
_TELL_S = 1.0  # a hanging manager does not read, and the queue of its socket is short (unix(7))
_STATUS_S = 5.0


class ServiceManager:
    """The service manager at NOTIFY_SOCKET. Without one, all calls have no effect."""

    def __init__(self, address: str | None) -> None:
        self._address = address

    @property
    def is_there(self) -> bool:
        """True if a service manager started us."""
        return self._address is not None

    def tell(self, state: str, fds: Sequence[int] = ()) -> bool:
        """Sends a notification.

        Returns False if there is no service manager, or it has ended or hangs. Never raises.
        """
        if self._address is None:
            return False
        address = self._address
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
        ):
            channel.settimeout(_TELL_S)
            channel.connect("\0" + address[1:] if address.startswith("@") else address)
            if fds:
                socket.send_fds(channel, [state.encode()], list(fds))
            else:
                channel.sendall(state.encode())
            return True
        return False

    async def barrier(self) -> None:
        """Waits until all earlier notifications are processed, or the service manager does not answer."""
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        loop, closed = asyncio.get_running_loop(), asyncio.Event()
        try:
            is_heard = self.tell("BARRIER=1", [writing])
        finally:
            os.close(writing)
        try:
            if is_heard:
                loop.add_reader(reading, closed.set)  # the receiver closes its end
                await asyncio.wait_for(closed.wait(), _BARRIER_S)
        except TimeoutError:
            log.warning("the service manager does not answer")
        finally:
            loop.remove_reader(reading)
            os.close(reading)


class Watchdog(Routine):
    """Sends keep-alives and the status line at regular intervals.

    The event loop itself sends them, so that a process that no longer answers is killed and restarted
    (systemd.service(5), WatchdogSec). It also stops sending keep-alives in a state that only a restart can fix. Worker
    threads are not involved, because all of them may be legitimately busy for minutes.
    """

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
            log.error("%s: a restart is needed", ailment)
        self._ailed = ailment
        summary = ailment or self._summary()
        if self._wants_signs and not ailment:
            self._manager.tell("WATCHDOG=1")
        if summary != self._told and self._manager.tell(f"STATUS={summary}"):
            self._told = summary
        await asyncio.sleep(self._interval_s)
