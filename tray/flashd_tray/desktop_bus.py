# SPDX-License-Identifier: Apache-2.0
"""The desktop's session bus: ensures that only one tray runs, and sends notifications.

A second tray asks the first one to show itself (org.freedesktop.Application), and ends. Without a notification daemon,
notifications are silently lost; the icon and the menu have the same information.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from dbus_next import Variant

from flashd.dbus import connection
from flashd.dbus.connection import Connection, Received, Reply, plain
from flashd.errors import AlreadyExists, FlashdError, InvalidArgument
from flashd_tray.plain import line, markup

log = logging.getLogger(__name__)

NAME = "org.flashd1.Tray"
PATH = "/org/flashd1/Tray"
APPLICATION = "org.freedesktop.Application"
NOTIFICATIONS = "org.freedesktop.Notifications"
NOTIFICATIONS_PATH = "/org/freedesktop/Notifications"
_MATCH = f"type='signal',interface='{NOTIFICATIONS}',path='{NOTIFICATIONS_PATH}'"
_CALL_S = 5.0
_SHOWN_MS = -1  # for the desktop's default time

T = TypeVar("T")


class DesktopBus:
    """A connection with its own thread, used as a context. Raises Unavailable if there is no session bus."""

    def __init__(self, address: str = "session") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="desktop bus", daemon=True)
        self._thread.start()
        self._ids: dict[str, int] = {}  # ids of the notifications that each key replaces
        self._under_way: set[Future[None]] = set()
        self._clicks: dict[tuple[int, str], Callable[[], None]] = {}
        self._on_activate: Callable[[str], None] = lambda _startup_id: None
        try:
            self._connection: Connection = self._run(connection.connect(address))
        except BaseException:
            self._end_thread()
            raise
        self._connection.listen(self._on_signal)

    def claim(self, on_activate: Callable[[str], None], startup_id: str = "") -> bool:
        """Becomes the tray of this session. Returns False if there is one, after asking it to show itself.

        `startup_id` is the desktop's id of the click, without which it may not raise a window to the front.
        """
        self._on_activate = on_activate
        self._connection.serve(self._serve)
        try:
            self._run(self._connection.own(NAME))
        except AlreadyExists:
            platform = {"desktop-startup-id": Variant("s", startup_id)} if startup_id else {}
            self._run(self._call(NAME, PATH, APPLICATION, "Activate", "a{sv}", [platform]))
            return False
        return True

    def notify(
        self,
        title: str,
        body: str,
        *,
        icon: str = "flashd",
        actions: Mapping[str, tuple[str, Callable[[], None]]] | None = None,
        replaces: str = "",
    ) -> None:
        """Shows a notification, in place of the last one with the same `replaces`. Returns at once.

        `actions` go from a key to a label and what a click does; it is called on this bus's thread.
        """
        shown = asyncio.run_coroutine_threadsafe(self._notify(title, body, icon, actions or {}, replaces), self._loop)
        self._under_way.add(shown)
        shown.add_done_callback(self._under_way.discard)

    def close(self) -> None:
        """Closes the connection after sending pending messages."""
        wait(set(self._under_way), timeout=_CALL_S)
        if self._thread.is_alive():
            with contextlib.suppress(FlashdError):
                self._run(self._connection.close())
            self._end_thread()

    def __enter__(self) -> DesktopBus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _notify(
        self,
        title: str,
        body: str,
        icon: str,
        actions: Mapping[str, tuple[str, Callable[[], None]]],
        replaces: str,
    ) -> None:
        labels = [word for key, (label, _) in actions.items() for word in (key, line(label))]
        hints = {"desktop-entry": Variant("s", "flashd-tray")}
        values = ["flashd", self._ids.get(replaces, 0), icon, line(title), markup(body), labels, hints, _SHOWN_MS]
        try:
            await self._connection.add_match(_MATCH)
            reply = await self._call(
                NOTIFICATIONS, NOTIFICATIONS_PATH, NOTIFICATIONS, "Notify", "susssasa{sv}i", values
            )
        except FlashdError as error:
            log.info("a notification could not be shown: %s", error)
            return
        number = int(reply.body[0])
        if replaces:
            self._ids[replaces] = number
        for key, (_, does) in actions.items():
            self._clicks[number, key] = does

    async def _call(
        self, destination: str, path: str, interface: str, member: str, signature: str, body: Sequence[Any]
    ) -> Received:
        return await self._connection.call(destination, path, interface, member, signature, body, timeout_s=_CALL_S)

    async def _serve(self, call: Received) -> Reply:
        if (call.interface, call.member) != (APPLICATION, "Activate"):
            raise InvalidArgument(f"{NAME} has no method {call.interface}.{call.member}")
        self._on_activate(str(plain(call.body[0]).get("desktop-startup-id", "")))
        return Reply()

    def _on_signal(self, signal: Received) -> None:
        match signal.interface, signal.member, signal.body:
            case str(i), "ActionInvoked", (int(number), str(key)) if i == NOTIFICATIONS:
                if does := self._clicks.get((number, key)):
                    does()
            case str(i), "NotificationClosed", (int(number), *_) if i == NOTIFICATIONS:
                self._clicks = {known: does for known, does in self._clicks.items() if known[0] != number}
                self._ids = {known: value for known, value in self._ids.items() if value != number}

    def _run(self, step: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(step, self._loop).result()

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
