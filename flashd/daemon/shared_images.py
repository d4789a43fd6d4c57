# SPDX-License-Identifier: Apache-2.0
"""How do engines that users start themselves share the image that the first of them has made?

An image is found again by who published it: user, checkpoint, and what the engine says that it depends on besides.
Nobody is given weights that another user has made, and the daemon's own engines are given none of them: whoever made an
image still can write to it, for a GPU's memory knows no seals. Whoever publishes one holds a lease of it, and so does
whoever finds it; without leases it makes way like all that is in memory.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable

from flashd.checkpoint.files import Checkpoint
from flashd.daemon.exports import Caller
from flashd.daemon.jobs import Owner
from flashd.daemon.limits import Limits, Scarce
from flashd.errors import AlreadyExists, Cancelled, InvalidArgument, NotFound
from flashd.memory.device import Kind
from flashd.memory.lease import Lease, LeaseBook
from flashd.memory.place import Hold, Place
from flashd.memory.residency import Residency
from flashd.store.catalog import Catalog, Model
from flashd.streamer import blake3

_MOST_BUILD = 64  # characters: a digest


class SharedImages:
    """All calls on one event loop."""

    def __init__(
        self,
        catalog: Catalog,
        residency: Residency,
        leases: LeaseBook,
        limits: Limits,
        *,
        own_uid: int,
        is_present: Callable[[str], bool],
        on_leased: Callable[[Lease], None],
        on_made: Callable[[Checkpoint, Place], None],
    ) -> None:
        """`on_made` hears of images of the daemon's own user, which may be stored."""
        self._catalog = catalog
        self._residency = residency
        self._leases = leases
        self._limits = limits
        self._own_uid = own_uid
        self._is_present = is_present
        self._on_leased = on_leased
        self._on_made = on_made

    async def lease(self, model: Model, caller: Caller, build: str, device: str) -> tuple[Lease, int, str]:
        """A lease of the image on a device, a descriptor of it (the caller's to close), and its layout as JSON. Raises
        NotFound if this user has published none, or it is in no memory and was not stored."""
        self._check(caller)
        key, images = _key(model, caller, build), self._catalog.images
        image = await asyncio.to_thread(images.get, key)
        if image is None or not (self._residency.devices_of(key) or images.is_stored(key)):
            raise NotFound(f"there is no such image of {model.name}", hint="make one, and publish it")
        layout = await asyncio.to_thread(images.layout_json, image)
        hold = await self._residency.acquire(image, device=device)
        try:
            arena_fd = hold.arena.open_read_only()
        except BaseException:
            hold.release()
            raise
        try:
            return self._leased(model, caller, device, hold), arena_fd, layout
        except BaseException:
            os.close(arena_fd)
            raise

    async def publish(
        self, model: Model, caller: Caller, build: str, device: str, fd: int, layout: str, size_bytes: int
    ) -> Lease:
        """Takes in what an engine has made, in memory of that device; the descriptor stays the caller's.

        Raises OutOfMemory if the budget has no room for it, AlreadyExists if there is one, InvalidArgument if it is not
        what is said.
        """
        self._check(caller)
        key, place = _key(model, caller, build), self._residency.place(device)
        if place.device.kind is Kind.HOST:
            raise InvalidArgument("an image is in the memory of a GPU", hint="the host has the checkpoint itself")
        claim = await place.claim(place.device.rounded(size_bytes))
        try:
            arena = await asyncio.to_thread(place.device.adopt, os.dup(fd), size_bytes)
            try:
                if key in place or self._catalog.images.is_stored(key):  # whose description is not to be replaced
                    raise AlreadyExists(f"there is such an image of {model.name}", hint="lease it")
                image = self._catalog.images.describe(key, layout, size_bytes, model.checkpoint_id)
                hold = place.admit(image, arena, claim)
            except BaseException:
                arena.close()
                raise
        except BaseException:
            claim.release()
            raise
        if caller.uid == self._own_uid:
            self._on_made(image, place)
        return self._leased(model, caller, device, hold)

    def _leased(self, model: Model, caller: Caller, device: str, hold: Hold) -> Lease:
        try:
            if not self._is_present(caller.peer):
                raise Cancelled("its caller has left the bus")
            self._check(caller)  # others may have come while it was loaded
        except BaseException:
            hold.release()
            raise
        lease = self._leases.add(model.name, caller.peer, caller.uid, device, hold)
        self._on_leased(lease)
        return lease

    def _check(self, caller: Caller) -> None:
        self._limits.check(Scarce.LEASES, caller, (Owner(held.owner, held.owner_uid) for held in self._leases.all()))


def _key(model: Model, caller: Caller, build: str) -> str:
    """Never that of an image which an engine of the daemon's has made: those have no user."""
    if not build or len(build) > _MOST_BUILD:
        raise InvalidArgument(f"a build has 1 to {_MOST_BUILD} characters", hint="use a digest")
    parts = {"published by": caller.uid, "checkpoint": model.checkpoint_id, "build": build}
    return blake3(json.dumps(parts, sort_keys=True).encode()).hex()
