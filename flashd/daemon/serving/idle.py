# SPDX-License-Identifier: Apache-2.0
"""Policy for idle models: how long they stay active, and whether their weights then leave memory too."""

from __future__ import annotations

from flashd.daemon.events import Events
from flashd.daemon.job import Owner
from flashd.daemon.lifecycle.settings import Settings
from flashd.daemon.serving.swaps import Swaps
from flashd.store.catalog import Catalog
from flashd.swap.weights import Target


class Idle:
    """Parks the active model after the configured idle time."""

    def __init__(self, settings: Settings, catalog: Catalog, swaps: Swaps, ourselves: Owner, events: Events) -> None:
        self._settings = settings
        self._catalog = catalog
        self._swaps = swaps
        self._ourselves = ourselves
        events.engine_idle.subscribe(self._rest)

    def _rest(self, target: Target) -> None:
        evicts = self._settings.current.engines.on_idle == "evict"
        is_evicted = evicts and not self._catalog.is_pinned(target.checkpoint.id)
        self._swaps.rest(target, self._ourselves, evict=is_evicted)


def idle_timeout_s(settings: Settings, target: Target) -> float:
    """Returns the idle time in seconds after which a model is parked; 0 for never."""
    chosen = settings.current.model(*target.names).idle_timeout_s
    return settings.current.engines.idle_timeout_s if chosen == "default" else chosen
