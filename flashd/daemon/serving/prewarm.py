# SPDX-License-Identifier: Apache-2.0
"""Begins the swap and the loads configured for the daemon's start."""

from __future__ import annotations

from flashd.daemon.job import Owner
from flashd.daemon.lifecycle.settings import Settings
from flashd.daemon.serving.loads import Loads
from flashd.daemon.serving.swaps import Swaps
from flashd.store.catalog import Catalog
from flashd.tasks import logged


def prewarm(settings: Settings, catalog: Catalog, swaps: Swaps, loads: Loads, ourselves: Owner) -> None:
    """Begins the swap to `engines.prewarm`, unless a model is already active, and the loads of `memory.prewarm`."""
    config = settings.current
    if (first := config.engines.prewarm) and not swaps.has_active:
        with logged(f"engines.prewarm: {first}"):
            swaps.swap(catalog.resolve(first), ourselves)
    for name in config.memory.prewarm:
        with logged(f"memory.prewarm: {name}"):
            model = catalog.resolve(name)
            # Models already in memory were in use, so models that are only expected to be used must not evict them.
            loads.load(model, ourselves, config.memory.prewarm_tier, may_evict=False)
