# SPDX-License-Identifier: Apache-2.0
"""Leases of weights, by which programs map a model in memory until they release the lease or leave the bus."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from flashd.daemon.access.callers import Callers
from flashd.daemon.access.limits import Limits, Scarce
from flashd.daemon.access.ownership import Ownership
from flashd.daemon.events import Events
from flashd.daemon.job import Owner
from flashd.daemon.serving.targets import Uses
from flashd.dbus.object_tree import Caller
from flashd.errors import Cancelled
from flashd.memory.device_cache import Hold
from flashd.memory.lease import Lease, LeaseBook
from flashd.memory.residency import Residency
from flashd.store.catalog import Catalog, Model


class Leasing:
    """Grants leases to users who may see a model, and ends them if they may no longer."""

    def __init__(
        self,
        catalog: Catalog,
        residency: Residency,
        leases: LeaseBook,
        callers: Callers,
        limits: Limits,
        ownership: Ownership,
        uses: Uses,
        events: Events,
    ) -> None:
        self._catalog = catalog
        self._residency = residency
        self._leases = leases
        self._callers = callers
        self._limits = limits
        self._ownership = ownership
        self._uses = uses
        self._events = events
        self._waiting: dict[str, set[asyncio.Task[Any]]] = {}  # tasks that wait for a load, by connection
        events.peer_left.subscribe(self._peer_left)
        events.audience_changed.subscribe(self._withhold)
        events.model_published.subscribe(lambda model: self._withhold(model.name))
        events.model_removed.subscribe(lambda model: self._withhold(model.name))

    async def lease(self, model: Model, caller: Caller, device: str) -> tuple[Lease, int, str]:
        """Grants a lease.

        Returns it, a descriptor of its arena for reading (which the caller closes), and the layout.
        """
        self.check(caller)
        checkpoint = self._catalog.checkpoint(model.checkpoint_id)
        layout = await asyncio.to_thread(checkpoint.layout_json)
        with self._abandoned_with(caller.peer):
            hold = await self._residency.acquire(checkpoint, device=device)
        lease, arena_fd = self.grant_mapped(model, caller, device, hold)
        self._uses.note(model.name)
        return lease, arena_fd, layout

    def check(self, caller: Caller) -> None:
        """Checks that the caller may have another lease. Raises LimitExceeded."""
        self._limits.check(Scarce.LEASES, caller, (Owner(held.owner, held.owner_uid) for held in self._leases.all()))

    def grant(self, model: Model, caller: Caller, device: str, hold: Hold) -> Lease:
        """Grants a lease of a held arena, or releases the hold and raises.

        Raises Cancelled if the caller has left, LimitExceeded or NotFound if the situation has changed since the call.
        """
        try:
            if not self._callers.is_present(caller.peer):
                raise Cancelled("its caller has left the bus")
            self.check(caller)  # the caller may have got other leases during the load
            self._ownership.check_seen(caller, model.name)  # and its owner may have made the model private
        except BaseException:
            hold.release()
            raise
        lease = self._leases.add(model.name, caller.peer, caller.uid, device, hold)
        self._events.lease_began(lease)
        return lease

    def grant_mapped(self, model: Model, caller: Caller, device: str, hold: Hold) -> tuple[Lease, int]:
        """Grants a lease like `grant`, with a descriptor for reading, which the caller closes."""
        try:
            arena_fd = hold.arena.open_read_only()
        except BaseException:
            hold.release()
            raise
        try:
            return self.grant(model, caller, device, hold), arena_fd
        except BaseException:
            os.close(arena_fd)
            raise

    def _peer_left(self, peer: str) -> None:
        for task in self._waiting.get(peer, ()):
            task.cancel()
        self._leases.release_owner(peer)

    def _withhold(self, name: str) -> None:
        """Ends the leases of users who may no longer see a model that became private or was removed."""
        for lease in self._leases.all():
            holder = self._callers.get(lease.owner) or Caller(lease.owner, lease.owner_uid)
            if lease.model_name == name and not self._ownership.audience_of(name).includes(holder):
                self._leases.release(lease.number)

    @contextlib.contextmanager
    def _abandoned_with(self, peer: str) -> Iterator[None]:
        """Cancels the current task when this peer leaves, because its lease would never end."""
        task = asyncio.current_task()
        assert task is not None
        tasks = self._waiting.setdefault(peer, set())
        tasks.add(task)
        try:
            yield
        finally:
            tasks.discard(task)
            if not tasks:
                self._waiting.pop(peer, None)
