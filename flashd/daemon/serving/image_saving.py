# SPDX-License-Identifier: Apache-2.0
"""Stores new images in the background, so that later loads are one transfer, even after a restart."""

from __future__ import annotations

import asyncio
import logging

from flashd.checkpoint.files import Checkpoint
from flashd.daemon.events import Events
from flashd.memory.device_cache import DeviceCache
from flashd.memory.transfers import StreamMover
from flashd.store.catalog import Catalog
from flashd.tasks import Background, logged

log = logging.getLogger(__name__)

_MOST_OF_FREE = 2  # an image may take one part in so many of the disk's free space, because models need the rest


class ImageSaving:
    """Saves each image as soon as it is made."""

    def __init__(self, catalog: Catalog, mover: StreamMover, background: Background, events: Events) -> None:
        self._catalog = catalog
        self._mover = mover
        events.image_made.subscribe(lambda image, cache: background.start(self._save(image, cache)))

    async def _save(self, image: Checkpoint, cache: DeviceCache) -> None:
        with logged(f"the image {image.id[:12]}"):
            free_bytes = await asyncio.to_thread(self._catalog.free_bytes)
            if image.manifest.data_bytes > free_bytes // _MOST_OF_FREE:
                log.info("the image %s is not stored: models need the remaining space", image.id[:12])
                return
            hold = await cache.borrow(image, lambda done, total: None, is_use=False)
            if hold is None:
                return  # it is already evicted
            with hold, self._catalog.images.draft(image) as draft:
                table = await self._mover.save(hold.region, image.extent, draft.file)
                await asyncio.to_thread(draft.publish, table)
