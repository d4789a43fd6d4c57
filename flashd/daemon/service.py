# SPDX-License-Identifier: Apache-2.0
"""The composition root: every part is built here, once, and told of the others."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from flashd import config as configuration
from flashd import cuda, wire
from flashd.bus import Connection, connect
from flashd.checkpoint.files import Checkpoint
from flashd.config import Config, MemoryConfig, ModelConfig
from flashd.daemon.arrivals import Arrivals
from flashd.daemon.authorization import Authority, SameUser, authorize
from flashd.daemon.conversions import Conversions
from flashd.daemon.dismissals import Dismissals
from flashd.daemon.doorman import Doorman
from flashd.daemon.driver_usage import DriverUsage
from flashd.daemon.endpoint import EndpointLink, RuntimeFolder
from flashd.daemon.engine_stats import EngineStatsBook
from flashd.daemon.errands import Errands
from flashd.daemon.exports import EVERYBODY, Caller, ObjectTree
from flashd.daemon.imports import Imports
from flashd.daemon.installations import Installations
from flashd.daemon.jobs import Job, Jobs, JobState, Owner
from flashd.daemon.journal import fields
from flashd.daemon.limits import Limits, Scarce
from flashd.daemon.models import Models
from flashd.daemon.newcomers import Newcomers
from flashd.daemon.ownership import Ownership, group_id
from flashd.daemon.parts import Parts
from flashd.daemon.polkit import Polkit
from flashd.daemon.presence import Presence
from flashd.daemon.pressure import Pressure
from flashd.daemon.pulls import Pulls
from flashd.daemon.service_manager import EngineKeeper, FdStore, ServiceManager
from flashd.daemon.serving import Serving
from flashd.daemon.settings import Settings
from flashd.daemon.shared_images import SharedImages
from flashd.daemon.stalls import Stalls
from flashd.daemon.survivors import Survivors
from flashd.daemon.threads import Background
from flashd.daemon.watchdog import Watchdog
from flashd.engines import process
from flashd.engines.engine import EngineFactory
from flashd.engines.environments import Environments
from flashd.engines.vllm.factory import VllmFactory
from flashd.engines.vllm.factory import environment as vllm_environment
from flashd.errors import Busy, FlashdError, Unavailable
from flashd.memory.arena import Arena, HostArena
from flashd.memory.device import CudaDevice, Device, HostDevice, Kind, simulated_device, usable
from flashd.memory.lease import Lease, LeaseBook
from flashd.memory.moving import StreamMover
from flashd.memory.place import Place
from flashd.memory.residency import Memory, Residency
from flashd.store.catalog import Catalog, Model
from flashd.store.inbox import Inbox
from flashd.streamer import Backend, Options, TransferResult
from flashd.supply import Supplier, Target
from flashd.swap import Policy, Swapper
from flashd.units import format_bytes

log = logging.getLogger(__name__)

_POLICY_S = 5.0  # a bus that has just been given our policy reads it by then


async def run(settings: Settings, address: str, stop: asyncio.Event) -> None:
    """Runs the daemon until `stop` is set, somebody calls Stop, or the bus goes away (raises Unavailable).

    Raises Busy or AlreadyExists if another daemon has the store, the runtime folder or the name.
    """
    config = settings.current
    is_shared = address == "system"  # the machine's daemon serves all its users; any other serves one
    async with contextlib.AsyncExitStack() as stack:
        connection = await connect(address)
        stack.push_async_callback(connection.close)
        manager = ServiceManager(configuration.notify_socket())
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
        survivors = Survivors(fd_store, engine_keeper, left)
        service = Service(connection, address, settings, catalog, runtime, survivors, authority, stop)
        stack.push_async_callback(service.close)
        await service.start()
        manager.tell("READY=1")
        watchdog = Watchdog(manager, configuration.watchdog_s(), service.summary, service.ailment)
        stack.push_async_callback(watchdog.close)
        watchdog.start()
        log.info("ready on %s as %s", address, wire.BUS_NAME)
        await service.ended()
        manager.tell("STOPPING=1")


class Service:
    """The daemon's parts, and what each must hear of the others."""

    def __init__(
        self,
        connection: Connection,
        address: str,
        settings: Settings,
        catalog: Catalog,
        runtime: RuntimeFolder,
        survivors: Survivors,
        authority: Authority,
        stop: asyncio.Event,
    ) -> None:
        config = settings.current
        self._stalls = Stalls(lambda: settings.current.streamer.stall_timeout_s)
        options = streamer_options(config, self._stalls)
        self._connection = connection
        self._settings = settings
        self._stop = stop
        self._is_warm = False
        self._ourselves = Owner(peer="", uid=os.getuid())
        self._authority = authority
        self._callers: dict[str, Caller] = {}
        self._background = Background()
        self._catalog = catalog
        self._limits = Limits(lambda: settings.current.limits)
        self._ownership = Ownership(
            catalog, authority, own_uid=os.getuid(), private_group=group_id(config.store.private_group)
        )
        self._jobs = Jobs(
            on_change=self._job_changed,
            on_forget=self._job_forgotten,
            check_room=functools.partial(self._limits.check, Scarce.JOBS),
        )
        self._environments = Environments(settings.paths.state / "environments")
        self._installations = Installations(self._environments, self._jobs, on_change=self._environment_changed)
        conversions = Conversions(
            catalog, options=options, python=lambda: self._python("torch"), on_published=self._model_published
        )
        self._imports = Imports(catalog, self._jobs, conversions, self._limits, self._ownership)
        self._errands = Errands(address, self._background, is_shared=address == "system")
        self._pulls = Pulls(catalog, self._jobs, conversions, self._limits, self._ownership, self._errands.send)
        self._arrivals = Arrivals(
            catalog,
            self._jobs,
            conversions,
            Dismissals(settings.paths.state / "dismissed.toml"),
            owner=self._ourselves,
            private=config.inbox.private,
            audience=self._ownership.private_to(os.getuid()) if config.inbox.private else EVERYBODY,
            on_change=self._inbox_changed,
            on_source_removed=self._source_removed,
        )
        self._inbox = Inbox(
            config.inbox.folders, self._arrivals, settle_s=config.inbox.settle_s, rescan_s=config.inbox.rescan_s
        )
        self._survivors = survivors
        self._runtime = runtime
        self._endpoint = EndpointLink(runtime.endpoint, runtime.shared_mode)
        self._mover = StreamMover(
            options, verify=config.streamer.verify, staging_bytes=config.streamer.staging_bytes, on_loaded=_log_load
        )
        self._residency = Residency(
            memories(config.memory),
            self._mover,
            is_pinned=self._is_pinned,
            on_change=self._checkpoint_changed,
            on_host_resident=self._register,
            keeper=survivors.arenas,
        )
        self._leases = LeaseBook(on_end=self._lease_ended)
        self._factories = engine_factories(
            config, runtime, settings, self._residency, survivors, self._python, is_shared=address == "system"
        )
        self._supplier = supplier = Supplier(self._residency, self._factories, catalog.images, on_made=self._image_made)
        self._swapper = Swapper(
            supplier,
            self._factories,
            self._endpoint,
            Policy(config.engines.drain_timeout_s, config.engines.max_parked),
            on_change=self._swapper_changed,
            on_lost=self._engine_lost,
        )
        self._newcomers = Newcomers(self._make_ready, is_idle=self._is_idle)
        self._serving = Serving(
            catalog,
            self._residency,
            supplier,
            self._swapper,
            self._leases,
            self._jobs,
            self._background,
            endpoint=runtime.endpoint,
            engine_kind=config.engines.default,
            model_config=self._model_config,
            is_present=connection.is_present,
            on_leased=self._lease_began,
            on_used=self._model_changed,
            on_asked=self._newcomers.asked,
            on_rest=self._model_rests,
            limits=self._limits,
            ownership=self._ownership,
        )
        self._doorman = Doorman(runtime.doorman, runtime.shared_mode, lambda: self._serving.woken(self._ourselves))
        self._models = Models(
            catalog,
            self._residency,
            self._jobs,
            self._background,
            options=options,
            is_wanted=self._serving.is_wanted,
            on_change=self._model_changed,
            on_audience_change=self._audience_changed,
            on_remove=self._model_removed,
            audience_of=self._ownership.audience_of,
        )
        self._engine_stats = EngineStatsBook(
            self._swapper,
            idle_timeout_s=self._idle_timeout_s,
            device_bytes=self._device_bytes,
            on_change=self._engine_changed,
            on_idle=self._park_idle,
        )
        self._pressure = Pressure(self._swapper, spare_bytes=lambda: settings.current.engines.spare_bytes)
        parts = Parts(
            settings=settings,
            authority=authority,
            ownership=self._ownership,
            catalog=catalog,
            jobs=self._jobs,
            imports=self._imports,
            pulls=self._pulls,
            installations=self._installations,
            arrivals=self._arrivals,
            models=self._models,
            residency=self._residency,
            leases=self._leases,
            swapper=self._swapper,
            driver_usage=DriverUsage(self._background, self._device_changed),
            serving=self._serving,
            shared_images=SharedImages(
                catalog,
                self._residency,
                self._leases,
                self._limits,
                own_uid=os.getuid(),
                is_present=connection.is_present,
                on_leased=self._lease_began,
                on_made=self._image_made,
            ),
            engine_kinds=tuple(self._factories),
            engine_stats=self._engine_stats,
            endpoint=runtime.endpoint,
            stop=stop.set,
            is_stopping=stop.is_set,
        )
        tree = ObjectTree(
            connection,
            identify=self._identify,
            authorize=self._authorize,
            watchers=self._callers.values,
            check_calls=functools.partial(self._limits.check, Scarce.CALLS),
        )
        self._presence = Presence(tree, parts)

    async def start(self) -> None:
        """Appears on the bus, complete; then begins to look into the inbox."""
        await self._survivors.take_over_memory(self._catalog, self._residency)
        self._presence.appear()
        resting, active = self._runtime.resting, self._runtime.active
        await self._survivors.take_over_engines(
            self._catalog, self._factories, self._swapper, self._supplier, None if resting else active
        )
        if resting:
            self._rest_on(*resting)
        await self._connection.watch_peers(self._peer_left)
        await self._doorman.open()
        await self._connection.own(wire.BUS_NAME, patience_s=_POLICY_S)
        if self._catalog.models():
            self._warm_up()
        self._background.start(self._presence.prepare())
        self._engine_stats.start()
        self._newcomers.start()
        self._pressure.start()
        self._inbox.start()
        self._models.collect_soon()
        self._background.start(self._installations.clean_up())
        self._background.start(self._prewarm())

    async def ended(self) -> None:
        """Returns when somebody asked us to stop. Raises Unavailable if the bus went away."""
        lost = asyncio.create_task(self._connection.closed())
        asked = asyncio.create_task(self._stop.wait())
        await asyncio.wait({lost, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not self._stop.is_set():
            asked.cancel()
            raise Unavailable("the bus went away", hint="the service manager starts flashd again")
        lost.cancel()

    def summary(self) -> str:
        """One line for `systemctl status`."""
        active = self._swapper.active
        is_public = active is not None and self._ownership.is_public(active.target.model_name)
        name = active.target.model_name if active and is_public else "a private one"
        answering = f"{name} answers" if active else "none is active"
        return f"{len(self._catalog.models())} models, {answering}"

    def ailment(self) -> str:
        """What only a new daemon can mend; empty if nothing."""
        return self._stalls.found()

    async def close(self) -> None:
        """Ends everything in the order in which it needs each other."""
        self._stop.set()
        self._presence.manager_changed()
        await self._inbox.close()
        await self._newcomers.close()
        await self._jobs.close()
        await self._engine_stats.close()
        await self._pressure.close()
        await self._doorman.close()
        is_unfinished = await self._survivors.close()
        self._runtime.has_engines = await self._swapper.close() or is_unfinished
        for factory in self._factories.values():
            await factory.close()
        for lease in self._leases.all():
            self._leases.release(lease.number)
        await self._residency.stop()  # before the background: what is loaded there begins to be registered
        await self._background.close()
        await self._residency.end()
        self._presence.close()

    async def _prewarm(self) -> None:
        """Makes ready what transfers to GPUs need, then what the configuration wants active or warm."""
        memory = self._settings.current.memory
        for place in dict.fromkeys(self._residency.places.values()):
            if place.device.kind in {Kind.CUDA, Kind.SIMULATED}:
                with _logged(f"staging memory of {place.name}"):
                    await self._mover.prepare(place.device)
        if (first := self._settings.current.engines.prewarm) and self._swapper.active is None:
            with _logged(f"engines.prewarm: {first}"):
                self._serving.swap(self._catalog.resolve(first), self._ourselves)
        for name in memory.prewarm:
            with _logged(f"memory.prewarm: {name}"):
                model = self._catalog.resolve(name)
                # What is warm already was used, and by whom we do not know; what is only expected takes nobody's place.
                self._serving.load(model, self._ourselves, memory.prewarm_tier, may_evict=False)

    def _register(self, arena: Arena) -> None:
        """A host arena becomes known to the GPUs while nobody waits for it."""
        for place in self._residency.places.values():
            if place.device.kind is Kind.CUDA and isinstance(arena, HostArena):
                self._background.start(self._mover.register(arena, place.device))

    async def _identify(self, peer: str) -> Caller:
        if peer not in self._callers:
            who = await self._connection.credentials(peer)
            caller = Caller(peer, who.uid, gids=who.gids)
            if not self._connection.is_present(peer):
                return caller
            self._callers[peer] = caller
        return self._callers[peer]

    async def _authorize(self, caller: Caller, interface: str, member: str) -> None:
        if self._stop.is_set():
            raise Busy("the daemon is stopping", hint="start it again: flash start")
        await authorize(self._authority, caller, interface, member)

    def _peer_left(self, peer: str) -> None:
        self._callers.pop(peer, None)
        self._imports.peer_left(peer)
        self._pulls.peer_left(peer)
        self._installations.peer_left(peer)
        self._serving.peer_left(peer)

    def _job_changed(self, job: Job) -> None:
        self._presence.job_changed(job)
        if job.kind in {"import", "pull"}:
            self._warm_up()
        if job.finished:
            self._imports.ended(job)
            self._pulls.ended(job)
            self._errands.ended(job)
            self._installations.ended(job)
            self._arrivals.ended(job)
            self._serving.ended(job)

    def _job_forgotten(self, job: Job) -> None:
        self._presence.job_forgotten(job)

    def _model_published(self, model: Model) -> None:
        about = fields(model=model.name, size_bytes=model.size_bytes)
        log.info("%s is a model: %s", model.name, format_bytes(model.size_bytes), extra=about)
        self._presence.model_published(model)
        self._models.collect_soon()
        self._background.start(self._arrivals.look_for_bases())
        if self._settings.current.engines.warm_new:
            self._newcomers.arrived(model.name)

    def _model_rests(self, target: Target) -> None:
        self._runtime.note_resting(target.model_name, target.engine_kind)
        self._endpoint.point_to(self._runtime.doorman)

    def _rest_on(self, model_name: str, engine_kind: str) -> None:
        try:
            self._serving.rests_on(model_name, engine_kind if engine_kind in self._factories else "")
        except FlashdError as error:
            log.info("%s rests no longer: %s", model_name, error.message)
            self._endpoint.point_to(None)

    async def _make_ready(self, name: str) -> Job | None:
        model, tier = self._catalog.resolve(name), self._settings.current.memory.prewarm_tier
        return await self._serving.warm_up(model, self._ourselves, tier)

    def _is_idle(self) -> bool:
        """Whether nobody asks a model, or waits for anything that needs the disk or an engine."""
        active = self._swapper.active
        is_asked = active is not None and self._engine_stats.of(active.engine.number).active_requests > 0
        return not is_asked and not any(
            job.state in {JobState.QUEUED, JobState.RUNNING} and job.kind in {"swap", "park", "load", "import"}
            for job in self._jobs
        )

    def _warm_up(self) -> None:
        """As soon as there is a model, or about to be one, somebody may want it to answer."""
        if self._settings.current.engines.warm_up and not self._is_warm:
            self._is_warm = True
            self._factories[self._settings.current.engines.default].begin()

    def _model_changed(self, name: str) -> None:
        self._presence.model_changed(name)
        self._background.start(self._arrivals.look_for_bases())  # it may have been given the name of one

    def _audience_changed(self, name: str) -> None:
        self._presence.audience_changed(name)

    def _model_removed(self, model: Model) -> None:
        self._presence.model_removed(model.name)
        self._arrivals.dismiss(model)

    def _source_removed(self, name: str) -> None:
        if self._settings.current.inbox.on_remove == "remove":
            self._background.start(self._models.remove(name))

    def _inbox_changed(self) -> None:
        if self._arrivals.shown():
            self._warm_up()
        self._presence.manager_changed()

    def _python(self, kind: str) -> str:
        return configuration.engine_python(self._settings.current, kind, self._environments.interpreter(kind))

    async def _environment_changed(self, kind: str) -> None:
        """Engines that run stay as they are; the next one is of the new environment."""
        await self._factories[kind].run_in(self._python(kind))
        if self._is_warm and kind == self._settings.current.engines.default:
            self._factories[kind].begin()

    def _model_config(self, model: Model) -> ModelConfig:
        return self._settings.current.model(model.name, *model.aliases)

    def _is_pinned(self, checkpoint_id: str) -> bool:
        return self._models.is_pinned(checkpoint_id)

    def _image_made(self, image: Checkpoint, place: Place) -> None:
        self._background.start(self._save_image(image, place))

    async def _save_image(self, image: Checkpoint, place: Place) -> None:
        """Behind the user's back: the next load of it is one transfer, also after a restart."""
        with _logged(f"the image {image.id[:12]}"):
            if image.manifest.data_bytes > self._catalog.free_bytes() // 2:
                log.info("the image %s is not stored: models need the room that is left", image.id[:12])
                return
            hold = await place.borrow(image, lambda done, total: None, is_use=False)
            if hold is None:
                return  # it had to make way already
            with hold, self._catalog.images.draft(image) as draft:
                table = await self._mover.save(hold.region, image.extent, draft.file)
                await asyncio.to_thread(draft.publish, table)

    def _checkpoint_changed(self, form: str) -> None:
        checkpoint_id = self._catalog.checkpoint_of(form)
        self._presence.checkpoint_changed(checkpoint_id)
        if not self._residency.holds(checkpoint_id) and not self._stop.is_set():
            self._models.collect_if_unused(checkpoint_id)

    def _lease_began(self, lease: Lease) -> None:
        self._presence.lease_began(lease)

    def _lease_ended(self, lease: Lease) -> None:
        self._presence.lease_ended(lease)

    def _swapper_changed(self) -> None:
        self._serving.swap_progressed()
        self._engine_stats.note_activity()
        self._presence.engines_changed()

    def _device_bytes(self) -> Mapping[int, int]:
        """What each process has of all GPUs."""
        found: Counter[int] = Counter()
        for place in dict.fromkeys(self._residency.places.values()):
            if place.device.gpu is not None:
                found.update(cuda.process_bytes(place.device.gpu))
        return found

    def _device_changed(self, name: str) -> None:
        self._presence.device_changed(name)

    def _engine_changed(self, number: int) -> None:
        self._presence.engine_changed(number)

    def _engine_lost(self, target: Target) -> None:
        if not self._stop.is_set():
            self._serving.engine_lost(target, self._ourselves)

    def _idle_timeout_s(self, target: Target) -> float:
        chosen = self._settings.current.model(*target.names).idle_timeout_s
        return self._settings.current.engines.idle_timeout_s if chosen == "default" else chosen

    def _park_idle(self, target: Target) -> None:
        is_evicted = self._settings.current.engines.on_idle == "evict" and not self._is_pinned(target.checkpoint.id)
        self._serving.rest(target, self._ourselves, evict=is_evicted)


def streamer_options(config: Config, stalls: Stalls) -> Options:
    chosen = config.streamer
    return Options(
        block_bytes=chosen.block_bytes,
        depth=chosen.depth,
        backend=Backend(chosen.backend),
        direct=chosen.direct,
        on_start=stalls.started,
    )


def memories(config: MemoryConfig) -> list[Memory]:
    """The machine's memories, the host's first, and what weights may take of each."""
    host = HostDevice.probe(use_huge_pages=config.huge_pages == "auto")
    gpus = usable(cuda.gpus())
    unified = next(
        (gpu for gpu in gpus if config.unified is True or (config.unified == "auto" and gpu.is_unified)), None
    )
    if unified:
        host = dataclasses.replace(host, kind=Kind.UNIFIED, gpu=unified)
    found = [Memory(host, config.host_budget_bytes or host.default_budget_bytes())]
    cards: list[Device] = [CudaDevice(gpu, config.device_reserve_bytes) for gpu in gpus if not unified]
    if config.simulated_device_bytes:
        cards.append(simulated_device(config.simulated_device_bytes, host))
    return found + [Memory(card, config.device_budget_bytes or card.default_budget_bytes()) for card in cards]


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except (FlashdError, OSError) as error:
        log.warning("%s: %s", what, error)


def engine_factories(
    config: Config,
    runtime: RuntimeFolder,
    settings: Settings,
    residency: Residency,
    survivors: Survivors,
    python: Callable[[str], str],
    *,
    is_shared: bool,
) -> dict[str, EngineFactory]:
    """Whatever makes engines, by the kind they are of; `python` names the interpreter of a kind. Those of a daemon that
    is shared run in units of their own, if there are such."""
    paths, engines = settings.paths, config.engines
    service = configuration.ENGINE_SOCKET if is_shared and configuration.ENGINE_SOCKET.is_socket() else None
    state = configuration.ENGINE_STATE if service else paths.state
    ours = process.Settings(
        python=python("torch"),
        runtime=runtime.path,
        logs=paths.state / "logs",
        threads=engines.torch.threads,
        max_tokens_default=engines.torch.max_tokens_default,
        start_timeout_s=engines.start_timeout_s,
        environment=configuration.for_engines(),
        numbers=survivors.numbers,
        keeper=survivors.engines,
        service=service,
    )
    vllm = dataclasses.replace(
        ours,
        python=python("vllm"),
        environment={
            **ours.environment,
            **vllm_environment(state / "compiled"),
            **configuration.variables(engines.vllm.environment, "engines.vllm.environment"),
        },
        options={
            "arguments": list(engines.vllm.arguments),
            "adapters": list(engines.vllm.adapters),
            "kv_cache_bytes": engines.vllm.kv_cache_bytes,
        },
    )
    gpus = [place.device.gpu for place in dict.fromkeys(residency.places.values()) if place.device.gpu is not None]
    return {factory.kind: factory for factory in (process.torch_factory(ours), VllmFactory(vllm, gpus))}


def _log_load(checkpoint: Checkpoint, result: TransferResult) -> None:
    rate = result.size_bytes / max(result.seconds, 1e-9) / 1e9
    how = f"{result.backend}, {'direct' if result.direct else 'buffered'}"
    fallback = f"; {result.fallback}" if result.fallback else ""
    log.info(
        "loaded %s, %s at %.2f GB/s (%s%s)",
        checkpoint.id[:12],
        format_bytes(result.size_bytes),
        rate,
        how,
        fallback,
        extra=fields(size_bytes=result.size_bytes, seconds=result.seconds),
    )
