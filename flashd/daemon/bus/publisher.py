# SPDX-License-Identifier: Apache-2.0
"""Adds, updates and removes the objects on the bus as the daemon's state changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashd.daemon.bus.manager import ManagerObject
from flashd.daemon.bus.objects import DeviceObject, EngineObject, JobObject, LeaseObject, ModelObject
from flashd.daemon.events import Events
from flashd.daemon.job import Job
from flashd.dbus import wire
from flashd.dbus.object_tree import ObjectTree
from flashd.memory.lease import Lease, LeaseBook
from flashd.memory.residency import Residency
from flashd.store.catalog import Catalog, Model
from flashd.swap.slots import EngineSlot
from flashd.swap.swapper import Swapper


@dataclass(frozen=True, slots=True)
class Objects:
    """Constructors for each kind of object."""

    model: Callable[[str], ModelObject]
    job: Callable[[Job], JobObject]
    lease: Callable[[Lease], LeaseObject]
    engine: Callable[[EngineSlot], EngineObject]


class Publisher:
    """Subscribes to all events and announces changes on the bus."""

    def __init__(
        self,
        tree: ObjectTree,
        manager: ManagerObject,
        devices: Sequence[DeviceObject],
        objects: Objects,
        catalog: Catalog,
        residency: Residency,
        leases: LeaseBook,
        swapper: Swapper,
        events: Events,
    ) -> None:
        self._tree = tree
        self._manager = manager
        self._devices = devices
        self._objects = objects
        self._catalog = catalog
        self._residency = residency
        self._leases = leases
        self._swapper = swapper
        self._jobs: dict[int, JobObject] = {}
        self._engines: set[int] = set()
        self._active = ""
        self._serving: set[str] = set()
        self._subscribe(events)

    def _subscribe(self, events: Events) -> None:
        events.job_changed.subscribe(self._job_changed)
        events.job_forgotten.subscribe(self._job_forgotten)
        events.model_published.subscribe(self._model_published)
        events.model_changed.subscribe(self._model_changed)
        events.audience_changed.subscribe(self._audience_changed)
        events.model_removed.subscribe(self._model_removed)
        events.checkpoint_changed.subscribe(self._checkpoint_changed)
        events.lease_began.subscribe(lambda lease: self._tree.add(self._objects.lease(lease)))
        events.lease_ended.subscribe(lambda lease: self._tree.remove(wire.lease_path(lease.number)))
        events.device_changed.subscribe(self._device_changed)
        events.engines_changed.subscribe(self._engines_changed)
        events.engine_changed.subscribe(self._engine_changed)
        events.rest_began.subscribe(lambda target: self._manager_changed())
        events.inbox_changed.subscribe(lambda has_any: self._manager_changed())
        events.default_engine_changed.subscribe(self._abilities_changed)
        events.settings_changed.subscribe(self._abilities_changed)
        for event in (events.rest_ended, events.problems_changed, events.manager_changed):
            event.subscribe(self._manager_changed)

    def appear(self) -> None:
        """Adds all existing objects to the tree, before we acquire our bus name."""
        self._tree.add(self._manager, announce=False)
        for device in self._devices:
            self._tree.add(device, announce=False)
        for model in self._catalog.models():
            self._tree.add(self._objects.model(model.name), announce=False)

    async def prepare(self) -> None:
        await self._tree.prepare()

    def close(self) -> None:
        """Announces pending changes."""
        self._tree.flush()

    def _manager_changed(self) -> None:
        self._tree.changed(wire.ROOT_PATH)

    def _abilities_changed(self) -> None:
        """Handles that other kinds of engine may be meant, or other arguments: what models can do depends on them."""
        self._manager_changed()
        for model in self._catalog.models():
            self._tree.changed(wire.model_path(model.name))

    def _model_published(self, model: Model) -> None:
        path = wire.model_path(model.name)
        if self._tree.get(path) is None:
            self._tree.add(self._objects.model(model.name))
        elif self._tree.last_sent(path)["Private"] != model.private:
            self._audience_changed(model.name)
        else:
            self._tree.changed(path)
        self._models_came_or_went()

    def _model_changed(self, name: str) -> None:
        self._tree.changed(wire.model_path(name))
        self._devices_changed()  # a pinned model cannot be evicted

    def _audience_changed(self, name: str) -> None:
        """Handles that a model became private or public, with all objects that refer to it."""
        self._model_changed(name)
        paths = [wire.model_path(name)]
        paths += [wire.lease_path(lease.number) for lease in self._leases.all() if lease.model_name == name]
        paths += [wire.job_path(number) for number, shown in self._jobs.items() if shown.subject == name]
        paths += [wire.engine_path(s.engine.number) for s in self._swapper.slots if s.target.model_name == name]
        for path in paths:
            self._tree.audience_changed(path)
        self._manager_changed()

    def _model_removed(self, model: Model) -> None:
        self._tree.remove(wire.model_path(model.name))
        self._models_came_or_went()

    def _checkpoint_changed(self, form: str) -> None:
        """Announces a change of a checkpoint's tier or holds."""
        checkpoint_id = self._catalog.checkpoint_of(form)
        self._devices_changed()
        for model in self._catalog.models():
            if model.checkpoint_id == checkpoint_id:
                self._model_changed(model.name)

    def _job_changed(self, job: Job) -> None:
        shown = self._jobs.get(job.number)
        if shown is None:
            shown = self._objects.job(job)
            self._tree.add(shown)
            self._jobs[job.number] = shown
            return
        self._tree.changed(shown.path)
        if job.finished:
            self._tree.signal(shown, "Finished", job.state.value, dict(job.result), shown.error())

    def _job_forgotten(self, job: Job) -> None:
        self._tree.remove(self._jobs.pop(job.number).path)

    def _device_changed(self, name: str) -> None:
        """Announces a device under all its names, of which unified memory has two."""
        cache = self._residency.caches[name]
        for other in (other for other, same in self._residency.caches.items() if same is cache):
            self._tree.changed(wire.device_path(other))

    def _engine_changed(self, number: int) -> None:
        self._tree.changed(wire.engine_path(number))

    def _engines_changed(self) -> None:
        """Handles that engines were added, removed or rebound, and that another model may be active."""
        slots = {slot.engine.number: slot for slot in self._swapper.slots}
        for number in self._engines - slots.keys():
            self._tree.remove(wire.engine_path(number))
        for number in slots.keys() - self._engines:
            self._tree.add(self._objects.engine(slots[number]))
        for number in slots.keys() & self._engines:
            self._engine_changed(number)
        self._engines = set(slots)
        active = self._swapper.slots.active
        name = active.target.model_name if active else ""
        serving = {slot.target.model_name for slot in self._swapper.slots.serving}
        for changed in ({name, self._active} - {""}) | (serving ^ self._serving):
            self._model_changed(changed)
        self._active, self._serving = name, serving
        self._manager_changed()

    def _devices_changed(self) -> None:
        for device in self._devices:
            self._tree.changed(device.path)

    def _models_came_or_went(self) -> None:
        """Updates leases and engines, which refer to their model only while it exists."""
        self._manager_changed()
        for lease in self._leases.all():
            self._tree.changed(wire.lease_path(lease.number))
        for number in self._engines:
            self._engine_changed(number)
