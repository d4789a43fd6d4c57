# SPDX-License-Identifier: Apache-2.0
"""Which adapters vLLM applies to a model, by `engines.vllm.adapters` and what each adapter says of its base."""

from __future__ import annotations

import logging

from flashd.checkpoint.lora.applied import AppliedAdapter
from flashd.daemon.events import Events
from flashd.daemon.lifecycle.settings import Settings
from flashd.errors import EngineFailed
from flashd.store.catalog import Catalog, Model
from flashd.tasks import Background, Stop, in_thread

log = logging.getLogger(__name__)


class Adapters:
    """The adapters, as they were when the daemon started; engines read them again."""

    def __init__(self, settings: Settings, catalog: Catalog, background: Background, events: Events) -> None:
        self._listed = settings.current.engines.vllm.adapters
        self._catalog = catalog
        self._background = background
        self._events = events
        self._known: list[AppliedAdapter] = []
        events.model_published.subscribe(lambda model: self._tell())  # it may be meant in place of another
        events.model_removed.subscribe(lambda model: self._tell())

    def start(self) -> None:
        """Begins to read them, which takes as long as their file system does."""
        if self._listed:
            self._background.start(self._read())

    def of(self, model: Model) -> list[str]:
        """The names of a model's adapters."""
        return [adapter.name for adapter in self._known if _names(adapter, model) and self._is_base(model, adapter)]

    def _is_base(self, model: Model, adapter: AppliedAdapter) -> bool:
        """Tells whether an adapter means this model of all that are called so: one with exactly the recorded name, or
        else the only one. An ambiguous adapter has no base.
        """
        meant = [other for other in self._catalog.models() if _names(adapter, other)]
        meant = [other for other in meant if adapter.base in {other.name, *other.aliases}] or meant
        return [other.name for other in meant] == [model.name]

    async def _read(self) -> None:
        self._known = await in_thread(self._found)
        self._tell()

    def _tell(self) -> None:
        for model in self._catalog.models() if self._known else ():
            if any(_names(adapter, model) for adapter in self._known):
                self._events.model_changed(model.name)

    def _found(self, _: Stop) -> list[AppliedAdapter]:
        found = []
        for setting in self._listed:
            try:
                found.append(AppliedAdapter.read(setting))
            except EngineFailed as error:
                log.warning("%s", error)
        return found


def _names(adapter: AppliedAdapter, model: Model) -> bool:
    """Tells whether the base that an adapter records may be this model."""
    return adapter.is_of((model.name, *model.aliases))
