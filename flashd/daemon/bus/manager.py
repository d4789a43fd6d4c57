# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ARG002 -- every method takes its caller; few need it
"""The manager's object on the bus. It is thin: each group of its methods maps the contract to the daemon's parts."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import ClassVar, Protocol

from dbus_next import Variant

from flashd._version import __version__
from flashd.config import loading
from flashd.config.settings import Config
from flashd.daemon.access.authorization import Authority, may_administer
from flashd.daemon.access.disclosure import disclosed
from flashd.daemon.access.ownership import Ownership
from flashd.daemon.bus.arguments import checked_options, number_in, owner
from flashd.daemon.ingest.inbox_conversions import InboxConversions
from flashd.daemon.ingest.pulls import Pulls
from flashd.daemon.ingest.uploads import Uploads
from flashd.daemon.job import Job, Owner
from flashd.daemon.jobs import Jobs
from flashd.daemon.library.models import Models
from flashd.daemon.library.store_room import StoreRoom
from flashd.daemon.library.verification import Verification
from flashd.daemon.lifecycle.ending import Ending, How, restart
from flashd.daemon.lifecycle.problems import Problems
from flashd.daemon.lifecycle.settings import Settings
from flashd.daemon.serving.endpoint import connected
from flashd.daemon.serving.engine_kinds import EngineKinds
from flashd.daemon.serving.installations import Installations
from flashd.daemon.serving.leasing import Leasing
from flashd.daemon.serving.loads import Loads
from flashd.daemon.serving.shared_images import SharedImages
from flashd.daemon.serving.swaps import Swaps
from flashd.dbus import wire
from flashd.dbus.object_tree import EVERYBODY, Caller, Exported, Fd
from flashd.errors import InvalidArgument, NotFound, Unavailable, from_bus
from flashd.legible import legible
from flashd.memory.device import HOST, Kind, Tier
from flashd.memory.lease import Lease
from flashd.memory.residency import Residency
from flashd.service_manager import ServiceManager
from flashd.store.catalog import Catalog, Model
from flashd.store.inbox import Inbox
from flashd.swap.slots import EngineSlot
from flashd.swap.swapper import Swapper

NONE = "/"  # means "no object" in D-Bus APIs

_MOST_STRAYS = 50  # more than a person would read


class Finder:
    """Finds models for callers."""

    def __init__(self, ownership: Ownership, inbox_conversions: InboxConversions) -> None:
        self._ownership = ownership
        self._inbox_conversions = inbox_conversions

    def find(self, caller: Caller, name: str) -> Model:
        """Resolves a name. Raises NotFound, which includes the state of a source of that name."""
        try:
            return self._ownership.resolve(caller, name)
        except NotFound:
            if self._inbox_conversions.audience.includes(caller):
                self._inbox_conversions.check_absence(name.strip())
            raise


class ModelCalls:
    """Methods for the models in the store."""

    def __init__(
        self,
        finder: Finder,
        ownership: Ownership,
        models: Models,
        verification: Verification,
        listed: Callable[[Model], str],
    ) -> None:
        """`listed` formats a model's entry in the JSON object of all models."""
        self._finder = finder
        self._ownership = ownership
        self._models = models
        self._verification = verification
        self._listed = listed

    async def find_model(self, caller: Caller, name: str) -> str:
        return wire.model_path(self._finder.find(caller, name).name)

    async def list_models(self, caller: Caller) -> str:
        return "{" + ", ".join(map(self._listed, self._ownership.models(caller))) + "}"

    async def scrub(self, caller: Caller) -> str:
        return wire.job_path(self._verification.scrub(owner(caller), lambda model: not model.private).number)

    async def collect(self, caller: Caller) -> tuple[list[str], int]:
        collected = await self._models.collect()
        return list(collected.checkpoint_ids), collected.freed_bytes


class IngestCalls:
    """Methods that add models to the store."""

    def __init__(self, jobs: Jobs, ownership: Ownership, uploads: Uploads, pulls: Pulls) -> None:
        self._jobs = jobs
        self._ownership = ownership
        self._uploads = uploads
        self._pulls = pulls

    async def import_(
        self, caller: Caller, name: str, files: dict[str, int], more: bool, options: dict[str, Variant]
    ) -> str:
        given = checked_options(options, aliases="as", replace="b", private="b")
        replace = given.get("replace", True)
        owner_uid = await self._ownership.owner_of_new(caller, name, replace=replace)
        job = self._uploads.begin(
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
        self._uploads.add(caller, self._job(job), files, more=more)

    async def pull(self, caller: Caller, repository: str, options: dict[str, Variant]) -> str:
        given = checked_options(options, revision="s", name="s")
        revision, name = given.get("revision", "main"), given.get("name", "")
        owner_uid = await self._ownership.owner_of_new(caller, name or repository, replace=True)
        return wire.job_path(self._pulls.request(caller, repository, revision, name, owner_uid).number)

    async def claim_pull(self, caller: Caller, job: str) -> tuple[str, str, str]:
        return self._pulls.claim(caller, self._job(job))

    async def begin_pull(self, caller: Caller, origin: str, name: str, options: dict[str, Variant]) -> str:
        given = checked_options(options, aliases="as", job="o")
        if "job" in given:
            self._pulls.begin_claimed(caller, self._job(given["job"]), origin)
            return str(given["job"])
        owner_uid = await self._ownership.owner_of_new(caller, name, replace=True)
        aliases = tuple(given.get("aliases", ()))
        return wire.job_path(self._pulls.begin(caller, origin, name, aliases, owner_uid).number)

    async def pull_files(self, caller: Caller, job: str, files: dict[str, int], awaited: list[str], more: bool) -> None:
        await self._pulls.add(caller, self._job(job), files, awaited, more=more)

    async def pull_progress(self, caller: Caller, job: str, done_bytes: int, total_bytes: int) -> None:
        self._pulls.tell(caller, self._job(job), done_bytes, total_bytes)

    async def pull_failed(self, caller: Caller, job: str, error: str, message: str, hint: str) -> None:
        self._pulls.fail(caller, self._job(job), from_bus(error, message, hint))

    def _job(self, path: str) -> Job:
        return self._jobs.get(number_in(path, wire.job_path))


class Bring(Protocol):
    """Begins a swap, or a serve."""

    def __call__(self, model: Model, owner: Owner, engine_kind: str = "", *, sees: Callable[[Model], bool]) -> Job: ...


class ServingCalls:
    """Methods that use models."""

    def __init__(
        self,
        finder: Finder,
        ownership: Ownership,
        residency: Residency,
        swapper: Swapper,
        swaps: Swaps,
        loads: Loads,
        leasing: Leasing,
        shared_images: SharedImages,
        *,
        engine_kinds: tuple[str, ...],
        endpoint: Path,
    ) -> None:
        self._finder = finder
        self._ownership = ownership
        self._residency = residency
        self._swapper = swapper
        self._swaps = swaps
        self._loads = loads
        self._leasing = leasing
        self._shared_images = shared_images
        self._engine_kinds = engine_kinds
        self._endpoint = endpoint

    async def swap(self, caller: Caller, model: str, options: dict[str, Variant]) -> str:
        return self._bring(self._swaps.swap, caller, model, options)

    async def serve(self, caller: Caller, model: str, options: dict[str, Variant]) -> str:
        return self._bring(self._swaps.serve, caller, model, options)

    def _bring(self, bring: Bring, caller: Caller, model: str, options: dict[str, Variant]) -> str:
        engine = self._engine_kind(options)
        found, ownership = self._finder.find(caller, model), self._ownership
        job = bring(found, owner(caller), engine, sees=lambda model: ownership.sees(caller, model))
        return wire.job_path(job.number)

    async def would_displace(self, caller: Caller, model: str, options: dict[str, Variant]) -> list[str]:
        engine = self._engine_kind(options)
        displaced = await self._swaps.displaced_by(self._finder.find(caller, model), engine)
        # Who may not see a model learns only that something is in the way.
        seen = [target for target in displaced if self._ownership.audience_of_target(target).includes(caller)]
        return [wire.model_path(target.model_name) for target in seen]

    def _engine_kind(self, options: dict[str, Variant]) -> str:
        engine: str = checked_options(options, engine="s").get("engine", "")
        if engine not in {"", *self._engine_kinds}:
            hint = f"choose one of: {', '.join(self._engine_kinds)}"
            raise InvalidArgument(f"there is no kind of engine {engine!r}", hint=hint)
        return engine

    async def load(self, caller: Caller, model: str, tier: str, options: dict[str, Variant]) -> str:
        if tier not in {Tier.HOST, Tier.DEVICE}:
            raise InvalidArgument(f"there is no tier {tier!r}", hint="choose one of: host, device")
        device = self._residency.resolve(checked_options(options, device="s").get("device", tier))
        if (tier == Tier.HOST) != (device == HOST):
            raise InvalidArgument(f"{device} is not in the {tier} tier", hint="give only one of the two")
        job = self._loads.load(self._finder.find(caller, model), owner(caller), device)
        return wire.job_path(job.number)

    async def lease(
        self, caller: Caller, model: str, options: dict[str, Variant]
    ) -> tuple[str, Fd, str, dict[str, Variant]]:
        device = self._residency.resolve(checked_options(options, device="s").get("device", HOST))
        found = self._finder.find(caller, model)
        lease, arena_fd, layout = await self._leasing.lease(found, caller, device)
        return wire.lease_path(lease.number), Fd(arena_fd), layout, self._details(lease, found)

    async def lease_image(
        self, caller: Caller, model: str, build: str, device: str, options: dict[str, Variant]
    ) -> tuple[str, Fd, str, dict[str, Variant]]:
        checked_options(options)
        found = self._finder.find(caller, model)
        name = self._residency.resolve(device)
        lease, arena_fd, layout = await self._shared_images.lease(found, caller, build, name)
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
        found = self._finder.find(caller, model)
        name = self._residency.resolve(device)
        lease = await self._shared_images.publish(found, caller, build, name, arena, layout, size_bytes)
        return wire.lease_path(lease.number)

    def _details(self, lease: Lease, model: Model) -> dict[str, Variant]:
        cache = self._residency.cache(lease.device)
        gpu = None if lease.device == HOST else cache.device.gpu
        return {
            "size_bytes": Variant("t", lease.size_bytes),
            "mapped_bytes": Variant("t", lease.hold.arena.mapped_bytes),
            "device": Variant("s", lease.device),
            "memory": Variant("s", "cuda" if cache.device.kind is Kind.CUDA else "host"),
            "gpu": Variant("s", gpu.uuid if gpu else ""),
            "model": Variant("s", lease.model_name),
            "checkpoint": Variant("s", model.checkpoint_id),
        }

    async def open_endpoint(self, caller: Caller) -> Fd:
        active = self._swapper.slots.active
        if self._swaps.is_resting:
            return Fd((await connected(self._endpoint)).detach())
        if active is None or not self._ownership.audience_of_target(active.target).includes(caller):
            raise Unavailable("no model is active", hint="swap to a model first: flash swap MODEL")
        return Fd((await connected(active.engine.socket_path)).detach())

    async def park(self, caller: Caller) -> str:
        return wire.job_path(self._swaps.park(owner(caller)).number)


class AdministrationCalls:
    """Methods that administer the daemon."""

    def __init__(
        self,
        authority: Authority,
        ownership: Ownership,
        settings: Settings,
        jobs: Jobs,
        installations: Installations,
        manager: ServiceManager,
        ending: Ending,
    ) -> None:
        self._authority = authority
        self._ownership = ownership
        self._settings = settings
        self._jobs = jobs
        self._installations = installations
        self._manager = manager
        self._ending = ending

    async def get_config(self, caller: Caller) -> str:
        return await self._shown_to(caller, self._settings.current)

    async def get_next_config(self, caller: Caller) -> str:
        return await self._shown_to(caller, self._settings.next())

    async def _shown_to(self, caller: Caller, config: Config) -> str:
        """Formats a configuration as TOML: all of it for administrators."""
        if not await may_administer(self._authority, caller):
            config = disclosed(config, lambda name: self._ownership.knows(caller, name))
        return loading.dump(config)

    async def set_config(self, caller: Caller, key: str, value: str) -> bool:
        return self._settings.change(key, value)

    async def install_environment(self, caller: Caller, kind: str, wheels: dict[str, int], more: bool) -> str:
        return wire.job_path(self._installations.begin(caller, kind, wheels, more=more).number)

    async def add_wheels(self, caller: Caller, job: str, wheels: dict[str, int], more: bool) -> None:
        found = self._job(job)
        self._installations.add(caller, found, wheels, more=more)

    async def use_environment(self, caller: Caller, kind: str, number: int) -> None:
        await self._installations.use(kind, number)

    async def remove_environment(self, caller: Caller, kind: str, number: int) -> None:
        await self._installations.remove(kind, number)

    async def list_environments(self, caller: Caller) -> list[list[object]]:
        return await self._installations.listed()

    async def stop(self, caller: Caller) -> None:
        self._ending.ask(How.FOR_GOOD)

    async def restart(self, caller: Caller) -> None:
        restart(self._ending, self._manager, self._settings)

    def _job(self, path: str) -> Job:
        return self._jobs.get(number_in(path, wire.job_path))


class ManagerProperties:
    """The manager's properties, with values for all users and values that depend on the viewer."""

    def __init__(
        self,
        settings: Settings,
        ending: Ending,
        catalog: Catalog,
        store_room: StoreRoom,
        inbox_conversions: InboxConversions,
        inbox: Inbox,
        problems: Problems,
        ownership: Ownership,
        swapper: Swapper,
        swaps: Swaps,
        kinds: EngineKinds,
        *,
        endpoint: Path,
    ) -> None:
        self._settings = settings
        self._kinds = kinds
        self._ending = ending
        self._catalog = catalog
        self._store_room = store_room
        self._inbox_conversions = inbox_conversions
        self._inbox = inbox
        self._problems = problems
        self._ownership = ownership
        self._swapper = swapper
        self._swaps = swaps
        self._endpoint = endpoint

    def for_all(self) -> Mapping[str, object]:
        config, active, room = self._settings.current, self._swapper.slots.active, self._store_room.known
        return {
            "Version": __version__,
            "State": "stopping" if self._ending.is_asked else "ready",
            **self._active(active if active and self._ownership.is_public(active.target) else None),
            "RestingModel": wire.model_path(resting.model_name) if (resting := self._swaps.resting) else NONE,
            "Endpoint": str(self._endpoint),
            "DefaultEngine": self._kinds.default.kind,
            "DefaultEngineReason": self._kinds.default.why,
            "ModelsDirectories": [str(folder) for folder in config.inbox.folders],
            "StorePath": str(config.store.path),
            "StoreBytes": self._catalog.size_bytes() + self._catalog.images.stored_bytes() + room.leftover_bytes,
            "StoreQuotaBytes": config.store.quota_bytes,
            "StoreFreeBytes": room.free_bytes,
            "InboxItems": self._inbox_conversions.shown() if self._inbox_conversions.audience == EVERYBODY else [],
            "InboxStrays": self._strays() if self._inbox_conversions.audience == EVERYBODY else [],
            "InboxWatched": [[str(w.folder), w.how, w.why_not, w.looked_at] for w in self._inbox.watched()],
            "Problems": self._problems.all(with_names=False),
        }

    async def refresh(self, name: str) -> None:
        """Asks the disk for its free space before property `name` is read, or all properties if it is empty."""
        if name in {"", "StoreBytes", "StoreFreeBytes"}:
            await self._store_room.refresh()

    def only_for(self, viewer: Caller) -> Mapping[str, object]:
        active = self._swapper.slots.active
        seen: dict[str, object] = {}
        audience = self._ownership.audience_of_target(active.target) if active else EVERYBODY
        if audience != EVERYBODY and audience.includes(viewer):
            seen |= self._active(active)
        if self._inbox_conversions.audience != EVERYBODY and self._inbox_conversions.audience.includes(viewer):
            seen["InboxItems"] = self._inbox_conversions.shown()
            seen["InboxStrays"] = self._strays()
        if viewer.uid in {0, os.getuid()}:
            seen["Problems"] = self._problems.all(with_names=True)
        return seen

    def _strays(self) -> list[list[str]]:
        strays = self._inbox.strays()
        shown = [[legible(str(each.path)), each.why] for each in strays[:_MOST_STRAYS]]
        more = len(strays) - len(shown)
        return [*shown, [f"{more} more", f"only the first {_MOST_STRAYS} are listed"]] if more else shown

    @staticmethod
    def _active(active: EngineSlot | None) -> Mapping[str, str]:
        return {
            "ActiveModel": wire.model_path(active.target.model_name) if active else NONE,
            "ActiveEngine": wire.engine_path(active.engine.number) if active else NONE,
        }


class ManagerObject(Exported):
    """The manager. Its methods are in groups, each of which depends only on the parts that it needs."""

    interface = wire.MANAGER
    GROUPS: ClassVar[tuple[type, ...]] = (ModelCalls, IngestCalls, ServingCalls, AdministrationCalls)

    def __init__(
        self,
        properties: ManagerProperties,
        models: ModelCalls,
        ingest: IngestCalls,
        serving: ServingCalls,
        administration: AdministrationCalls,
    ) -> None:
        super().__init__(wire.ROOT_PATH)
        self._properties = properties
        self._groups = (models, ingest, serving, administration)

    @classmethod
    def implementation(cls, name: str) -> Callable[..., object] | None:
        return next((getattr(group, name) for group in cls.GROUPS if hasattr(group, name)), None)

    def method(self, name: str) -> Callable[..., Awaitable[object]]:
        bound: Callable[..., Awaitable[object]] = next(
            getattr(group, name) for group in self._groups if hasattr(group, name)
        )
        return bound

    def properties(self) -> Mapping[str, object]:
        return self._properties.for_all()

    async def refresh(self, name: str) -> None:
        await self._properties.refresh(name)

    def properties_only_for(self, viewer: Caller) -> Mapping[str, object]:
        return self._properties.only_for(viewer)
