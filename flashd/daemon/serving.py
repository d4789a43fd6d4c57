# SPDX-License-Identifier: Apache-2.0
"""How are models used? Swapped to, loaded, leased and parked."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dbus_next import Variant

from flashd import wire
from flashd.checkpoint.files import Checkpoint
from flashd.config import ModelConfig
from flashd.daemon.exports import Caller
from flashd.daemon.jobs import Job, Jobs, JobState, Owner, Result, Work
from flashd.daemon.limits import Limits, Scarce
from flashd.daemon.ownership import Ownership
from flashd.daemon.threads import Background
from flashd.engines.engine import EngineOptions
from flashd.errors import Busy, Cancelled, FlashdError, NotFound
from flashd.memory.device import Device, Kind, memory_fields
from flashd.memory.lease import Lease, LeaseBook
from flashd.memory.residency import Residency
from flashd.store.catalog import Catalog, Model
from flashd.supply import Supplier, Target
from flashd.swap import Swapper, SwapState

log = logging.getLogger(__name__)

# An engine that dies again so soon after it was brought back is left alone: the model itself must be the reason.
_BRING_BACK_AGAIN_S = 300.0
_LEFT_FREE = 4  # of so many parts of the machine's memory, one is left to others by what nobody has asked for


class Serving:
    """Operations that use models, as jobs where they are long."""

    def __init__(
        self,
        catalog: Catalog,
        residency: Residency,
        supplier: Supplier,
        swapper: Swapper,
        leases: LeaseBook,
        jobs: Jobs,
        background: Background,
        *,
        endpoint: Path,
        engine_kind: str,
        model_config: Callable[[Model], ModelConfig],
        is_present: Callable[[str], bool],
        on_leased: Callable[[Lease], None],
        on_used: Callable[[str], None],
        on_rest: Callable[[Target], None],
        on_asked: Callable[[str], None],
        limits: Limits,
        ownership: Ownership,
    ) -> None:
        """`engine_kind` is for swaps that do not say, unless `model_config` does. `is_present` tells whether a bus peer
        is still there; `on_used` hears of models whose use was noted, `on_rest` when one rests until it is asked,
        `on_asked` of those that somebody swaps to."""
        self._catalog = catalog
        self._residency = residency
        self._supplier = supplier
        self._leases = leases
        self._jobs = jobs
        self._background = background
        self._endpoint = endpoint
        self._engine_kind = engine_kind
        self._model_config = model_config
        self._is_present = is_present
        self._on_leased = on_leased
        self._on_used = on_used
        self._on_rest = on_rest
        self._on_asked = on_asked
        self._resting: Target | None = None  # what was active last, if it was parked because nobody asked it
        self._limits = limits
        self._ownership = ownership
        self._swapper = swapper
        self._line: list[Job] = []  # swaps and parks that have not ended, in the order asked
        self._kinds: dict[Job, str] = {}  # of engines, that the swaps among them want
        self._waiting_for_lease: dict[str, set[asyncio.Task[Any]]] = {}
        self._brought_back: dict[str, float] = {}

    def is_wanted(self, name: str) -> bool:
        """Whether a model is active, or a swap to it waits or is under way."""
        active = self._swapper.active
        return (active is not None and active.target.model_name == name) or any(
            job.subject == name for job in self._line
        )

    def swap(self, model: Model, owner: Owner, engine_kind: str = "") -> Job:
        """Joins the last swap asked for, if that one is to the same model and engine and has not ended.

        A model that is active stays in whatever engine it is in, unless one of another kind is asked for.
        """
        active = self._swapper.active
        if not engine_kind and active is not None and active.target.model_name == model.name:
            engine_kind = active.target.engine_kind
        target = self._target(model, engine_kind)
        kind = target.engine_kind
        last = self._line[-1] if self._line else None
        if last and (last.kind, last.subject, self._kinds.get(last)) == ("swap", model.name, kind):
            return last

        async def work(job: Job) -> Result:
            outcome = await self._swapper.swap(target, job.report_bytes)
            _begin(job)
            self._resting = None
            self._note_use(model.name, swapped=True)
            return {
                "model": Variant("o", wire.model_path(outcome.model_name)),
                "engine": Variant("o", wire.engine_path(outcome.engine_number)),
                "endpoint": Variant("s", str(self._endpoint)),
                "how": Variant("s", outcome.how.value),
                "from_tier": Variant("s", outcome.from_tier.value),
                "seconds": Variant("d", outcome.seconds),
                "phases": Variant("a{sd}", dict(outcome.phases)),
            }

        self._on_asked(model.name)
        job = self._enqueue("swap", model.name, owner, work)
        self._kinds[job] = kind
        return job

    def park(self, owner: Owner) -> Job:
        async def work(job: Job) -> Result:
            await self._swapper.park()
            _begin(job)
            self._resting = None
            return {}

        active = self._swapper.active
        # Who parks something private, and knows only that something is active, is told no more.
        is_named = active is not None and active.target.private_to in {None, owner.uid}
        return self._enqueue("park", active.target.model_name if active and is_named else "", owner, work)

    def _target(self, model: Model, engine_kind: str = "") -> Target:
        """What a swap to a model means; `engine_kind` counts before what is configured."""
        names = (model.name, *model.aliases)
        chosen = self._model_config(model)
        return Target(
            model.name,
            names,
            self._catalog.checkpoint(model.checkpoint_id),
            engine_kind or (self._engine_kind if chosen.engine == "default" else chosen.engine),
            model.owner_uid if model.private else None,
            EngineOptions(chosen.arguments, None if chosen.kv_cache_bytes == "default" else chosen.kv_cache_bytes),
        )

    def rest(self, target: Target, owner: Owner, *, evict: bool) -> Job:
        """Parks a model, if it is still the active one, until somebody asks it; `evict` its weights meanwhile."""

        async def work(job: Job) -> Result:
            # A private model's socket is nobody's, and so nobody asks it.
            rests = None if target.private_to is not None else functools.partial(self._let_rest, target)
            await self._swapper.park(target, move_endpoint=rests)
            _begin(job)
            if evict:
                with contextlib.suppress(Busy):  # somebody leases it
                    await self._residency.evict(*self._catalog.forms(target.checkpoint.id))
            return {}

        return self._enqueue("park", target.model_name, owner, work)

    def rests_on(self, name: str, engine_kind: str) -> None:
        """A model that a daemon before us let rest. Raises NotFound if it is gone meanwhile, or private;
        CorruptCheckpoint."""
        self._let_rest(self._target(self._catalog.resolve(name, lambda model: not model.private), engine_kind))

    def _let_rest(self, target: Target) -> None:
        """A question wakes it from now on: at no moment is there nobody to ask."""
        self._resting = target
        self._on_rest(target)

    @property
    def is_resting(self) -> bool:
        """Whether a question to the endpoint would wake a model."""
        return self._swapper.active is None and self._resting is not None

    async def woken(self, owner: Owner) -> Path:
        """The socket of the active model, which is woken if it rests. Raises what a swap raises; NotFound if none is
        active, and none rests. A private one is for nobody who comes this way: who asks is not known here."""
        resting = self._resting
        if self._swapper.active is None and resting is not None:
            model = self._catalog.resolve(resting.model_name, lambda model: not model.private)
            job = self.swap(model, owner, resting.engine_kind)
            await job.wait()
            if job.error is not None:
                raise job.error
        active = self._swapper.active
        if active is None or active.target.private_to is not None:
            raise NotFound("no model is active", hint="swap to one first: flash swap MODEL")
        return active.engine.socket_path

    def load(self, model: Model, owner: Owner, device: str, *, may_evict: bool = True) -> Job:
        """Brings a model to a device, or to the host. Raises InvalidArgument if there is no such device."""
        target = self._target(model)
        name = self._residency.place(device).name

        async def work(job: Job) -> Result:
            job.begin("loading")
            started = time.monotonic()
            forms = await self._supplier.forms(target, name)
            async with self._held(forms, job, may_evict=may_evict):
                return {
                    "residency": Variant("s", self._residency.tier_of(*(form.id for form, _ in forms)).value),
                    "seconds": Variant("d", time.monotonic() - started),
                    "size_bytes": Variant("t", sum(form.manifest.data_bytes for form, _ in forms)),
                }

        return self._jobs.run("load", model.name, owner, work, audience=self._ownership.audience(model))

    @contextlib.asynccontextmanager
    async def _held(self, forms: Sequence[tuple[Checkpoint, str]], job: Job, *, may_evict: bool) -> AsyncIterator[None]:
        """With each of these on its device."""
        with contextlib.ExitStack() as held:
            for form, device in forms:
                hold = await self._residency.acquire(form, job.report_bytes, device=device, may_evict=may_evict)
                held.enter_context(hold)
            yield

    async def warm_up(self, model: Model, owner: Owner, device: str) -> Job | None:
        """Makes a model ready for its first swap, in memory that is free; None if there is none.

        What goes wrong is for whoever swaps to it to hear of.
        """
        target = self._target(model)
        forms = await self._supplier.forms(target, self._residency.place(device).name)
        places = [(form, self._residency.place(name)) for form, name in forms]
        memory = memory_fields()
        if not all(is_free(p.device, p.pool.free_bytes, p.missing_bytes(form), memory) for form, p in places):
            return None

        async def work(job: Job) -> Result:
            job.begin("loading")
            try:
                async with self._held(forms, job, may_evict=False):
                    job.report("making its image")
                    if await self._swapper.prepare(target):
                        log.info("the image of %s is made", model.name)
            except (FlashdError, OSError) as error:
                log.info("%s is not made ready: %s", model.name, error)
            return {"residency": Variant("s", self._residency.tier_of(*self._catalog.forms(target.checkpoint.id)))}

        return self._jobs.run("warm-up", model.name, owner, work, audience=self._ownership.audience(model))

    async def lease(self, model: Model, caller: Caller, device: str) -> tuple[Lease, int, str]:
        """A lease, a descriptor of its arena to map for reading (the caller's to close), and the layout as JSON."""
        self._check_leases(caller)
        checkpoint = self._catalog.checkpoint(model.checkpoint_id)
        layout = await asyncio.to_thread(checkpoint.layout_json)
        with self._abandoned_with(caller.peer):
            hold = await self._residency.acquire(checkpoint, device=device)
        if not self._is_present(caller.peer):
            hold.release()
            raise Cancelled("its caller has left the bus")
        try:
            self._check_leases(caller)  # others may have come while it was loaded
            arena_fd = hold.arena.open_read_only()
        except BaseException:
            hold.release()
            raise
        lease = self._leases.add(model.name, caller.peer, caller.uid, device, hold)
        self._on_leased(lease)
        self._note_use(model.name)
        return lease, arena_fd, layout

    def _check_leases(self, caller: Caller) -> None:
        self._limits.check(Scarce.LEASES, caller, (Owner(held.owner, held.owner_uid) for held in self._leases.all()))

    def peer_left(self, peer: str) -> None:
        for task in self._waiting_for_lease.get(peer, ()):
            task.cancel()
        self._leases.release_owner(peer)

    async def stop_engine(self, number: int) -> None:
        await self._swapper.stop_engine(number)

    def ended(self, job: Job) -> None:
        """To be told of finished jobs."""
        if job in self._line:
            self._line.remove(job)
            self._kinds.pop(job, None)

    def swap_progressed(self) -> None:
        """To be told of every change of the swapper: the job at the head of the line is the one whose turn it is."""
        state = self._swapper.state
        if self._line and state is not SwapState.IDLE:
            _begin(self._line[0])
            self._line[0].report(state.value.replace("_", " "))

    def engine_lost(self, target: Target, owner: Owner) -> None:
        """The active engine ended unasked: its model is brought back in another one, once."""
        name, now = target.model_name, time.monotonic()
        if now - self._brought_back.get(name, -_BRING_BACK_AGAIN_S) < _BRING_BACK_AGAIN_S:
            log.error("%s is not brought back: its engine died twice in a short time", name)
            return
        self._brought_back[name] = now
        with contextlib.suppress(NotFound):
            self.swap(self._catalog.resolve(name), owner, target.engine_kind)

    def _enqueue(self, kind: str, subject: str, owner: Owner, work: Work) -> Job:
        job = self._jobs.create(kind, subject, owner, audience=self._ownership.audience_of(subject))
        self._line.append(job)
        job.start(work)
        return job

    @contextlib.contextmanager
    def _abandoned_with(self, peer: str) -> Iterator[None]:
        """Cancels the current task when this peer leaves: nobody would ever end its lease."""
        task = asyncio.current_task()
        assert task is not None
        tasks = self._waiting_for_lease.setdefault(peer, set())
        tasks.add(task)
        try:
            yield
        finally:
            tasks.discard(task)
            if not tasks:
                self._waiting_for_lease.pop(peer, None)

    def _note_use(self, name: str, *, swapped: bool = False) -> None:
        async def note() -> None:
            await asyncio.to_thread(self._catalog.touch, name, swapped=swapped)
            self._on_used(name)

        self._background.start(note())


def is_free(device: Device, pool_bytes: int, size_bytes: int, memory: Mapping[str, int]) -> bool:
    """Whether so much can be taken of a device for what nobody has asked for.

    `pool_bytes` are free of its pool, which may be more than others leave of the machine's `memory` (/proc/meminfo).
    """
    is_left = memory["MemAvailable"] - size_bytes >= memory["MemTotal"] // _LEFT_FREE
    return size_bytes <= pool_bytes and (is_left or device.kind in {Kind.CUDA, Kind.SIMULATED})


def _begin(job: Job) -> None:
    if job.state is JobState.QUEUED:
        job.begin()
