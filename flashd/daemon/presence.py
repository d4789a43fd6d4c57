# SPDX-License-Identifier: Apache-2.0
"""Which objects are on the bus? They come, change and go with the parts behind them."""

from __future__ import annotations

from flashd import wire
from flashd.daemon.exports import ObjectTree
from flashd.daemon.jobs import Job
from flashd.daemon.objects import DeviceObject, EngineObject, JobObject, LeaseObject, ManagerObject, ModelObject
from flashd.daemon.parts import Parts
from flashd.memory.lease import Lease
from flashd.store.catalog import Model


class Presence:
    """Hears of every change and puts it on the bus."""

    def __init__(self, tree: ObjectTree, parts: Parts) -> None:
        self._tree = tree
        self._parts = parts
        self._manager = ManagerObject(parts)
        self._devices = [DeviceObject(parts, name) for name in parts.residency.places]
        self._jobs: dict[int, JobObject] = {}
        self._engines: set[int] = set()
        self._active = ""

    def appear(self) -> None:
        """Puts everything that is there on the tree, before we have our name on the bus."""
        self._tree.add(self._manager, announce=False)
        for device in self._devices:
            self._tree.add(device, announce=False)
        for model in self._parts.catalog.models():
            self._tree.add(ModelObject(self._parts, model.name), announce=False)

    async def prepare(self) -> None:
        await self._tree.prepare()

    def close(self) -> None:
        """Tells what was not told yet."""
        self._tree.flush()

    def manager_changed(self) -> None:
        self._tree.changed(wire.ROOT_PATH)

    def model_published(self, model: Model) -> None:
        path = wire.model_path(model.name)
        if self._tree.get(path) is None:
            self._tree.add(ModelObject(self._parts, model.name))
        elif self._tree.last_sent(path)["Private"] != model.private:
            self.audience_changed(model.name)
        else:
            self._tree.changed(path)
        self._models_came_or_went()

    def model_changed(self, name: str) -> None:
        self._tree.changed(wire.model_path(name))
        self._devices_changed()  # a pinned model cannot be evicted

    def audience_changed(self, name: str) -> None:
        """A model became private, or ceased to be, and with it what speaks of it."""
        self.model_changed(name)
        paths = [wire.model_path(name)]
        paths += [wire.lease_path(lease.number) for lease in self._parts.leases.all() if lease.model_name == name]
        paths += [wire.engine_path(s.engine.number) for s in self._parts.swapper.seats if s.target.model_name == name]
        for path in paths:
            self._tree.audience_changed(path)
        self.manager_changed()

    def model_removed(self, name: str) -> None:
        self._tree.remove(wire.model_path(name))
        self._models_came_or_went()

    def checkpoint_changed(self, checkpoint_id: str) -> None:
        """Its tier, or who holds it."""
        self._devices_changed()
        for model in self._parts.catalog.models():
            if model.checkpoint_id == checkpoint_id:
                self.model_changed(model.name)

    def job_changed(self, job: Job) -> None:
        shown = self._jobs.get(job.number)
        if shown is None:
            shown = self._jobs[job.number] = JobObject(self._parts, job)
            self._tree.add(shown)
            return
        self._tree.changed(shown.path)
        if job.finished:
            self._tree.signal(shown, "Finished", job.state.value, dict(job.result), shown.error())

    def job_forgotten(self, job: Job) -> None:
        self._tree.remove(self._jobs.pop(job.number).path)

    def lease_began(self, lease: Lease) -> None:
        self._tree.add(LeaseObject(self._parts, lease))

    def lease_ended(self, lease: Lease) -> None:
        self._tree.remove(wire.lease_path(lease.number))

    def device_changed(self, name: str) -> None:
        """On unified memory two names mean one device."""
        place = self._parts.residency.places[name]
        for other in (other for other, same in self._parts.residency.places.items() if same is place):
            self._tree.changed(wire.device_path(other))

    def engine_changed(self, number: int) -> None:
        self._tree.changed(wire.engine_path(number))

    def engines_changed(self) -> None:
        """Engines came, went, or changed what they hold; another model may be the active one."""
        seats = {seat.engine.number: seat for seat in self._parts.swapper.seats}
        for number in self._engines - seats.keys():
            self._tree.remove(wire.engine_path(number))
        for number in seats.keys() - self._engines:
            self._tree.add(EngineObject(self._parts, seats[number]))
        for number in seats.keys() & self._engines:
            self.engine_changed(number)
        self._engines = set(seats)
        active = self._parts.swapper.active
        name = active.target.model_name if active else ""
        for changed in {name, self._active} - {""}:
            self.model_changed(changed)
        self._active = name
        self.manager_changed()

    def _devices_changed(self) -> None:
        for device in self._devices:
            self._tree.changed(device.path)

    def _models_came_or_went(self) -> None:
        """Leases and engines name their model only while it is there."""
        self.manager_changed()
        for lease in self._parts.leases.all():
            self._tree.changed(wire.lease_path(lease.number))
        for number in self._engines:
            self.engine_changed(number)
