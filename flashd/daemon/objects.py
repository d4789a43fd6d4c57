# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ARG002 -- every method is told its caller; few need it
"""What do the objects on the bus say and do? Thin: each maps the contract's members to the part behind them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from dbus_next import Variant

import flashd
from flashd import wire
from flashd.bus import plain
from flashd.daemon.authorization import check_owner
from flashd.daemon.endpoint import connected
from flashd.daemon.exports import EVERYBODY, Audience, Caller, Exported, Fd
from flashd.daemon.jobs import Job, Owner
from flashd.daemon.parts import Parts
from flashd.errors import InvalidArgument, NotFound, Unavailable, from_bus
from flashd.memory.device import HOST, Kind, Tier
from flashd.memory.lease import Lease
from flashd.store.catalog import Model
from flashd.swap import Seat

NONE = "/"  # how D-Bus APIs say "no object"


class ManagerObject(Exported):
    interface = wire.MANAGER

    def __init__(self, parts: Parts) -> None:
        super().__init__(wire.ROOT_PATH)
        self._parts = parts

    def properties(self) -> Mapping[str, Any]:
        parts = self._parts
        config, active = parts.settings.current, parts.swapper.active
        return {
            "Version": flashd.__version__,
            "State": "stopping" if parts.is_stopping() else "ready",
            **self._active(active if active and parts.ownership.is_public(active.target.model_name) else None),
            "Endpoint": str(parts.endpoint),
            "ModelsDirectories": [str(folder) for folder in config.inbox.folders],
            "StorePath": str(config.store.path),
            "StoreBytes": parts.catalog.size_bytes() + parts.catalog.images.size_bytes(),
            "StoreQuotaBytes": config.store.quota_bytes,
            "StoreFreeBytes": parts.catalog.free_bytes(),
            "InboxItems": parts.arrivals.shown() if parts.arrivals.audience == EVERYBODY else [],
        }

    def properties_only_for(self, viewer: Caller) -> Mapping[str, Any]:
        parts, active = self._parts, self._parts.swapper.active
        seen: dict[str, Any] = {}
        audience = parts.ownership.audience_of(active.target.model_name) if active else EVERYBODY
        if audience != EVERYBODY and audience.includes(viewer):
            seen |= self._active(active)
        if parts.arrivals.audience != EVERYBODY and parts.arrivals.audience.includes(viewer):
            seen["InboxItems"] = parts.arrivals.shown()
        return seen

    @staticmethod
    def _active(active: Seat | None) -> Mapping[str, str]:
        return {
            "ActiveModel": wire.model_path(active.target.model_name) if active else NONE,
            "ActiveEngine": wire.engine_path(active.engine.number) if active else NONE,
        }

    def _model(self, caller: Caller, name: str) -> Model:
        """The one that is meant. Raises NotFound, which tells what is known of a source of that name."""
        try:
            return self._parts.ownership.resolve(caller, name)
        except NotFound:
            arrivals = self._parts.arrivals
            if arrivals.audience.includes(caller):
                arrivals.check_absence(name.strip())
            raise

    async def find_model(self, caller: Caller, name: str) -> str:
        return wire.model_path(self._model(caller, name).name)

    async def list_models(self, caller: Caller) -> str:
        models = self._parts.ownership.models(caller)
        return json.dumps({wire.model_path(model.name): model_properties(self._parts, model) for model in models})

    async def import_(
        self, caller: Caller, name: str, files: dict[str, int], more: bool, options: dict[str, Variant]
    ) -> str:
        given = checked_options(options, aliases="as", replace="b", private="b")
        replace = given.get("replace", True)
        owner_uid = await self._parts.ownership.owner_of_new(caller, name, replace=replace)
        job = self._parts.imports.begin(
            caller,
            name,
            files,
            more=more,
            aliases=tuple(given.get("aliases", ())),
            replace=replace,
            owner_uid=owner_uid,
            private=given.get("private"),
        )
        return wire.job_path(job.number)

    async def import_files(self, caller: Caller, job: str, files: dict[str, int], more: bool) -> None:
        self._parts.imports.add(caller, self._job(job), files, more=more)

    async def pull(self, caller: Caller, repository: str, options: dict[str, Variant]) -> str:
        given = checked_options(options, revision="s", name="s")
        revision, name = given.get("revision", "main"), given.get("name", "")
        owner_uid = await self._parts.ownership.owner_of_new(caller, name or repository, replace=True)
        return wire.job_path(self._parts.pulls.request(caller, repository, revision, name, owner_uid).number)

    async def claim_pull(self, caller: Caller, job: str) -> tuple[str, str, str]:
        return self._parts.pulls.claim(caller, self._job(job))

    async def begin_pull(self, caller: Caller, origin: str, name: str, options: dict[str, Variant]) -> str:
        given = checked_options(options, aliases="as", job="o")
        if "job" in given:
            self._parts.pulls.begin_claimed(caller, self._job(given["job"]), origin)
            return str(given["job"])
        owner_uid = await self._parts.ownership.owner_of_new(caller, name, replace=True)
        aliases = tuple(given.get("aliases", ()))
        return wire.job_path(self._parts.pulls.begin(caller, origin, name, aliases, owner_uid).number)

    async def pull_files(self, caller: Caller, job: str, files: dict[str, int], awaited: list[str], more: bool) -> None:
        await self._parts.pulls.add(caller, self._job(job), files, awaited, more=more)

    async def pull_progress(self, caller: Caller, job: str, done_bytes: int, total_bytes: int) -> None:
        self._parts.pulls.tell(caller, self._job(job), done_bytes, total_bytes)

    async def pull_failed(self, caller: Caller, job: str, error: str, message: str, hint: str) -> None:
        self._parts.pulls.fail(caller, self._job(job), from_bus(error, message, hint))

    async def swap(self, caller: Caller, model: str, options: dict[str, Variant]) -> str:
        engine = checked_options(options, engine="s").get("engine", "")
        if engine not in {"", *self._parts.engine_kinds}:
            hint = f"there is: {', '.join(self._parts.engine_kinds)}"
            raise InvalidArgument(f"there is no kind of engine {engine!r}", hint=hint)
        found = self._model(caller, model)
        return wire.job_path(self._parts.serving.swap(found, _owner(caller), engine).number)

    async def load(self, caller: Caller, model: str, tier: str, options: dict[str, Variant]) -> str:
        if tier not in {Tier.HOST, Tier.DEVICE}:
            raise InvalidArgument(f"there is no tier {tier!r}", hint="there is: host, device")
        device = self._parts.residency.resolve(checked_options(options, device="s").get("device", tier))
        if (tier == Tier.HOST) != (device == HOST):
            raise InvalidArgument(f"{device} is not of the {tier} tier", hint="leave one of the two out")
        job = self._parts.serving.load(self._model(caller, model), _owner(caller), device)
        return wire.job_path(job.number)

    async def lease(
        self, caller: Caller, model: str, options: dict[str, Variant]
    ) -> tuple[str, Fd, str, dict[str, Variant]]:
        device = self._parts.residency.resolve(checked_options(options, device="s").get("device", HOST))
        found = self._model(caller, model)
        lease, arena_fd, layout = await self._parts.serving.lease(found, caller, device)
        return wire.lease_path(lease.number), Fd(arena_fd), layout, self._details(lease, found)

    async def lease_image(
        self, caller: Caller, model: str, build: str, device: str, options: dict[str, Variant]
    ) -> tuple[str, Fd, str, dict[str, Variant]]:
        checked_options(options)
        found = self._model(caller, model)
        name = self._parts.residency.resolve(device)
        lease, arena_fd, layout = await self._parts.shared_images.lease(found, caller, build, name)
        return wire.lease_path(lease.number), Fd(arena_fd), layout, self._details(lease, found)

    async def publish_image(
        self,
        caller: Caller,
        model: str,
        build: str,
        device: str,
        arena: int,
        layout: str,
        size_bytes: int,
        options: dict[str, Variant],
    ) -> str:
        checked_options(options)
        found = self._model(caller, model)
        name = self._parts.residency.resolve(device)
        lease = await self._parts.shared_images.publish(found, caller, build, name, arena, layout, size_bytes)
        return wire.lease_path(lease.number)

    def _details(self, lease: Lease, model: Model) -> dict[str, Variant]:
        place = self._parts.residency.place(lease.device)
        gpu = None if lease.device == HOST else place.device.gpu
        return {
            "size_bytes": Variant("t", lease.size_bytes),
            "mapped_bytes": Variant("t", lease.hold.arena.mapped_bytes),
            "device": Variant("s", lease.device),
            "memory": Variant("s", "cuda" if place.device.kind is Kind.CUDA else "host"),
            "gpu": Variant("s", gpu.uuid if gpu else ""),
            "model": Variant("s", lease.model_name),
            "checkpoint": Variant("s", model.checkpoint_id),
        }

    async def open_endpoint(self, caller: Caller) -> Fd:
        active = self._parts.swapper.active
        if self._parts.serving.is_resting:
            return Fd((await connected(self._parts.endpoint)).detach())
        if active is None or not self._parts.ownership.audience_of(active.target.model_name).includes(caller):
            raise Unavailable("no model is active", hint="swap to one first: flash swap MODEL")
        return Fd((await connected(active.engine.socket_path)).detach())

    async def park(self, caller: Caller) -> str:
        return wire.job_path(self._parts.serving.park(_owner(caller)).number)

    async def scrub(self, caller: Caller) -> str:
        return wire.job_path(self._parts.models.scrub(_owner(caller), lambda model: not model.private).number)

    async def collect(self, caller: Caller) -> tuple[list[str], int]:
        collected = await self._parts.models.collect()
        return list(collected.checkpoint_ids), collected.freed_bytes

    async def get_config(self, caller: Caller) -> str:
        return self._parts.settings.to_toml()

    async def set_config(self, caller: Caller, key: str, value: str) -> bool:
        return self._parts.settings.change(key, value)

    async def install_environment(self, caller: Caller, kind: str, wheels: dict[str, int], more: bool) -> str:
        return wire.job_path(self._parts.installations.begin(caller, kind, wheels, more=more).number)

    async def add_wheels(self, caller: Caller, job: str, wheels: dict[str, int], more: bool) -> None:
        found = self._parts.jobs.get(_number(job, wire.job_path))
        self._parts.installations.add(caller, found, wheels, more=more)

    async def use_environment(self, caller: Caller, kind: str, number: int) -> None:
        await self._parts.installations.use(kind, number)

    async def remove_environment(self, caller: Caller, kind: str, number: int) -> None:
        await self._parts.installations.remove(kind, number)

    async def list_environments(self, caller: Caller) -> list[list[Any]]:
        return await self._parts.installations.listed()

    async def stop(self, caller: Caller) -> None:
        self._parts.stop()

    def _job(self, path: str) -> Job:
        return self._parts.jobs.get(_number(path, wire.job_path))


def model_properties(parts: Parts, model: Model) -> Mapping[str, Any]:
    active = parts.swapper.active
    forms = parts.catalog.forms(model.checkpoint_id)
    return {
        "Name": model.name,
        "Aliases": list(model.aliases),
        "Checkpoint": model.checkpoint_id,
        "Architecture": model.architecture,
        "DType": model.dtype,
        "SizeBytes": model.size_bytes,
        "TensorCount": model.tensor_count,
        "Residency": parts.residency.tier_of(*forms).value,
        "Devices": parts.residency.devices_of(*forms),
        "Active": active is not None and active.target.model_name == model.name,
        "Pinned": model.pinned,
        "Leases": parts.residency.holds(*forms),
        "CreatedAt": int(model.created_at),
        "LastUsedAt": int(model.last_used_at),
        "UseCount": model.use_count,
        "Source": model.origin.location,
        "OwnerUid": model.owner_uid,
        "Private": model.private,
    }


class ModelObject(Exported):
    interface = wire.MODEL

    def __init__(self, parts: Parts, name: str) -> None:
        super().__init__(wire.model_path(name))
        self._parts = parts
        self._name = name
        self._last_known = self._model()

    def _model(self) -> Model:
        model = self._parts.catalog.get(self._name)
        if model is None:
            raise NotFound(f"there is no model {self._name!r}", hint="it was removed just now")
        return model

    def properties(self) -> Mapping[str, Any]:
        # While it is being removed, in a thread, it is gone from the catalog and not yet from the bus.
        self._last_known = self._parts.catalog.get(self._name) or self._last_known
        return model_properties(self._parts, self._last_known)

    def audience(self) -> Audience:
        return self._parts.ownership.audience(self._parts.catalog.get(self._name) or self._last_known)

    async def pin(self, caller: Caller) -> None:
        await self._parts.models.set_pinned(self._name, True)

    async def unpin(self, caller: Caller) -> None:
        await self._parts.models.set_pinned(self._name, False)

    async def evict(self, caller: Caller) -> None:
        await self._parts.models.evict(self._model())

    async def set_aliases(self, caller: Caller, aliases: list[str]) -> None:
        await self._parts.ownership.check_change(caller, self._name)
        await self._parts.models.set_aliases(self._name, aliases)

    async def set_private(self, caller: Caller, private: bool) -> None:
        await self._parts.ownership.check_change(caller, self._name)
        await self._parts.models.set_private(self._name, private)

    async def remove(self, caller: Caller) -> None:
        await self._parts.ownership.check_change(caller, self._name)
        await self._parts.models.remove(self._name)

    async def verify(self, caller: Caller) -> str:
        return wire.job_path(self._parts.models.verify(self._name, _owner(caller)).number)


class JobObject(Exported):
    interface = wire.JOB

    def __init__(self, parts: Parts, job: Job) -> None:
        super().__init__(wire.job_path(job.number))
        self._parts = parts
        self._job = job

    def audience(self) -> Audience:
        return self._job.audience

    def error(self) -> list[str]:
        error = self._job.error
        return [error.bus_name(), error.message, error.hint] if error else ["", "", ""]

    def properties(self) -> Mapping[str, Any]:
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
            "Result": dict(job.result),
            "Error": self.error(),
        }

    async def cancel(self, caller: Caller) -> None:
        await check_owner(self._parts.authority, caller, self._job.owner.uid, f"job {self._job.number}")
        self._job.cancel()


class LeaseObject(Exported):
    interface = wire.LEASE

    def __init__(self, parts: Parts, lease: Lease) -> None:
        super().__init__(wire.lease_path(lease.number))
        self._parts = parts
        self._lease = lease

    def properties(self) -> Mapping[str, Any]:
        lease = self._lease
        still_there = self._parts.catalog.get(lease.model_name) is not None
        return {
            "Model": wire.model_path(lease.model_name) if still_there else NONE,
            "Checkpoint": lease.checkpoint_id,
            "Device": lease.device,
            "SizeBytes": lease.size_bytes,
            "Owner": lease.owner,
            "OwnerUid": lease.owner_uid,
            "CreatedAt": int(lease.created_at),
        }

    def audience(self) -> Audience:
        return self._parts.ownership.audience_of(self._lease.model_name)

    async def release(self, caller: Caller) -> None:
        await check_owner(self._parts.authority, caller, self._lease.owner_uid, f"lease {self._lease.number}")
        self._parts.leases.release(self._lease.number)


class EngineObject(Exported):
    interface = wire.ENGINE

    def __init__(self, parts: Parts, seat: Seat) -> None:
        super().__init__(wire.engine_path(seat.engine.number))
        self._parts = parts
        self._seat = seat

    def properties(self) -> Mapping[str, Any]:
        engine, target, supply = self._seat.engine, self._seat.target, self._seat.supply
        stats = self._parts.engine_stats.of(engine.number)
        still_there = self._parts.catalog.get(target.model_name) is not None
        return {
            "Kind": engine.kind,
            "State": engine.state.value,
            "Model": wire.model_path(target.model_name) if still_there else NONE,
            "Architecture": target.checkpoint.manifest.architecture,
            "Endpoint": str(engine.socket_path),
            "Pid": engine.pid,
            "ActiveRequests": stats.active_requests,
            "MemoryBytes": stats.memory_bytes,
            "DeviceBytes": self._parts.engine_stats.device_bytes(engine.number),
            "Weights": "" if supply is None else "image" if supply.is_image else "checkpoint",
            "StartedAt": int(engine.started_at),
        }

    def audience(self) -> Audience:
        return self._parts.ownership.audience_of(self._seat.target.model_name)

    async def stop(self, caller: Caller) -> None:
        await self._parts.serving.stop_engine(self._seat.engine.number)


class DeviceObject(Exported):
    interface = wire.DEVICE
    changes_unheard = True  # what others use of it

    def __init__(self, parts: Parts, name: str) -> None:
        """On unified memory two devices, the host and the GPU, show one pool."""
        super().__init__(wire.device_path(name))
        self._name = name
        self._usage = parts.driver_usage
        self._place = parts.residency.places[name]

    def properties(self) -> Mapping[str, Any]:
        device, pool = self._place.device, self._place.pool
        gpu = None if self._name == HOST else device.gpu
        return {
            "Name": self._name,
            "Kind": HOST if self._name == HOST else device.kind.value,
            "Model": gpu.model if gpu else "",
            "Uuid": gpu.uuid if gpu else "",
            "TotalBytes": device.total_bytes,
            "BudgetBytes": pool.budget_bytes,
            "UsedBytes": pool.used_bytes,
            "LeasedBytes": self._place.fixed_bytes(),
            "DriverUsedBytes": self._usage.of(device),
            "HugePages": device.huge_pages.value,
            "Integrated": gpu is not None and gpu.is_integrated,
            "ReadsHostPages": gpu is not None and gpu.reads_host_pages,
            "MapsMemory": gpu is not None and gpu.maps_memory,
            "ExportsMemory": gpu is not None and gpu.exports_memory,
        }


def checked_options(options: Mapping[str, Variant], **known: str) -> dict[str, Any]:
    """Options as plain values. Raises InvalidArgument for names we do not know and values of another signature."""
    for name, value in options.items():
        if name not in known:
            hint = f"there is: {', '.join(sorted(known))}" if known else "this method has none yet"
            raise InvalidArgument(f"there is no option {name!r}", hint=hint)
        if value.signature != known[name]:
            raise InvalidArgument(f"option {name!r} is of type {known[name]!r}, not {value.signature!r}")
    return {name: plain(value) for name, value in options.items()}


def _owner(caller: Caller) -> Owner:
    return Owner(caller.peer, caller.uid)


def _number(path: str, path_of: Callable[[int], str]) -> int:
    """The number that an object path of ours ends in."""
    last = path.rpartition("/")[2]
    if not (last.isascii() and last.isdigit()) or path_of(int(last)) != path:
        raise InvalidArgument(f"{path} is not the path of such an object", hint="use the path that the call returned")
    return int(last)
