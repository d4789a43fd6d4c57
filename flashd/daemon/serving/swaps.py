# SPDX-License-Identifier: Apache-2.0
"""Swaps, serves and parks: the line they wait in, and the model that rests until a question wakes it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dbus_next import Variant

from flashd.daemon.access.ownership import Ownership
from flashd.daemon.changing_models import Changes
from flashd.daemon.events import Events
from flashd.daemon.job import Job, JobState, Owner, Result, Work
from flashd.daemon.jobs import Jobs
from flashd.daemon.serving.targets import LISTED, Targets, Uses
from flashd.dbus import wire
from flashd.errors import Busy, FlashdError, NotFound, Unavailable
from flashd.memory.residency import Residency
from flashd.store.catalog import Catalog, Model
from flashd.swap.swapper import Swapper, SwapState
from flashd.swap.weights import Target

log = logging.getLogger(__name__)

# An engine that dies so soon after it was brought back is not brought back again, because the model must be the reason.
_BRING_BACK_AGAIN_S = 300.0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The target of a swap or serve in the line, and whether each of those who asked for it sees the model."""

    kind: str
    target: Target
    seen_by: list[Callable[[Model], bool]]


class Swaps:
    """Swaps, serves and parks as jobs, one at a time."""

    def __init__(
        self,
        catalog: Catalog,
        residency: Residency,
        swapper: Swapper,
        targets: Targets,
        jobs: Jobs,
        ownership: Ownership,
        changes: Changes,
        uses: Uses,
        events: Events,
        *,
        endpoint: Path,
        ourselves: Owner,
    ) -> None:
        """`ourselves` is the owner of jobs that no caller has asked for."""
        self._catalog = catalog
        self._residency = residency
        self._swapper = swapper
        self._targets = targets
        self._jobs = jobs
        self._ownership = ownership
        self._changes = changes
        self._uses = uses
        self._events = events
        self._endpoint = endpoint
        self._ourselves = ourselves
        self._resting: Target | None = None  # the last active model, if it was parked because it was idle
        self._line: list[Job] = []  # unfinished swaps and parks, in the order of the calls
        self._wanted: dict[Job, _Wanted] = {}  # the targets of the swaps among them
        self._brought_back: dict[str, float] = {}
        events.job_ended.subscribe(self._ended)
        events.engines_changed.subscribe(self._progressed)
        events.engine_lost.subscribe(self._bring_back)
        events.audience_changed.subscribe(self._audience_changed)
        events.model_published.subscribe(lambda model: self._audience_changed(model.name))
        events.model_removed.subscribe(lambda model: self._audience_changed(model.name))

    @property
    def has_active(self) -> bool:
        return self._swapper.slots.active is not None

    def is_wanted(self, name: str) -> bool:
        """Tells whether a model serves, or a swap to it waits or is under way."""
        return self._swapper.slots.of(name) is not None or any(job.subject == name for job in self._line)

    def swap(
        self, model: Model, owner: Owner, engine_kind: str = "", *, sees: Callable[[Model], bool] = lambda model: True
    ) -> Job:
        """Makes a model the active one.

        Joins the last swap asked for, if that one is to the same and has neither ended nor been cancelled. Whether the
        asker `sees` the model is looked at again when its turn has come.

        A model that serves stays in whatever engine it is in, unless one of another kind is asked for.
        """
        return self._bring("swap", model, owner, engine_kind, sees)

    def serve(
        self, model: Model, owner: Owner, engine_kind: str = "", *, sees: Callable[[Model], bool] = lambda model: True
    ) -> Job:
        """Has a model serve beside those that serve already; else as `swap`."""
        return self._bring("serve", model, owner, engine_kind, sees)

    async def displaced_by(self, model: Model, engine_kind: str = "") -> list[Target]:
        """The models that would cease to serve if this one came to serve now."""
        return await self._swapper.displaced_by(self._target(model, engine_kind))

    def _target(self, model: Model, engine_kind: str) -> Target:
        serving = self._swapper.slots.of(model.name)
        if not engine_kind and serving is not None:
            engine_kind = serving.target.engine_kind
        return self._targets.of(model, engine_kind)

    def _bring(self, kind: str, model: Model, owner: Owner, engine_kind: str, sees: Callable[[Model], bool]) -> Job:
        target = self._target(model, engine_kind)
        last = self._line[-1] if self._line else None
        same = self._wanted.get(last) if last and not last.is_cancelled else None
        if last and same and same.kind == kind and same.target.is_same(target):
            if not last.has_asked(owner.peer):
                same.seen_by.append(sees)
            last.join(owner)
            return last
        wanted = _Wanted(kind, target, [sees])

        async def renew(target: Target) -> Target:
            return await self._targets.renewed(target, wanted.seen_by)

        async def work(job: Job) -> Result:
            def rests() -> bool:  # then it is the active one wherever it serves again
                return self.resting is not None and self.resting.model_name == model.name

            if kind == "swap":
                outcome = await self._swapper.swap(target, job.report_bytes, renew=renew)
            else:
                outcome = await self._swapper.serve(target, job.report_bytes, renew=renew, becomes_active=rests)
            _begin(job)
            self._park_if_private(model.name, Owner("", owner.uid))  # a new version may have become so meanwhile
            self._uses.note(model.name, swapped=True)
            slot = self._swapper.slots.of(outcome.model_name)
            is_active = slot is None or slot is self._swapper.slots.active
            endpoint = self._endpoint if slot is None or is_active else slot.engine.socket_path
            return {
                "model": Variant("o", wire.model_path(outcome.model_name)),
                "engine": Variant("o", wire.engine_path(outcome.engine_number)),
                "endpoint": Variant("s", str(endpoint)),
                "how": Variant("s", outcome.how.value),
                "from_tier": Variant("s", outcome.from_tier.value),
                "seconds": Variant("d", outcome.seconds),
                "phases": Variant("a{sd}", dict(outcome.phases)),
            }

        self._events.model_asked(model.name)
        job = self._enqueue(kind, model.name, owner, work)
        self._wanted[job] = wanted
        return job

    def park(self, owner: Owner, model: Model | None = None) -> Job:
        """Parks a model that serves, or the active one. The job fails with NotFound if there is none."""

        async def work(job: Job) -> Result:
            was_active = await self._swapper.park(name=model.name if model is not None else "")
            _begin(job)
            if was_active:
                self._resting = None
            return {}

        if model is not None:
            return self._enqueue("park", model.name, owner, work)
        active = self._swapper.slots.active
        # A user who cannot see the private active model may park it, but is not told which it is.
        is_named = active is not None and active.target.private_to in {None, owner.uid}
        return self._enqueue("park", active.target.model_name if active and is_named else "", owner, work)

    def rest(self, target: Target, owner: Owner, *, evict: bool) -> Job:
        """Parks a model, if it still serves; the active one until somebody asks it. `evict` its weights meanwhile."""

        async def work(job: Job) -> Result:
            # No user can open a private model's socket, so no request can wake it.
            slot = self._swapper.slots.of(target.model_name)
            if slot is not None and (await slot.engine.stats()).active_requests:
                return {}  # it was asked meanwhile
            rests = functools.partial(self._let_rest, target) if self._ownership.is_public(target) else None
            await self._swapper.park(target, move_endpoint=rests)
            _begin(job)
            if evict:
                with contextlib.suppress(Busy):  # it is leased
                    await self._residency.evict(*self._catalog.forms(target.checkpoint.id))
            return {}

        return self._enqueue("park", target.model_name, owner, work)

    def resume_rest(self, name: str, engine_kind: str) -> None:
        """Lets a model rest that rested under an earlier daemon, unless it is removed or private now."""
        model = self._catalog.get(name)
        try:
            if model is None or model.private:
                raise NotFound(f"the model {name!r} was removed", hint=LISTED)
            self._let_rest(self._targets.of(model, engine_kind))
        except FlashdError as error:
            log.info("%s no longer rests: %s", name, error.message)
            self._events.rest_ended()

    def let_rest(self, target: Target) -> bool:
        """Has the active model rest, since its engine was needed for another. False if it is private: only its owner
        may ask for it, by a swap."""
        if self._ownership.is_public(target):
            self._let_rest(target)
            return True
        return False

    def _let_rest(self, target: Target) -> None:
        """Makes requests wake the model from now on, so that at every moment requests are answered."""
        self._resting = target
        self._events.rest_began(target)

    @property
    def resting(self) -> Target | None:
        """The model that a request to the endpoint would wake; never a private one."""
        return self._resting if self._swapper.slots.active is None else None

    @property
    def is_resting(self) -> bool:
        return self.resting is not None

    async def woken(self, *, is_question: bool = True) -> Path:
        """Returns the socket of the active model, after waking it if it rests and this is a question.

        Raises the errors of a swap, or NotFound if no model is active or resting. A private model is never used here,
        because the user of the request is unknown.
        """
        await self._soon_answering()
        resting = self._resting
        if self._swapper.slots.active is None and resting is not None:
            if not is_question:
                raise Unavailable("the model is parked", hint="a POST request wakes it")
            await self._changes.settled(resting.model_name)
            model = self._catalog.get(resting.model_name)
            if model is not None and not model.private:
                job = self.swap(model, self._ourselves, resting.engine_kind, sees=lambda model: not model.private)
                await job.wait()
                if job.error is not None:
                    raise job.error
        active = self._swapper.slots.active
        if active is None or not self._ownership.is_public(active.target):
            raise NotFound("no model is active", hint="swap to a model first: flash swap MODEL")
        return active.engine.socket_path

    async def _soon_answering(self) -> None:
        """Waits for the end of a running swap while no model answers."""
        while (active := self._swapper.slots.active) is None or not active.answers:
            if self._swapper.state is SwapState.IDLE or not self._line:
                return
            await self._line[0].wait()
            await asyncio.sleep(0)  # until `ended` has removed it from the queue

    def _audience_changed(self, name: str) -> None:
        """Handles that a model became private or public, or was removed.

        If it was resting, requests no longer wake it. If it is active and became private by a new version, it is
        parked, because its engine is open to all users.
        """
        model = self._catalog.get(name)
        if self._resting is not None and self._resting.model_name == name and (model is None or model.private):
            self._resting = None
            if self._swapper.slots.active is None:
                self._events.rest_ended()
        self._park_if_private(name, self._ourselves)

    def _park_if_private(self, name: str, owner: Owner) -> None:
        """Parks a model if it became private since its engine was given it, for that engine is everybody's."""
        slot, model = self._swapper.slots.of(name), self._catalog.get(name)
        if slot is None or model is None or not model.private:
            return
        if (target := slot.target).private_to != model.owner_uid:

            async def work(job: Job) -> Result:
                with contextlib.suppress(NotFound):  # a swap came first
                    await self._swapper.park(target)
                _begin(job)
                return {}

            self._enqueue("park", target.model_name, owner, work)

    def _ended(self, job: Job) -> None:
        if job in self._line:
            self._line.remove(job)
            self._wanted.pop(job, None)

    def _progressed(self) -> None:
        """Reports progress to the first job in the queue, whose turn it is."""
        state = self._swapper.state
        if self.has_active and state is SwapState.IDLE:
            self._resting = None
        if self._line and state is not SwapState.IDLE:
            _begin(self._line[0])
            self._line[0].report(state.value.replace("_", " "))

    def _bring_back(self, target: Target, was_active: bool) -> None:
        """A model whose engine ended unasked is brought back in another one, once."""
        name, now = target.model_name, time.monotonic()
        if now - self._brought_back.get(name, -_BRING_BACK_AGAIN_S) < _BRING_BACK_AGAIN_S:
            log.error("%s is not brought back: its engine died twice in a short time", name)
            return
        self._brought_back[name] = now
        if (model := self._catalog.get(name)) is not None:
            (self.swap if was_active else self.serve)(model, self._ourselves, target.engine_kind)

    def _enqueue(self, kind: str, subject: str, owner: Owner, work: Work) -> Job:
        job = self._jobs.create(kind, subject, owner, audience=self._ownership.audience_of(subject))
        self._line.append(job)
        job.start(work)
        return job


def _begin(job: Job) -> None:
    if job.state is JobState.QUEUED:
        job.begin()
