# SPDX-License-Identifier: Apache-2.0
"""What becomes of sources dropped into the inbox? Each is converted once, and shown until it is a model.

A model that was removed while its source stays in the inbox does not come back until the source changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dbus_next import Variant

from flashd import wire
from flashd.checkpoint.source import SourceFiles
from flashd.daemon.conversions import Conversions, Request
from flashd.daemon.dismissals import Dismissals
from flashd.daemon.exports import Audience
from flashd.daemon.jobs import Job, Jobs, JobState, Owner, Result
from flashd.errors import BaseMissing, InvalidSource, NotFound
from flashd.store.catalog import Catalog, Model, Origin
from flashd.store.inbox import Item


class Arrivals:
    """The inbox's handler. What failed is not tried again until the source changes. `audience` may know of it."""

    def __init__(
        self,
        catalog: Catalog,
        jobs: Jobs,
        conversions: Conversions,
        dismissals: Dismissals,
        *,
        owner: Owner,
        private: bool,
        audience: Audience,
        on_change: Callable[[], None],
        on_source_removed: Callable[[str], None],
    ) -> None:
        self._catalog = catalog
        self._jobs = jobs
        self._conversions = conversions
        self._dismissals = dismissals
        self._owner = owner
        self._private = private
        self.audience = audience
        self._on_change = on_change
        self._on_source_removed = on_source_removed
        self._waiting: Sequence[Item] = ()
        self._under_way: dict[str, Job] = {}
        self._failed: dict[str, str] = {}
        self._without_base: dict[str, tuple[Item, BaseMissing]] = {}  # adapters, and what each waits for

    def shown(self) -> list[list[str]]:
        """(name, state, detail) of what is not a model yet, by name."""
        rows = {item.name: [item.name, str(item.state), item.detail] for item in self._waiting}
        rows |= {name: [name, "failed", detail] for name, detail in self._failed.items()}
        rows |= {name: [name, "incomplete", str(error)] for name, (_, error) in self._without_base.items()}
        rows |= {name: [name, "converting", ""] for name in self._under_way}
        return [rows[name] for name in sorted(rows)]

    def check_absence(self, name: str) -> None:
        """Raises NotFound if something is on its way to be a model of this name, or could not become one."""
        for found, state, detail in self.shown():
            if found == name:
                said, _, hint = detail.partition("\n")
                why = f": {said}" if said else ""
                wait = "" if state == "failed" else "wait until flash list shows it as one"
                raise NotFound(f"{name!r} is not a model yet, it is {state}{why}", hint=hint or wait)

    def dismiss(self, model: Model) -> None:
        """To be told of removed models; one that went with its source may come back with it."""
        if model.origin.kind == "inbox" and Path(model.origin.location).exists():
            self._dismissals.add(model.origin.location, model.origin.fingerprint)

    def is_known(self, item: Item) -> bool:
        if self._dismissals.holds(str(item.path), item.fingerprint):
            return True
        model = self._catalog.get(item.name)
        return model is not None and model.origin.kind == "inbox" and model.origin.fingerprint == item.fingerprint

    async def settled(self, item: Item) -> None:
        """Begins the conversion; one of an earlier state of the same source is dropped first."""
        await self._drop(item.name)
        self._forget(item.name)
        origin = Origin("inbox", str(item.path), item.fingerprint)
        request = Request(lambda: SourceFiles.from_path(item.path), item.name, origin, self._owner.uid, self._private)

        async def work(job: Job) -> Result:
            try:
                model = await self._conversions.run(job, request)
            except BaseMissing as error:
                self._without_base[item.name] = item, error
                raise
            return {"model": Variant("o", wire.model_path(model.name))}

        self._under_way[item.name] = self._jobs.run("import", item.name, self._owner, work, audience=self.audience)
        self._on_change()

    async def removed(self, item: Item) -> None:
        self._dismissals.drop(str(item.path))
        await self._drop(item.name)
        self._forget(item.name)
        self._on_change()
        model = self._catalog.get(item.name)
        if model is not None and model.origin.kind == "inbox":
            self._on_source_removed(item.name)

    def waiting(self, items: Sequence[Item]) -> None:
        self._waiting = items
        self._on_change()

    def ended(self, job: Job) -> None:
        """To be told of finished jobs."""
        if self._under_way.get(job.subject) is job:
            del self._under_way[job.subject]
            if job.state is not JobState.DONE and job.subject not in self._without_base:
                self._failed[job.subject] = str(job.error)
            self._on_change()

    async def look_for_bases(self) -> None:
        """To be called when there is a new model, or a new name for one: adapters may wait for it."""
        for name, (item, missing) in list(self._without_base.items()):
            try:
                self._catalog.find_base(missing.recorded, of=name, owner_uid=self._owner.uid)
            except BaseMissing:
                continue
            except InvalidSource:
                pass  # now there are several, and the conversion will say which
            if name in self._without_base:  # nobody else has seen to it meanwhile
                await self.settled(item)

    def _forget(self, name: str) -> None:
        self._failed.pop(name, None)
        self._without_base.pop(name, None)

    async def _drop(self, name: str) -> None:
        job = self._under_way.get(name)
        if job is not None:
            job.cancel()
            await job.wait()
