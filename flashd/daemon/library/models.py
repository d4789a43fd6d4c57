# SPDX-License-Identifier: Apache-2.0
"""Changes of models in the store: pins, names, privacy, removal, and deletion of unused checkpoints."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence

from flashd.daemon.changing_models import Changes
from flashd.daemon.events import Events
from flashd.daemon.lifecycle.ending import Ending
from flashd.daemon.lifecycle.settings import Settings
from flashd.errors import Busy, TransferFailed
from flashd.memory.residency import Residency
from flashd.store.catalog import Catalog, Collected, Model
from flashd.store.names import check_name
from flashd.tasks import Background

log = logging.getLogger(__name__)


class Models:
    """Operations on models, called by their bus objects. They write to the disk in threads."""

    def __init__(
        self,
        catalog: Catalog,
        residency: Residency,
        background: Background,
        changes: Changes,
        settings: Settings,
        ending: Ending,
        events: Events,
        *,
        is_wanted: Callable[[str], bool],
        serving_checkpoints: Callable[[], Collection[str]],
        end_preparing: Callable[[str], Awaitable[None]],
    ) -> None:
        """`is_wanted` tells whether a model serves or is about to; `end_preparing` returns when no engine holds a
        model to make it ready. `serving_checkpoints` returns the ids of those that engines serve, which may be older
        versions, and not in our memory if the engine has copied them.
        """
        self._catalog = catalog
        self._residency = residency
        self._background = background
        self._changes = changes
        self._settings = settings
        self._ending = ending
        self._events = events
        self._is_wanted = is_wanted
        self._serving_checkpoints = serving_checkpoints
        self._served: frozenset[str] = frozenset()  # checkpoints that served at the last change of an engine
        self._end_preparing = end_preparing
        events.model_published.subscribe(lambda model: self.collect_soon())
        events.source_removed.subscribe(self._source_removed)
        events.checkpoint_changed.subscribe(self._checkpoint_changed)
        events.engines_changed.subscribe(self._engines_changed)

    async def set_pinned(self, name: str, pinned: bool) -> None:
        with _told(self._events.model_changed, name):
            await asyncio.to_thread(self._catalog.set_pinned, name, pinned)

    async def set_aliases(self, name: str, aliases: Sequence[str]) -> None:
        """Replaces the aliases. Raises Busy if an active model would lose one, because its engine answers to all."""
        with self._changes.of(name):
            model = self._catalog.get(name)
            if model is not None and not set(model.aliases) <= set(map(check_name, aliases)):
                self._check_unwanted(name)
            with _told(self._events.model_changed, name):
                await asyncio.to_thread(self._catalog.set_aliases, name, aliases)

    async def set_private(self, name: str, private: bool) -> None:
        """Makes a model private or public, and ends the leases of users who may no longer see it.

        Raises Busy while it is active or about to be, because its engine's access was set when it took the model.
        """
        with self._changes.of(name):
            self._check_unwanted(name)
            await self._end_preparing(name)
            self._check_unwanted(name)  # the turn of an earlier swap may have come meanwhile
            with _told(self._events.audience_changed, name):
                await asyncio.to_thread(self._catalog.set_private, name, private)

    def _check_unwanted(self, name: str) -> None:
        if self._is_wanted(name):
            raise Busy(f"{name} serves, or is about to", hint=f"park it first: flash park {name}")

    async def evict(self, model: Model) -> None:
        """Removes a model from memory. Raises Busy while it is leased, active or pinned."""
        if self._catalog.is_pinned(model.checkpoint_id):
            raise Busy(f"{model.name} is pinned", hint=f"first unpin it: flash unpin {model.name}")
        await self._residency.evict(*self._catalog.forms(model.checkpoint_id))

    async def remove(self, name: str) -> None:
        """Removes a model from the store. Raises Busy while it is active or a swap to it is running."""
        with self._changes.of(name):
            self._check_unwanted(name)
            model = self._catalog.get(name)
            try:
                await asyncio.to_thread(self._catalog.remove, name)
            finally:
                if model is not None and self._catalog.get(name) is None:  # even if the disk did not confirm it
                    self._events.model_removed(model)
                    self.collect_soon()

    async def collect(self) -> Collected:
        """Deletes unused checkpoints from disk and memory. Raises TransferFailed after doing everything possible."""
        in_use = {*map(self._catalog.checkpoint_of, self._residency.in_use()), *self._serving_checkpoints()}
        collected = await asyncio.to_thread(self._catalog.collect, in_use)
        for checkpoint_id in collected.checkpoint_ids:
            with contextlib.suppress(Busy):
                await self._residency.evict(checkpoint_id)
        if collected.checkpoint_ids:
            log.info("%d checkpoints deleted, %d bytes", len(collected.checkpoint_ids), collected.freed_bytes)
        if collected.failure is not None:
            raise collected.failure
        return collected

    def collect_soon(self) -> None:
        async def collect() -> None:
            await self.collect()

        self._background.start(collect())

    def _source_removed(self, name: str) -> None:
        if self._settings.current.inbox.on_remove == "remove":
            self._background.start(self.remove(name))

    def _engines_changed(self) -> None:
        before, self._served = self._served, frozenset(self._serving_checkpoints())
        for checkpoint_id in before - self._served:
            self._checkpoint_changed(checkpoint_id)

    def _checkpoint_changed(self, form: str) -> None:
        """Deletes a checkpoint that is neither held nor served any longer, and that no model points to."""
        checkpoint_id = self._catalog.checkpoint_of(form)
        is_served = checkpoint_id in self._serving_checkpoints()
        if self._ending.is_asked or is_served or self._residency.holds(checkpoint_id):
            return
        if not any(model.checkpoint_id == checkpoint_id for model in self._catalog.models()):
            self.collect_soon()


@contextlib.contextmanager
def _told(tell: Callable[[str], None], name: str) -> Iterator[None]:
    """Announces a change of a model, even if the disk did not confirm it."""
    try:
        yield
    except TransferFailed:
        tell(name)
        raise
    tell(name)
