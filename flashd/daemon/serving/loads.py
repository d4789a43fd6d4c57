# SPDX-License-Identifier: Apache-2.0
"""Loads of models into memory, on request or to prepare a new model for its first swap."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence

from dbus_next import Variant

from flashd.checkpoint.files import Checkpoint
from flashd.daemon.access.ownership import Ownership
from flashd.daemon.job import Job, Owner, Result
from flashd.daemon.jobs import Jobs
from flashd.daemon.serving.targets import Targets
from flashd.errors import FlashdError
from flashd.memory.device import Device, Kind, memory_fields
from flashd.memory.residency import Residency
from flashd.store.catalog import Catalog, Model
from flashd.swap.swapper import Swapper
from flashd.swap.weights import Supplier, Target

log = logging.getLogger(__name__)

_LEFT_FREE = 4  # preparations leave one part in so many of the machine's memory to other programs


class Loads:
    """Loads as jobs."""

    def __init__(
        self,
        catalog: Catalog,
        residency: Residency,
        supplier: Supplier,
        swapper: Swapper,
        targets: Targets,
        jobs: Jobs,
        ownership: Ownership,
    ) -> None:
        self._catalog = catalog
        self._residency = residency
        self._supplier = supplier
        self._swapper = swapper
        self._targets = targets
        self._jobs = jobs
        self._ownership = ownership
        self._preparing: dict[Job, str] = {}  # models that are being prepared

    def load(self, model: Model, owner: Owner, device: str, *, may_evict: bool = True) -> Job:
        """Loads a model to a device or the host. Raises InvalidArgument if there is no such device."""
        target = self._targets.of(model)
        name = self._residency.cache(device).name

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
        """Loads and holds each of these forms on its device."""
        with contextlib.ExitStack() as held:
            for form, device in forms:
                hold = await self._residency.acquire(form, job.report_bytes, device=device, may_evict=may_evict)
                held.enter_context(hold)
            yield

    async def warm_up(self, model: Model, owner: Owner, device: str) -> Job | None:
        """Prepares a model for its first swap, in free memory; None if there is none.

        Errors are reported by the swap itself.
        """
        target = self._targets.of(model)
        forms = await self._supplier.forms(target, self._residency.cache(device).name)
        caches = [(form, self._residency.cache(name)) for form, name in forms]
        memory = memory_fields()
        if not all(is_free(p.device, p.pool.free_bytes, p.missing_bytes(form), memory) for form, p in caches):
            return None

        async def renew(target: Target) -> Target:
            return await self._targets.renewed(target, [lambda model: True])

        async def work(job: Job) -> Result:
            job.begin("loading")
            self._preparing[job] = model.name
            try:
                async with self._held(forms, job, may_evict=False):
                    job.report("making its image")
                    if await self._swapper.prepare(target, renew=renew):
                        log.info("made the image of %s", model.name)
            except (FlashdError, OSError) as error:
                log.info("%s is not prepared: %s", model.name, error)
            finally:
                self._preparing.pop(job, None)
            return {"residency": Variant("s", self._residency.tier_of(*self._catalog.forms(target.checkpoint.id)))}

        return self._jobs.run("warm-up", model.name, owner, work, audience=self._ownership.audience(model))

    async def end_preparing(self, name: str) -> None:
        """Waits until no engine holds the model of this name only to prepare it."""
        jobs = [job for job, preparing in self._preparing.items() if preparing == name]
        for job in jobs:
            job.cancel()
        for job in jobs:
            await job.wait()


def is_free(device: Device, pool_bytes: int, size_bytes: int, memory: Mapping[str, int]) -> bool:
    """Tells whether a device has enough free memory for a preparation.

    `pool_bytes` are free in its pool, which may be more than is available of the machine's `memory` (/proc/meminfo).
    """
    is_left = memory["MemAvailable"] - size_bytes >= memory["MemTotal"] // _LEFT_FREE
    return size_bytes <= pool_bytes and (is_left or device.kind in {Kind.CUDA, Kind.SIMULATED})
