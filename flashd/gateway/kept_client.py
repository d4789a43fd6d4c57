# SPDX-License-Identifier: Apache-2.0
"""The connection on which the gateway asks the daemon for swaps, kept between them: a swap takes less time than a
connection to the bus."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from flashd.client.client import Client
from flashd.errors import Unavailable
from flashd.gateway.directory import Connect


class KeptClient:
    """A client that is lent to one thread at a time. A thread that finds it lent gets another, which is not kept."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._idle: list[Client] = []  # one at most; list.pop and append are atomic
        self._lent: set[Client] = set()

    @contextlib.contextmanager
    def lent(self) -> Iterator[Client]:
        """Raises Unavailable if there is no daemon."""
        client = self._taken() or self._connect(True)
        self._lent.add(client)
        is_good = False
        try:
            yield client
            is_good = True
        except Unavailable:
            raise
        except Exception:  # an answer of the daemon: the connection is as good as before
            is_good = True
            raise
        finally:
            self._lent.discard(client)
            if is_good and not self._idle:
                self._idle.append(client)
            else:
                client.close()

    def close(self) -> None:
        """Closes the idle connection, as when the daemon has ended."""
        if (client := self._taken()) is not None:
            client.close()

    def end(self) -> None:
        """Closes all connections. What waits on one in a thread fails with Unavailable."""
        self.close()
        for client in list(self._lent):
            client.close()

    def _taken(self) -> Client | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None
