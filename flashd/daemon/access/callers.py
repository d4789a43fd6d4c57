# SPDX-License-Identifier: Apache-2.0
"""The users of the connections that have called the daemon."""

from __future__ import annotations

from collections.abc import Collection

from flashd.daemon.events import Events
from flashd.dbus.connection import Connection
from flashd.dbus.object_tree import Caller


class Callers:
    """Callers that are still connected, by their unique bus names."""

    def __init__(self, connection: Connection, events: Events) -> None:
        self._connection = connection
        self._callers: dict[str, Caller] = {}
        events.peer_left.subscribe(self._forget)

    async def identify(self, peer: str) -> Caller:
        """Returns the caller of a connection. A connection that has left meanwhile is not cached."""
        if peer not in self._callers:
            who = await self._connection.credentials(peer)
            caller = Caller(peer, who.uid, gids=who.gids)
            if not self._connection.is_present(peer):
                return caller
            self._callers[peer] = caller
        return self._callers[peer]

    def get(self, peer: str) -> Caller | None:
        return self._callers.get(peer)

    def all(self) -> Collection[Caller]:
        return self._callers.values()

    def is_present(self, peer: str) -> bool:
        """Tells whether a connection is still on the bus."""
        return self._connection.is_present(peer)

    def _forget(self, peer: str) -> None:
        self._callers.pop(peer, None)
