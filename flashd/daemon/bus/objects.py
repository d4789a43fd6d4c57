# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ARG002 -- every method takes its caller; few need it
"""The bus objects of models, jobs, leases, engines and devices. They are thin: each maps the contract to the daemon's
parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from flashd.daemon.access.authorization import Authority, check_owner, may_administer
from flashd.daemon.access.disclosure import without_secrets
from flashd.daemon.access.ownership import Ownership
from flashd.daemon.bus.arguments import owner
from flashd.daemon.bus.manager import NONE
from flashd.daemon.job import Job, Owner
from flashd.daemon.library.models import Models
from flashd.daemon.library.verification import Verification
from flashd.daemon.lifecycle.settings import Settings
from flashd.daemon.serving.adapters import Adapters
from flashd.daemon.serving.capabilities import Capabilities
from flashd.daemon.serving.driver_usage import DriverUsage
from flashd.daemon.serving.endpoint import connected
from flashd.daemon.serving.engine_stats import EngineStatsBook
from flashd.daemon.serving.swaps import Swaps
from flashd.dbus import wire
from flashd.dbus.object_tree import EVERYBODY, Audience, Caller, Exported, Fd
from flashd.engines.engine import EngineState
from flashd.errors import NotFound, Unavailable
from flashd.memory.device import HOST
from flashd.memory.device_cache import DeviceCache
from flashd.memory.lease import Lease, LeaseBook
from flashd.memory.residency import Residency
from flashd.store.catalog import Catalog, Model
from flashd.swap.slots import EngineSlot
from flashd.swap.swapper import Swapper


class ModelObject(Exported):
    interface = wire.MODEL

    def __init__(
        self,
        name: str,
        catalog: Catalog,
        residency: Residency,
        swapper: Swapper,
        ownership: Ownership,
        models: Models,
        verification: Verification,
        swaps: Swaps,
        engine_stats: EngineStatsBook,
        adapters: Adapters,
        capabilities: Capabilities,
    ) -> None:
        super().__init__(wire.model_path(name))
        self._name = name
        self._catalog = catalog
        self._residency = residency
        self._swapper = swapper
        self._ownership = ownership
        self._models = models
        self._verification = verification
        self._swaps = swaps
        self._engine_stats = engine_stats
        self._adapters = adapters
        self._capabilities = capabilities
        self._last_known = self._model()

    def _model(self) -> Model:
        model = self._catalog.get(self._name)
        if model is None:
            raise NotFound(f"there is no model {self._name!r}", hint="it has just been removed")
        return model

    def properties(self) -> Mapping[str, object]:
        # While it is being removed, in a thread, it is no longer in the catalog, but still on the bus.
        self._last_known = self._catalog.get(self._name) or self._last_known
        model, active = self._last_known, self._swapper.slots.active
        slot = self._swapper.slots.of(model.name)
        forms = self._catalog.forms(model.checkpoint_id)
        return {
            "Name": model.name,
            "Aliases": list(model.aliases),
            "Checkpoint": model.checkpoint_id,
            "Architecture": model.architecture,
            "DType": model.dtype,
            "SizeBytes": model.size_bytes,
            "TensorCount": model.tensor_count,
            "ContextLength": model.context_length,
            "Residency": self._residency.tier_of(*forms).value,
            "Devices": self._residency.devices_of(*forms),
            "Active": active is not None and active.target.model_name == model.name,
            "Serving": slot is not None and slot.target.checkpoint.id == model.checkpoint_id,
            "Pinned": model.pinned,
            "Leases": self._residency.holds(*forms),
            "CreatedAt": int(model.created_at),
            "LastUsedAt": int(model.last_used_at),
            "UseCount": model.use_count,
            "Source": model.origin.location,
            "OwnerUid": model.owner_uid,
            "Private": model.private,
            "Adapters": self._adapters.of(model),
            "Capabilities": self._capabilities.of(model),
            "Format": "gguf" if model.is_gguf else "safetensors",
        }

    def audience(self) -> Audience:
        return self._ownership.audience(self._catalog.get(self._name) or self._last_known)

    async def pin(self, caller: Caller) -> None:
        await self._models.set_pinned(self._name, True)

    async def unpin(self, caller: Caller) -> None:
        await self._models.set_pinned(self._name, False)

    async def open_endpoint(self, caller: Caller) -> Fd:
        return Fd((await connected(self._slot(caller).engine.socket_path)).detach())

    async def set_idle_timeout(self, caller: Caller, seconds: int) -> None:
        self._engine_stats.keep(self._slot(caller), math.inf if seconds == wire.NEVER else seconds)

    def _slot(self, caller: Caller) -> EngineSlot:
        """Where the model serves. Raises Unavailable if it does not."""
        slot = self._swapper.slots.of(self._name)
        if slot is None or not self._ownership.audience_of_target(slot.target).includes(caller):
            raise Unavailable(f"{self._name} does not serve", hint=f"serve it first: flash serve {self._name}")
        return slot

    async def park(self, caller: Caller) -> str:
        return wire.job_path(self._swaps.park(owner(caller), self._model()).number)

    async def evict(self, caller: Caller) -> None:
        await self._models.evict(self._model())

    async def set_aliases(self, caller: Caller, aliases: list[str]) -> None:
        await self._ownership.check_change(caller, self._name)
        await self._models.set_aliases(self._name, aliases)

    async def set_private(self, caller: Caller, private: bool) -> None:
        await self._ownership.check_change(caller, self._name)
        await self._models.set_private(self._name, private)

    async def remove(self, caller: Caller) -> None:
        await self._ownership.check_change(caller, self._name)
        await self._models.remove(self._name)

    async def verify(self, caller: Caller) -> str:
        return wire.job_path(self._verification.verify(self._name, owner(caller)).number)


class AboutModel(Exported):
    """An object for users who may see its model; after the model's removal, for those who could see it then."""

    def __init__(self, path: str, model_name: str, catalog: Catalog, ownership: Ownership) -> None:
        super().__init__(path)
        self._catalog = catalog
        self._ownership = ownership
        self._model_name = model_name
        self._last_audience = EVERYBODY
        self.audience()

    def audience(self) -> Audience:
        model = self._catalog.get(self._model_name)
        if model is not None:
            self._last_audience = self._ownership.audience(model)
        return self._last_audience


class JobObject(AboutModel):
    interface = wire.JOB

    def __init__(
        self, job: Job, catalog: Catalog, ownership: Ownership, authority: Authority, settings: Settings
    ) -> None:
        self._job = job
        self._authority = authority
        self._settings = settings
        super().__init__(wire.job_path(job.number), "" if job.kind == "install" else job.subject, catalog, ownership)

    def audience(self) -> Audience:
        """Returns the model's audience, or, for a job on something private, such as a future model, the job's own."""
        return super().audience() if self._job.audience == EVERYBODY else self._job.audience

    @property
    def subject(self) -> str:
        return self._job.subject

    def error(self) -> list[str]:
        error = self._job.error
        if error is None:
            return ["", "", ""]
        config = self._settings.current
        return [error.bus_name(), without_secrets(error.message, config), without_secrets(error.hint, config)]

    def properties(self) -> Mapping[str, object]:
        job = self._job
        return {
            "Kind": job.kind,
            "Subject": job.subject,
            "State": job.state.value,
            "Phase": job.phase,
            "DoneBytes": job.done_bytes,
            "TotalBytes": job.total_bytes,
            "CreatedAt": job.created_at,
            "FinishedAt": job.finished_at,
            "Askers": job.askers,
            "Result": dict(job.result),
            "Error": self.error(),
        }

    async def cancel(self, caller: Caller) -> None:
        """Withdraws the request of this connection, or else those of its user; an administrator ends the job."""
        job, authority = self._job, self._authority
        if job.has_asked(caller.peer):
            job.withdraw(owner(caller))
        elif not job.is_also_of(caller.uid):
            await check_owner(authority, caller, job.owner.uid, f"job {job.number}")
            job.cancel()
        elif job.is_only_of(caller.uid) or await may_administer(authority, caller):
            job.cancel()
        else:
            job.withdraw(Owner("", caller.uid))


class LeaseObject(AboutModel):
    interface = wire.LEASE

    def __init__(
        self, lease: Lease, catalog: Catalog, ownership: Ownership, authority: Authority, leases: LeaseBook
    ) -> None:
        super().__init__(wire.lease_path(lease.number), lease.model_name, catalog, ownership)
        self._lease = lease
        self._authority = authority
        self._leases = leases

    def properties(self) -> Mapping[str, object]:
        lease = self._lease
        still_there = self._catalog.get(lease.model_name) is not None
        return {
            "Model": wire.model_path(lease.model_name) if still_there else NONE,
            "Checkpoint": lease.checkpoint_id,
            "Device": lease.device,
            "SizeBytes": lease.size_bytes,
            "Owner": lease.owner,
            "OwnerUid": lease.owner_uid,
            "CreatedAt": int(lease.created_at),
        }

    async def release(self, caller: Caller) -> None:
        await check_owner(self._authority, caller, self._lease.owner_uid, f"lease {self._lease.number}")
        self._leases.release(self._lease.number)


class EngineObject(Exported):
    """An engine, for users who may see the model that it holds, or held when it was parked."""

    interface = wire.ENGINE

    def __init__(
        self, slot: EngineSlot, catalog: Catalog, ownership: Ownership, engine_stats: EngineStatsBook, swapper: Swapper
    ) -> None:
        super().__init__(wire.engine_path(slot.engine.number))
        self._slot = slot
        self._catalog = catalog
        self._ownership = ownership
        self._engine_stats = engine_stats
        self._swapper = swapper

    def properties(self) -> Mapping[str, object]:
        engine, target, supply = self._slot.engine, self._slot.target, self._slot.supply
        stats = self._engine_stats.of(engine.number)
        still_there = self._catalog.get(target.model_name) is not None
        return {
            "Kind": engine.kind,
            "State": engine.state.value,
            "Model": wire.model_path(target.model_name) if still_there else NONE,
            "Architecture": target.checkpoint.manifest.architecture,
            "Endpoint": str(engine.socket_path),
            "Pid": engine.pid,
            "ActiveRequests": stats.active_requests,
            "MemoryBytes": stats.memory_bytes,
            "KvCacheBytes": 0 if engine.state is EngineState.PARKED else engine.cache_bytes,
            "DeviceBytes": self._engine_stats.device_bytes(engine.number),
            "Weights": "" if supply is None else "image" if supply.is_image else "checkpoint",
            "StartedAt": int(engine.started_at),
        }

    def audience(self) -> Audience:
        return self._ownership.audience_of_target(self._slot.target)

    async def stop(self, caller: Caller) -> None:
        target, number = self._slot.target, self._slot.engine.number
        model = self._catalog.get(target.model_name)
        if model is not None:
            await self._ownership.check_owner(caller, model, f"engine {number}, which holds {model.name},")
        await self._swapper.stop_engine(number)


class DeviceObject(Exported):
    interface = wire.DEVICE
    changes_unheard = True  # memory used by other programs

    def __init__(self, name: str, cache: DeviceCache, usage: DriverUsage) -> None:
        """`name` may be the host or the GPU for the same place, if memory is unified."""
        super().__init__(wire.device_path(name))
        self._name = name
        self._cache = cache
        self._usage = usage

    def properties(self) -> Mapping[str, object]:
        device, pool = self._cache.device, self._cache.pool
        gpu = None if self._name == HOST else device.gpu
        return {
            "Name": self._name,
            "Kind": HOST if self._name == HOST else device.kind.value,
            "Model": gpu.model if gpu else "",
            "Uuid": gpu.uuid if gpu else "",
            "TotalBytes": device.total_bytes,
            "BudgetBytes": pool.budget_bytes,
            "UsedBytes": pool.used_bytes,
            "LeasedBytes": self._cache.fixed_bytes(),
            "DriverUsedBytes": self._usage.of(device),
            "HugePages": device.huge_pages.value,
            "Integrated": gpu is not None and gpu.is_integrated,
            "ReadsHostPages": gpu is not None and gpu.reads_host_pages,
            "MapsMemory": gpu is not None and gpu.maps_memory,
            "ExportsMemory": gpu is not None and gpu.exports_memory,
        }
