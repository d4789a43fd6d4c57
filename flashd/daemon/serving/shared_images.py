# SPDX-License-Identifier: Apache-2.0
"""Shares images between engines that users start themselves. The first engine makes the image.

The key of an image is made of its user, its checkpoint, and the engine's digest of everything else that it depends on.
Images are never given to other users or to the daemon's own engines, because their maker can still write to them: GPU
memory cannot be sealed. The maker and each finder hold a lease; without leases, an image can be evicted like other
weights.
"""

from __future__ import annotations

import asyncio
import json
import os

from flashd.checkpoint.files import Checkpoint
from flashd.daemon.events import Events
from flashd.daemon.serving.leasing import Leasing
from flashd.dbus.object_tree import Caller
from flashd.errors import AlreadyExists, InvalidArgument, NotFound
from flashd.io.streamer import blake3
from flashd.memory.device import Kind
from flashd.memory.device_cache import DeviceCache
from flashd.memory.lease import Lease
from flashd.memory.residency import Residency
from flashd.store.catalog import Catalog, Model

_MOST_BUILD = 64  # characters: a digest


class SharedImages:
    """Published images, on one event loop."""

    def __init__(
        self, catalog: Catalog, residency: Residency, leasing: Leasing, events: Events, *, own_uid: int
    ) -> None:
        """Images of the daemon's own user are announced, so that they may be stored."""
        self._catalog = catalog
        self._residency = residency
        self._leasing = leasing
        self._events = events
        self._own_uid = own_uid
        self._describing: set[str] = set()  # keys of images that are being published

    async def lease(self, model: Model, caller: Caller, build: str, device: str) -> tuple[Lease, int, str]:
        """Leases an image on a device. Returns the lease, a descriptor (which the caller closes), and the layout as
        JSON.

        Raises NotFound if this user has published none, or if it has left all memory and was not stored.
        """
        self._leasing.check(caller)
        key, images = _key(model, caller, build), self._catalog.images
        image = await asyncio.to_thread(images.get, key)
        if image is None or not (self._residency.devices_of(key) or images.is_stored(key)):
            raise NotFound(f"there is no such image of {model.name}", hint="make an image and publish it")
        layout = await asyncio.to_thread(images.layout_json, image)
        hold = await self._residency.acquire(image, device=device)
        lease, arena_fd = self._leasing.grant_mapped(model, caller, device, hold)
        return lease, arena_fd, layout

    async def publish(
        self, model: Model, caller: Caller, build: str, device: str, fd: int, layout: str, size_bytes: int
    ) -> Lease:
        """Adopts an image that an engine has made in the memory of a device. The caller closes the descriptor.

        Raises OutOfMemory if it exceeds the budget, AlreadyExists if there is such an image, or InvalidArgument if it
        is not as described.
        """
        self._leasing.check(caller)
        key, cache = _key(model, caller, build), self._residency.cache(device)
        if cache.device.kind is Kind.HOST:
            raise InvalidArgument(
                "images can only be in GPU memory", hint="in host memory, lease the checkpoint itself"
            )
        claim = await cache.claim(cache.device.rounded(size_bytes))
        try:
            arena = await asyncio.to_thread(cache.device.adopt, os.dup(fd), size_bytes)
            try:
                image = await self._described(key, cache, model, layout, size_bytes)
                hold = cache.admit(image, arena, claim)
            except BaseException:
                arena.close()
                raise
        except BaseException:
            claim.release()
            raise
        if caller.uid == self._own_uid:
            self._events.image_made(image, cache)
        return self._leasing.grant(model, caller, device, hold)

    async def _described(self, key: str, cache: DeviceCache, model: Model, layout: str, size_bytes: int) -> Checkpoint:
        """Describes a published image. Its layout may have megabytes, so it is parsed in a thread."""
        images = self._catalog.images
        if key in cache or key in self._describing or images.is_stored(key):  # its description must not be replaced
            raise AlreadyExists(f"there is already such an image of {model.name}", hint="lease it with LeaseImage")
        self._describing.add(key)
        try:
            return await asyncio.to_thread(images.describe, key, layout, size_bytes, model.checkpoint_id)
        finally:
            self._describing.discard(key)


def _key(model: Model, caller: Caller, build: str) -> str:
    """Makes the key of an image. It includes the user, so it never collides with keys of the daemon's own engines."""
    if not build or len(build) > _MOST_BUILD:
        raise InvalidArgument(f"a build must have 1 to {_MOST_BUILD} characters", hint="use a digest")
    parts = {"published by": caller.uid, "checkpoint": model.checkpoint_id, "build": build}
    return blake3(json.dumps(parts, sort_keys=True).encode()).hex()
