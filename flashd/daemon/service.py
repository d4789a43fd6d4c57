# SPDX-License-Identifier: Apache-2.0
"""The composition root: builds all parts of the daemon once, starts them, and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
from pathlib import Path

from flashd.config.environment import notify_socket, watchdog_s
from flashd.daemon.access.authorization import Authority, SameUser, authorize
from flashd.daemon.access.callers import Callers
from flashd.daemon.access.limits import Limits, Scarce
from flashd.daemon.access.ownership import Ownership, group_id
from flashd.daemon.access.polkit import Polkit
from flashd.daemon.bus.manager import (
    AdministrationCalls,
    Finder,
    IngestCalls,
    ManagerObject,
    ManagerProperties,
    ModelCalls,
    ServingCalls,
)
from flashd.daemon.bus.objects import DeviceObject, EngineObject, JobObject, LeaseObject, ModelObject
from flashd.daemon.bus.publisher import Objects, Publisher
from flashd.daemon.changing_models import Changes
from flashd.daemon.events import Events
from flashd.daemon.ingest.conversions import Conversions
from flashd.daemon.ingest.inbox_conversions import InboxConversions
from flashd.daemon.ingest.pull_workers import PullWorkers
from flashd.daemon.ingest.pulls import Pulls
from flashd.daemon.ingest.uploads import Uploads
from flashd.daemon.job import Owner
from flashd.daemon.jobs import Jobs
from flashd.daemon.library.models import Models
from flashd.daemon.library.store_room import StoreRoom
from flashd.daemon.library.verification import Verification
from flashd.daemon.lifecycle.descriptor_store import EngineKeeper, FdStore
from flashd.daemon.lifecycle.ending import Ending, How
from flashd.daemon.lifecycle.problems import Problems
from flashd.daemon.lifecycle.restore import Restore
from flashd.daemon.lifecycle.settings import Settings
from flashd.daemon.lifecycle.stall_detector import StallDetector
from flashd.daemon.serving.adapters import Adapters
from flashd.daemon.serving.capabilities import Capabilities
from flashd.daemon.serving.driver_usage import DriverUsage, process_bytes
from flashd.daemon.serving.endpoint import EndpointLink, RestingEndpoint, RuntimeFolder
from flashd.daemon.serving.engine_kinds import EngineKinds
from flashd.daemon.serving.engine_stats import EngineStatsBook
from flashd.daemon.serving.gpu_preparation import GpuPreparation
from flashd.daemon.serving.idle import Idle, idle_timeout_s
from flashd.daemon.serving.image_saving import ImageSaving
from flashd.daemon.serving.installations import Installations
from flashd.daemon.serving.leasing import Leasing
from flashd.daemon.serving.loads import Loads
from flashd.daemon.serving.memory_pressure import MemoryPressure, unneeded_bytes
from flashd.daemon.serving.memory_setup import log_load, memories, streamer_options
from flashd.daemon.serving.prewarm import prewarm
from flashd.daemon.serving.shared_images import SharedImages
from flashd.daemon.serving.swaps import Swaps
from flashd.daemon.serving.targets import Targets, Uses
from flashd.daemon.serving.wake_proxy import WakeProxy
from flashd.daemon.serving.warmup import warmup
from flashd.dbus import wire
from flashd.dbus.connection import Connection, connect
from flashd.dbus.object_tree import EVERYBODY, Caller, ObjectTree
from flashd.engines.environments import Environments
from flashd.errors import Busy, Unavailable
from flashd.memory.device import memory_fields
from flashd.memory.lease import LeaseBook
from flashd.memory.residency import Residency
from flashd.memory.transfers import StreamMover
from flashd.service_manager import ServiceManager, Watchdog
from flashd.store.catalog import Catalog, Model
from flashd.store.inbox import Inbox
from flashd.store.known_sources import KnownSources
from flashd.swap.swapper import Policy, Swapper
from flashd.swap.weights import Supplier, Target
from flashd.tasks import Background

log = logging.getLogger(__name__)

_POLICY_S = 5.0  # enough for a bus to read our policy after its installation


async def run(settings: Settings, address: str, ending: Ending) -> None:
    """Runs the daemon until its end is requested. Raises Unavailable if the bus closes the connection.

    Raises Busy or AlreadyExists if another daemon has the store, the runtime folder or the name.
    """
    config = settings.current
    is_shared = address == "system"  # the machine's daemon serves all users; other daemons serve one
    async with contextlib.AsyncExitStack() as stack:
        connection = await connect(address)
        stack.push_async_callback(connection.close)
        manager = ServiceManager(notify_socket())
        fd_store = FdStore(manager)
        engine_keeper = EngineKeeper(fd_store)
        left = engine_keeper.left()
        runtime = stack.enter_context(
            RuntimeFolder(settings.paths.runtime, for_group=is_shared, has_engines=bool(left))
        )
        store = config.store
        catalog = stack.enter_context(
            Catalog(store.path, quota_bytes=store.quota_bytes, keep_versions=store.keep_versions)
        )
        authority = Polkit(connection) if is_shared else SameUser(os.getuid())
        restore = Restore(fd_store, engine_keeper, left)
        service = Service(connection, address, settings, catalog, runtime, restore, authority, manager, ending)
        stack.push_async_callback(service.close)
        await service.start()
        manager.tell("READY=1")
        watchdog = Watchdog(manager, watchdog_s(), service.summary, service.health_problem)
        stack.push_async_callback(watchdog.close)
        watchdog.start()
        log.info("ready on %s as %s", address, wire.BUS_NAME)
        await service.ended()
        manager.tell("STOPPING=1")


class Service:
    """The daemon. Its parts are built from the bottom up, folder by folder, and connected by events."""

    def __init__(
        self,
        connection: Connection,
        address: str,
        settings: Settings,
        catalog: Catalog,
        runtime: RuntimeFolder,
        restore: Restore,
        authority: Authority,
        manager: ServiceManager,
        ending: Ending,
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._catalog = catalog
        self._runtime = runtime
        self._restore = restore
        self._authority = authority
        self._manager = manager
        self._ending = ending
        self._is_shared = address == "system"
        self._ourselves = Owner(peer="", uid=os.getuid())
        self._events = Events()
        settings.on_change = self._events.settings_changed
        self._background = Background()
        self._stalls = StallDetector(lambda: settings.current.streamer.stall_timeout_s)
        self._options = streamer_options(settings.current, self._stalls)
        self._changes = Changes()
        self._build_access()
        self._build_memory()
        self._build_engines()
        self._build_serving()
        self._build_ingest(address)
        self._build_library()
        self._build_bus()

    def _build_access(self) -> None:
        config = self._settings.current
        self._callers = Callers(self._connection, self._events)
        self._limits = Limits(lambda: self._settings.current.limits)
        self._ownership = Ownership(
            self._catalog, self._authority, own_uid=os.getuid(), private_group=group_id(config.store.private_group)
        )
        self._jobs = Jobs(self._events, check_room=functools.partial(self._limits.check, Scarce.JOBS))

    def _build_memory(self) -> None:
        config, events = self._settings.current, self._events
        self._mover = StreamMover(
            self._options,
            verify=config.streamer.verify,
            staging_bytes=config.streamer.staging_bytes,
            on_loaded=log_load,
        )
        self._residency = Residency(
            memories(config.memory),
            self._mover,
            is_pinned=self._catalog.is_pinned,
            on_change=events.checkpoint_changed,
            on_host_resident=events.host_resident,
            keeper=self._restore.arenas,
        )
        self._leases = LeaseBook(on_end=events.lease_ended)
        self._gpu_preparation = GpuPreparation(self._residency, self._mover, self._background, events)
        self._driver_usage = DriverUsage(self._background, events)
        ImageSaving(self._catalog, self._mover, self._background, events)

    def _build_engines(self) -> None:
        config, events = self._settings.current, self._events
        environments = Environments(self._settings.paths.state / "environments")
        gpus = [cache.device.gpu for cache in self._residency.distinct() if cache.device.gpu is not None]
        self._kinds = EngineKinds(
            self._settings,
            environments,
            self._runtime,
            self._restore,
            gpus,
            events,
            is_shared=self._is_shared,
        )
        self._installations = Installations(environments, self._jobs, events, on_change=self._kinds.environment_changed)
        factories = self._kinds.factories
        self._supplier = Supplier(self._residency, factories, self._catalog.images, on_made=events.image_made)
        endpoint = EndpointLink(self._runtime.endpoint, self._runtime.shared_mode)
        self._swapper = Swapper(
            self._supplier,
            factories,
            endpoint,
            Policy(
                config.engines.drain_timeout_s,
                config.engines.max_parked,
                per_architecture=config.engines.per_architecture,
            ),
            on_change=events.engines_changed,
            on_lost=self._engine_lost,
            on_displaced=self._active_displaced,
            free_bytes=lambda: unneeded_bytes(self._settings.current.engines.spare_bytes, memory_fields()),
        )
        RestingEndpoint(self._runtime, endpoint, events)

    def _build_serving(self) -> None:
        settings, catalog, events = self._settings, self._catalog, self._events
        targets = Targets(catalog, settings, self._changes, lambda: self._kinds.default.kind)
        uses = Uses(catalog, self._background, events)
        self._swaps = Swaps(
            catalog,
            self._residency,
            self._swapper,
            targets,
            self._jobs,
            self._ownership,
            self._changes,
            uses,
            events,
            endpoint=self._runtime.endpoint,
            ourselves=self._ourselves,
        )
        self._loads = Loads(
            catalog, self._residency, self._supplier, self._swapper, targets, self._jobs, self._ownership
        )
        self._leasing = Leasing(
            catalog,
            self._residency,
            self._leases,
            self._callers,
            self._limits,
            self._ownership,
            uses,
            events,
        )
        self._wake_proxy = WakeProxy(
            self._runtime.wake_proxy,
            self._runtime.shared_mode,
            lambda is_question: self._swaps.woken(is_question=is_question),
            events,
            is_for_active=self._swapper.slots.leads_to_endpoint,
        )
        self._adapters = Adapters(settings, catalog, self._background, events)

        def kind_of(model: Model) -> str:
            slot = self._swapper.slots.of(model.name)
            return slot.target.engine_kind if slot is not None else targets.kind_of(model)

        self._capabilities = Capabilities(settings, catalog, kind_of, self._background, events)
        self._engine_stats = EngineStatsBook(
            self._swapper,
            events,
            idle_timeout_s=functools.partial(idle_timeout_s, settings),
            device_bytes=functools.partial(process_bytes, self._residency),
        )
        Idle(settings, catalog, self._swaps, self._ourselves, events)
        self._pressure = MemoryPressure(self._swapper, spare_bytes=lambda: settings.current.engines.spare_bytes)
        self._warmup = warmup(
            settings, catalog, self._loads, self._jobs, self._swapper, self._engine_stats, self._ourselves, events
        )

    def _build_ingest(self, address: str) -> None:
        settings, catalog, events = self._settings, self._catalog, self._events
        inbox = settings.current.inbox
        conversions = Conversions(
            catalog,
            options=dataclasses.replace(self._options, on_start=None),
            python=lambda: self._kinds.python("torch"),
            on_published=events.model_published,
            on_stalled=functools.partial(self._stalls.look_at, catalog.root),
        )
        self._uploads = Uploads(catalog, self._jobs, conversions, self._limits, self._ownership, events)
        workers = PullWorkers(address, self._background, events, is_shared=self._is_shared)
        self._pulls = Pulls(catalog, self._jobs, conversions, self._limits, self._ownership, workers.send, events)
        self._inbox_conversions = InboxConversions(
            catalog,
            self._jobs,
            conversions,
            KnownSources(
                settings.paths.state / "dismissed.toml",
                "removed models may come back",
                lambda write: self._background.start(asyncio.to_thread(write)),
            ),
            self._background,
            events,
            owner=self._ourselves,
            private=inbox.private,
            audience=self._ownership.private_to(os.getuid()) if inbox.private else EVERYBODY,
            is_there=self._source_is_there,
        )
        self._inbox = Inbox(inbox.folders, self._inbox_conversions, settle_s=inbox.settle_s, rescan_s=inbox.rescan_s)
        self._problems = Problems(catalog, settings.paths.state, events, missing_folders=self._inbox.missing)

    def _build_library(self) -> None:
        self._store_room = StoreRoom(self._catalog, self._background, self._events)
        self._verification = Verification(self._catalog, self._jobs, self._ownership, self._options)
        self._models = Models(
            self._catalog,
            self._residency,
            self._background,
            self._changes,
            self._settings,
            self._ending,
            self._events,
            is_wanted=self._swaps.is_wanted,
            serving_checkpoints=lambda: {slot.target.checkpoint.id for slot in self._swapper.slots.serving},
            end_preparing=self._loads.end_preparing,
        )

    def _build_bus(self) -> None:
        catalog, ownership, authority = self._catalog, self._ownership, self._authority
        tree = ObjectTree(
            self._connection,
            identify=self._callers.identify,
            authorize=self._authorize,
            watchers=self._callers.all,
            known=self._callers.get,
            check_calls=functools.partial(self._limits.check_counts, Scarce.CALLS),
        )
        objects = Objects(
            model=lambda name: ModelObject(
                *(name, catalog, self._residency, self._swapper, ownership, self._models, self._verification),
                *(self._swaps, self._engine_stats, self._adapters, self._capabilities),
            ),
            job=lambda job: JobObject(job, catalog, ownership, authority, self._settings),
            lease=lambda lease: LeaseObject(lease, catalog, ownership, authority, self._leases),
            engine=lambda slot: EngineObject(slot, catalog, ownership, self._engine_stats, self._swapper),
        )
        caches = self._residency.caches
        self._publisher = Publisher(
            tree,
            self._manager_object(tree, objects),
            [DeviceObject(name, cache, self._driver_usage) for name, cache in caches.items()],
            objects,
            catalog,
            self._residency,
            self._leases,
            self._swapper,
            self._events,
        )

    def _manager_object(self, tree: ObjectTree, objects: Objects) -> ManagerObject:
        settings, ownership, endpoint = self._settings, self._ownership, self._runtime.endpoint
        finder = Finder(ownership, self._inbox_conversions)
        leasing, residency = self._leasing, self._residency
        images = SharedImages(self._catalog, residency, leasing, self._events, own_uid=os.getuid())

        def listed(model: Model) -> str:
            shown = tree.get(wire.model_path(model.name))
            return tree.as_json(shown or objects.model(model.name))

        return ManagerObject(
            ManagerProperties(
                settings,
                self._ending,
                self._catalog,
                self._store_room,
                self._inbox_conversions,
                self._inbox,
                self._problems,
                ownership,
                self._swapper,
                self._swaps,
                self._kinds,
                endpoint=endpoint,
            ),
            ModelCalls(finder, ownership, self._models, self._verification, listed),
            IngestCalls(self._jobs, ownership, self._uploads, self._pulls),
            ServingCalls(
                finder,
                ownership,
                residency,
                self._swapper,
                self._swaps,
                self._loads,
                leasing,
                images,
                engine_kinds=self._kinds.names,
                endpoint=endpoint,
            ),
            AdministrationCalls(
                self._authority, ownership, settings, self._jobs, self._installations, self._manager, self._ending
            ),
        )

    async def start(self) -> None:
        """Appears on the bus with all objects; then begins to scan the inbox."""
        await self._restore.take_over_memory(self._catalog, self._residency)
        self._publisher.appear()
        resting, active = self._runtime.resting, self._runtime.active
        await self._restore.take_over_engines(
            self._catalog,
            self._kinds.factories,
            self._swapper,
            self._supplier,
            None if resting else active,
            self._runtime.beside,
        )
        if resting:
            model_name, engine_kind = resting
            self._swaps.resume_rest(model_name, engine_kind if engine_kind in self._kinds.names else "")
        await self._connection.watch_peers(self._events.peer_left)
        await self._wake_proxy.open()
        await self._connection.own(wire.BUS_NAME, patience_s=_POLICY_S)
        if self._catalog.models():
            self._kinds.begin()
        self._background.start(self._publisher.prepare())
        self._adapters.start()
        self._capabilities.start()
        self._engine_stats.start()
        self._warmup.start()
        self._pressure.start()
        self._problems.start()
        self._inbox.start()
        self._models.collect_soon()
        self._background.start(self._installations.clean_up())
        self._background.start(self._prewarm())

    async def ended(self) -> None:
        """Waits until the end is requested. Raises Unavailable if the bus closes the connection."""
        lost = asyncio.create_task(self._connection.closed())
        asked = asyncio.create_task(self._ending.wait())
        await asyncio.wait({lost, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not self._ending.is_asked:
            asked.cancel()
            raise Unavailable("the bus has closed the connection", hint="the service manager restarts flashd")
        lost.cancel()

    def summary(self) -> str:
        """Returns one line for `systemctl status`."""
        active = self._swapper.slots.active
        is_public = active is not None and self._ownership.is_public(active.target)
        name = active.target.model_name if active and is_public else "a private one"
        answering = f"{name} answers" if active else "none is active"
        return f"{len(self._catalog.models())} models, {answering}"

    def health_problem(self) -> str:
        """Describes a problem that only a restart can fix; empty if there is none."""
        return self._stalls.found()

    async def close(self) -> None:
        """Ends all parts in the order of their dependencies."""
        self._ending.ask(How.LEAVING)
        is_leaving = self._ending.how is not How.FOR_GOOD
        self._runtime.is_left = is_leaving and self._manager.is_there
        self._events.manager_changed()
        await self._inbox.close()
        self._inbox_conversions.close()
        await self._warmup.close()
        await self._jobs.close()
        await self._engine_stats.close()
        await self._pressure.close()
        await self._problems.close()
        await self._wake_proxy.close()
        is_unfinished = await self._restore.close()
        has_left_some = await self._swapper.close(leaving=is_leaving)
        self._runtime.has_engines = is_leaving and (has_left_some or is_unfinished)
        await self._kinds.close(leaving=is_leaving)
        for lease in self._leases.all():
            self._leases.release(lease.number)
        await self._residency.stop()  # before the background, because loads there begin to register arenas
        await self._background.close()
        await self._residency.end()
        self._publisher.close()

    async def _prewarm(self) -> None:
        await self._gpu_preparation.run()
        prewarm(self._settings, self._catalog, self._swaps, self._loads, self._ourselves)

    async def _authorize(self, caller: Caller, interface: str, member: str) -> None:
        if self._ending.is_asked:
            raise Busy("the daemon is stopping", hint="start it again: flash start")
        await authorize(self._authority, caller, interface, member)

    def _source_is_there(self, path: Path) -> bool:
        return self._inbox.has(path)

    def _active_displaced(self, target: Target) -> bool:
        return self._swaps.let_rest(target)

    def _engine_lost(self, target: Target, was_active: bool) -> None:
        if not self._ending.is_asked:
            self._events.engine_lost(target, was_active)
