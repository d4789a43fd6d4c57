# SPDX-License-Identifier: Apache-2.0
"""Takes over models in memory and engines that outlived the previous daemon."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from flashd.daemon.lifecycle.descriptor_store import ArenaKeeper, EngineKeeper, FdStore
from flashd.engines.engine import BindingRecord, Engine, EngineFactory, EngineState
from flashd.engines.inherited import InheritedProcess
from flashd.errors import FlashdError, InvalidArgument, NotFound
from flashd.memory.residency import Residency
from flashd.store.catalog import Catalog
from flashd.swap.swapper import Swapper
from flashd.swap.weights import Recipient, Supplier, Supply, Target
from flashd.tasks import end, tell_defect

log = logging.getLogger(__name__)

_AT_ONCE_S = 1.0  # engines answer within milliseconds, unless they are carrying out an order


class Restore:
    """Takes over arenas and engines of the previous daemon, and keeps ours for the next one."""

    def __init__(self, store: FdStore, engines: EngineKeeper, left: Sequence[InheritedProcess]) -> None:
        self.arenas = ArenaKeeper(store)
        self.engines = engines
        self._store = store
        self._left = left
        self._taking_over: asyncio.Task[None] | None = None
        taken = [number for kept in left if isinstance(number := kept.content.get("number"), int)]
        self.numbers = itertools.count(1 + max(taken, default=0))  # keeper of the engines that we make

    async def take_over_memory(self, catalog: Catalog, residency: Residency) -> None:
        """Takes over the models that were in memory, without reading them from the disk."""
        for arena in self.arenas.left():
            try:
                image = catalog.images.get(arena.checkpoint_id)
                checkpoint = image or catalog.checkpoint(arena.checkpoint_id)
                if checkpoint.id != arena.checkpoint_id:
                    raise InvalidArgument(f"{arena.checkpoint_id} is not the id of a checkpoint")
            except FlashdError as error:
                log.info("%s is not taken over: %s", arena.name, error.message)
                os.close(arena.fd)
                self.arenas.let_go(arena)
                continue
            try:
                await residency.adopt(arena.device, checkpoint, arena.fd)
                self.arenas.took_over(arena)
            except (FlashdError, OSError) as error:
                log.warning("%s is not taken over: %s", arena.name, error)
                self.arenas.let_go(arena)
        await self._store.settled()  # no pool counts it, so nothing may be loaded before it is free

    async def take_over_engines(
        self,
        catalog: Catalog,
        factories: Mapping[str, EngineFactory],
        swapper: Swapper,
        supplier: Supplier,
        active: Path | None,
        beside: Collection[Path],
    ) -> None:
        """Takes over the engines. Returns when all are known, except those that are carrying out an order, for which
        swaps wait.

        `active` is the engine's socket that the endpoint leads to, if it leads to one; `beside` are those of engines
        that serve besides.
        """
        if not self._left:
            await supplier.remove_images(unless=lambda maker: False)
            return

        async def recall(engine: Engine, record: BindingRecord) -> tuple[Target, Supply | None]:
            held = record.model
            model = catalog.get(held.name)
            if model is None or (model.private and held.private_to != model.owner_uid):
                raise NotFound(f"{held.name} was removed or became private")
            checkpoint = catalog.checkpoint(held.checkpoint_id)
            target = Target(held.name, held.served_names, checkpoint, engine.kind, held.private_to, held.options)
            is_parked = engine.state is EngineState.PARKED
            return target, None if is_parked else await supplier.resume(target, record.arena_ids, Recipient.of(engine))

        for kept in self._left:
            if kept.content.get("kind") not in factories:
                log.warning("%s is not taken over: it is of another version of flashd", kept.name)
                self.engines.forget(kept.name)
                kept.close()
        engines = [engine for factory in factories.values() for engine in factory.rejoin(self._left)]
        taking_over = swapper.take_over(engines, recall, active, beside)
        self._taking_over = asyncio.create_task(taking_over, name="take over engines")
        self._taking_over.add_done_callback(tell_defect)
        await asyncio.wait({self._taking_over}, timeout=_AT_ONCE_S)

    async def close(self) -> bool:
        """Leaves engines that are not known yet. Returns True if there are any."""
        if self._taking_over is None:
            return bool(self._left)  # we end before we have taken them over
        if self._taking_over.done():
            return False
        await end(self._taking_over)
        return True
