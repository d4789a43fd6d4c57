# SPDX-License-Identifier: Apache-2.0
"""What outlived the daemon before us? Warm models, and engines that serve or are parked: all of it is ours again."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from flashd.daemon.service_manager import ArenaKeeper, EngineKeeper, FdStore
from flashd.daemon.threads import end, tell_defect
from flashd.engines.engine import Engine, EngineFactory, EngineState, Holding
from flashd.engines.kept import Kept
from flashd.errors import FlashdError, InvalidArgument
from flashd.memory.residency import Residency
from flashd.store.catalog import Catalog
from flashd.supply import Supplier, Supply, Target
from flashd.swap import Swapper

log = logging.getLogger(__name__)

_AT_ONCE_S = 1.0  # engines answer within milliseconds, unless they are in the middle of an order


class Survivors:
    """Takes over what is there, and sees to it that what we make outlives us too."""

    def __init__(self, store: FdStore, engines: EngineKeeper, left: Sequence[Kept]) -> None:
        self.arenas = ArenaKeeper(store)
        self.engines = engines
        self._store = store
        self._left = left
        self._taking_over: asyncio.Task[None] | None = None
        taken = [number for kept in left if isinstance(number := kept.content.get("number"), int)]
        self.numbers = itertools.count(1 + max(taken, default=0))  # of engines that we make

    async def take_over_memory(self, catalog: Catalog, residency: Residency) -> None:
        """What was warm is warm again, without a byte read from the disk."""
        for arena in self.arenas.left():
            try:
                image = catalog.images.get(arena.checkpoint_id)
                checkpoint = image or catalog.checkpoint(arena.checkpoint_id)
                if checkpoint.id != arena.checkpoint_id:
                    raise InvalidArgument(f"{arena.checkpoint_id} is not the name of a checkpoint")
            except FlashdError as error:
                log.info("%s is let go of: %s", arena.name, error.message)
                os.close(arena.fd)
                self.arenas.let_go(arena)
                continue
            try:
                await residency.adopt(arena.device, checkpoint, arena.fd)
                self.arenas.took_over(arena)
            except (FlashdError, OSError) as error:
                log.warning("%s is let go of: %s", arena.name, error)
                self.arenas.let_go(arena)
        await self._store.settled()  # the ledger does not count it: nothing may be loaded before it is free

    async def take_over_engines(
        self,
        catalog: Catalog,
        factories: Mapping[str, EngineFactory],
        swapper: Swapper,
        supplier: Supplier,
        active: Path | None,
    ) -> None:
        """Returns when all are known; one in the middle of an order becomes so later, and swaps wait for it.

        `active` is the engine's socket that the endpoint leads to, if it leads to one.
        """
        if not self._left:
            return

        async def recall(engine: Engine, holding: Holding) -> tuple[Target, Supply | None]:
            catalog.resolve(holding.model_name)
            checkpoint = catalog.checkpoint(holding.checkpoint_id)
            target = Target(
                holding.model_name, holding.names, checkpoint, engine.kind, holding.private_to, holding.options
            )
            is_parked = engine.state is EngineState.PARKED
            return target, None if is_parked else await supplier.resume(target, holding.forms)

        for kept in self._left:
            if kept.content.get("kind") not in factories:
                log.warning("%s is let go of: it is of another flashd", kept.name)
                self.engines.forget(kept.name)
                kept.close()
        engines = [engine for factory in factories.values() for engine in factory.rejoin(self._left)]
        self._taking_over = asyncio.create_task(swapper.take_over(engines, recall, active), name="take over engines")
        self._taking_over.add_done_callback(tell_defect)
        await asyncio.wait({self._taking_over}, timeout=_AT_ONCE_S)

    async def close(self) -> bool:
        """What is not known yet is left as it is. True if there is any such engine."""
        if self._taking_over is None:
            return bool(self._left)  # we end before we have looked at them
        if self._taking_over.done():
            return False
        await end(self._taking_over)
        return True
