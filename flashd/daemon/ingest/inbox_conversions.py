# SPDX-License-Identifier: Apache-2.0
"""Converts the sources in the inbox, each once, and lists those that are not models.

A model that was removed while its source stays in the inbox does not come back until the source changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from dbus_next import Variant

from flashd.daemon.events import Events
from flashd.daemon.ingest.conversions import Conversions, Request
from flashd.daemon.job import Job, JobState, Owner, Result
from flashd.daemon.jobs import Jobs
from flashd.dbus import wire
from flashd.dbus.object_tree import Audience
from flashd.errors import BaseMissing, InvalidSource, NotFound
from flashd.store.catalog import Catalog, Model, Origin
from flashd.store.inbox import Item
from flashd.store.known_sources import KnownSources
from flashd.tasks import Background

_MOST_SHOWN = 200  # more entries than a person would read
_FEW = 50
_MANY_EVERY_S = 1.0


class InboxConversions:
    """The handler of the inbox. A failed source is not tried again until it changes. Only the `audience` may see it.

    `is_there` tells whether a source is in the inbox, from the last scan, without asking a file system.
    """

    def __init__(
        self,
        catalog: Catalog,
        jobs: Jobs,
        conversions: Conversions,
        removed_sources: KnownSources,
        background: Background,
        events: Events,
        *,
        owner: Owner,
        private: bool,
        audience: Audience,
        is_there: Callable[[Path], bool],
    ) -> None:
        self._catalog = catalog
        self._jobs = jobs
        self._conversions = conversions
        self._removed_sources = removed_sources
        self._owner = owner
        self._private = private
        self.audience = audience
        self._is_there = is_there
        self._events = events
        self._telling: asyncio.TimerHandle | None = None
        self._waiting: Sequence[Item] = ()
        self._under_way: dict[str, Job] = {}
        self._failed: dict[str, str] = {}
        self._without_base: dict[str, tuple[Item, BaseMissing]] = {}  # adapters, and the base for which each is waiting
        events.job_ended.subscribe(self._ended)
        events.model_removed.subscribe(self._remember_removal)
        events.model_published.subscribe(lambda model: background.start(self._look_for_bases()))
        events.model_changed.subscribe(lambda name: background.start(self._look_for_bases()))

    def shown(self) -> list[list[str]]:
        """Returns (name, state, detail) of sources that are not models, by name; of very many only the first."""
        used = {item.name: item for item in self._waiting if item.is_used}
        names = set(used).union(self._failed, self._without_base, self._under_way)
        nameless = [(item.name, item) for item in self._waiting if not item.is_used]
        all_shown = sorted([*((name, used.get(name)) for name in names), *nameless], key=lambda shown: shown[0])
        rows = [self._row(name, item) for name, item in all_shown[:_MOST_SHOWN]]
        if more := len(all_shown) - len(rows):
            rows.append([f"{more} more", "incomplete", f"only the first {_MOST_SHOWN} are listed; see the log for all"])
        return rows

    @property
    def has_any(self) -> bool:
        """True if something in the inbox is not a model yet."""
        return bool(self._waiting or self._failed or self._without_base or self._under_way)

    def check_absence(self, name: str) -> None:
        """Raises NotFound with the state of a source of this name that is not a model yet, or failed to become one."""
        waiting = next((item for item in self._waiting if item.name == name), None)
        _, state, detail = self._row(name, waiting)
        if state:
            said, _, hint = detail.partition("\n")
            why = f": {said}" if said else ""
            wait = "" if state in {"failed", "unused"} else "wait until flash list shows it as a model"
            raise NotFound(f"{name!r} is not a model yet, it is {state}{why}", hint=hint or wait)

    def _remember_removal(self, model: Model) -> None:
        """Ignores the source of a removed model. If the source was removed too, a new one may make the model again."""
        if model.origin.kind == "inbox" and self._is_there(Path(model.origin.location)):
            self._removed_sources.add(model.origin.location, model.origin.fingerprint)

    def is_known(self, item: Item) -> bool:
        if self._removed_sources.holds(str(item.path), item.fingerprint):
            return True
        model = self._catalog.get(item.name)
        return model is not None and model.origin.kind == "inbox" and model.origin.fingerprint == item.fingerprint

    async def settled(self, item: Item) -> None:
        """Begins the conversion of a source, after cancelling one of an earlier state of the same source."""
        await self._drop(item.name)
        self._forget(item.name)
        origin = Origin("inbox", str(item.path), item.fingerprint)
        private = True if self._private else None  # a new version of a private model stays private
        request = Request(item.open, item.name, origin, self._owner.uid, private)

        async def work(job: Job) -> Result:
            try:
                model = await self._conversions.run(job, request)
            except BaseMissing as error:
                self._without_base[item.name] = item, error
                raise
            return {"model": Variant("o", wire.model_path(model.name))}

        self._under_way[item.name] = self._jobs.run("import", item.name, self._owner, work, audience=self.audience)
        self._changed()

    async def removed(self, item: Item) -> None:
        self._removed_sources.drop(str(item.path))
        await self._drop(item.name)
        self._forget(item.name)
        self._changed()
        model = self._catalog.get(item.name)
        if model is not None and model.origin.kind == "inbox":
            self._events.source_removed(item.name)

    def displaced(self, item: Item) -> None:
        if item.is_used:
            self._forget(item.name)
            self._changed()

    def waiting(self, items: Sequence[Item]) -> None:
        self._waiting = items
        self._changed()

    def _ended(self, job: Job) -> None:
        if self._under_way.get(job.subject) is job:
            del self._under_way[job.subject]
            if job.state is not JobState.DONE and job.subject not in self._without_base:
                self._failed[job.subject] = str(job.error)
            self._changed()

    async def _look_for_bases(self) -> None:
        """Retries adapters that are waiting for a base, after a new model or a new name."""
        for name, (item, missing) in list(self._without_base.items()):
            try:
                self._catalog.find_base(missing.recorded, of=name, owner_uid=self._owner.uid)
            except BaseMissing:
                continue
            except InvalidSource:
                pass  # there are several now, which the conversion reports
            if name in self._without_base:  # unless it was handled meanwhile
                await self.settled(item)

    def close(self) -> None:
        """Ends announcements."""
        if self._telling is not None:
            self._telling.cancel()

    def _row(self, name: str, waiting: Item | None) -> list[str]:
        if waiting is not None and not waiting.is_used:
            return [name, str(waiting.state), waiting.detail]
        if name in self._under_way:
            return [name, "converting", ""]
        if name in self._without_base:
            return [name, "incomplete", str(self._without_base[name][1])]
        if name in self._failed:
            return [name, "failed", self._failed[name]]
        return [name, str(waiting.state), waiting.detail] if waiting else [name, "", ""]

    def _changed(self) -> None:
        """Announces changes, of many items with a delay, because each announcement contains the whole list."""
        if self._telling is not None:
            return
        if len(self._waiting) + len(self._failed) + len(self._under_way) <= _FEW:
            self._events.inbox_changed(self.has_any)
        else:
            self._telling = asyncio.get_running_loop().call_later(_MANY_EVERY_S, self._tell)

    def _tell(self) -> None:
        self._telling = None
        self._events.inbox_changed(self.has_any)

    def _forget(self, name: str) -> None:
        self._failed.pop(name, None)
        self._without_base.pop(name, None)

    async def _drop(self, name: str) -> None:
        job = self._under_way.get(name)
        if job is not None:
            job.cancel()
            await job.wait()
