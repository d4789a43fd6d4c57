# SPDX-License-Identifier: Apache-2.0
"""Targets of swaps and loads: checkpoint, kind of engine, options and audience."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from flashd.config.settings import ModelConfig
from flashd.daemon.changing_models import Changes
from flashd.daemon.events import Events
from flashd.daemon.lifecycle.settings import Settings
from flashd.engines import llama_factory
from flashd.engines.engine import EngineOptions
from flashd.engines.kv_cache import AUTO
from flashd.errors import NotFound
from flashd.store.catalog import Catalog, Model
from flashd.swap.weights import Target
from flashd.tasks import Background

LISTED = "flash list shows the models there are"


class Targets:
    """Makes targets from the current catalog and configuration."""

    def __init__(self, catalog: Catalog, settings: Settings, changes: Changes, default_kind: Callable[[], str]) -> None:
        self._catalog = catalog
        self._settings = settings
        self._changes = changes
        self._default_kind = default_kind

    def of(self, model: Model, engine_kind: str = "") -> Target:
        """Returns the target of a model. `engine_kind` overrides the configured one."""
        names = (model.name, *model.aliases)
        chosen = self._settings.current.model(*names)
        return Target(
            model.name,
            names,
            self._catalog.checkpoint(model.checkpoint_id),
            engine_kind or self.kind_of(model),
            model.owner_uid if model.private else None,
            EngineOptions(chosen.arguments, _kv_cache_bytes(chosen)),
        )

    def kind_of(self, model: Model) -> str:
        """The kind of engine that is configured for a model. GGUF models have no choice."""
        if model.is_gguf:
            return llama_factory.KIND
        chosen = self._settings.current.model(model.name, *model.aliases)
        return self._default_kind() if chosen.engine == "default" else chosen.engine

    async def renewed(self, target: Target, seen_by: Sequence[Callable[[Model], bool]]) -> Target:
        """Updates a target to the model's current version, if one of the requesters still sees it. Raises NotFound."""
        await self._changes.settled(target.model_name)
        model = self._catalog.get(target.model_name)
        if model is None or not any(sees(model) for sees in seen_by):
            raise NotFound(f"the model {target.model_name!r} was removed", hint=LISTED)
        return self.of(model, target.engine_kind)


def _kv_cache_bytes(chosen: ModelConfig) -> int | None:
    if chosen.kv_cache_bytes == "auto":
        return AUTO
    return None if chosen.kv_cache_bytes == "default" else chosen.kv_cache_bytes


class Uses:
    """Records the time of last use, and the number of uses, of models, in the background."""

    def __init__(self, catalog: Catalog, background: Background, events: Events) -> None:
        self._catalog = catalog
        self._background = background
        self._events = events

    def note(self, name: str, *, swapped: bool = False) -> None:
        async def note() -> None:
            await asyncio.to_thread(self._catalog.touch, name, swapped=swapped)
            self._events.model_changed(name)

        self._background.start(note())
