# SPDX-License-Identifier: Apache-2.0
"""Swaps, evictions, engines, memory and the store, from the daemon's signals: no reader of metrics asks it anything.

What happens while the gateway is not connected is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flashd.client.client import Client
from flashd.client.results import (
    PROPERTY_NAMES,
    Device,
    Engine,
    Event,
    Model,
    Properties,
    Status,
    engine_from,
    name_of,
)
from flashd.dbus import wire
from flashd.gateway.metrics.measures import Measures

HOST = "host"
_ENDS = frozenset({"done", "failed", "cancelled"})
_SWAPS = frozenset({"swap", "serve"})


@dataclass(frozen=True, slots=True)
class Brought:
    """A job that had a model serve. Times are in seconds since the epoch; `phases` has the seconds in each."""

    kind: str
    how: str
    tier: str
    created_at: float
    finished_at: float
    phases: Mapping[str, float]


@dataclass(slots=True)
class _Job:
    """A job that has not ended."""

    kind: str
    subject: str
    created_at: float


class DaemonNews:
    """Follows the daemon for `measures`, from the follower's thread; its attributes may be read by any."""

    def __init__(self, measures: Measures) -> None:
        self._measures = measures
        self._jobs: dict[str, _Job] = {}  # by path
        self._tiers: dict[str, frozenset[str]] = {}  # that hold a model, by its path
        self._devices: dict[str, Device] = {}  # by path
        self._engines: dict[str, Engine] = {}  # by path
        self._brought: dict[str, Brought] = {}  # the last time, by model
        self.status: Status | None = None  # as it was last asked

    @property
    def devices(self) -> list[Device]:
        return list(self._devices.values())

    @property
    def engines(self) -> list[Engine]:
        """The engines, with the memory that each took when the daemon measured it last."""
        return list(self._engines.values())

    def last_brought(self, model: str) -> Brought | None:
        return self._brought.get(model)

    def began(self, client: Client) -> None:
        self._jobs.clear()
        self._devices = {device.path: device for device in client.devices()}
        self._engines = {engine.path: engine for engine in client.engines()}
        self._tiers = {model.path: tiers_of(model.devices) for model in client.models()}

    def listed(self, models: Mapping[str, Model], status: Status) -> None:
        self.status = status
        for gone in self._brought.keys() - models.keys():
            del self._brought[gone]

    def happened(self, event: Event) -> None:
        match event.interface:
            case wire.JOB:
                self._job(event)
            case wire.MODEL:
                self._model(event)
            case wire.DEVICE if event.path in self._devices:
                self._device(event)
            case wire.ENGINE:
                self._engine(event)

    def _device(self, event: Event) -> None:
        self._devices[event.path] = replace(self._devices[event.path], **_said(Device, event))

    def _engine(self, event: Event) -> None:
        if event.kind == "added":
            self._engines[event.path] = engine_from(event.path, event.properties)
        elif event.kind == "removed":
            self._engines.pop(event.path, None)
        elif (known := self._engines.get(event.path)) is not None:
            values = _said(Engine, event)
            if "model" in values:
                values["model"] = name_of(values["model"])
            self._engines[event.path] = replace(known, **values)

    def _model(self, event: Event) -> None:
        said, before = event.properties, self._tiers.get(event.path, frozenset())
        if event.kind == "removed":
            self._tiers.pop(event.path, None)
        elif "Devices" in said:
            self._tiers[event.path] = now = tiers_of(said["Devices"])
            if event.kind == "changed" and "Checkpoint" not in said:  # else it is a new version, not in memory yet
                for tier in before - now:
                    self._measures.evicted(tier)

    def _job(self, event: Event) -> None:
        said = event.properties
        if event.kind == "added":
            self._jobs[event.path] = _Job(said["Kind"], said["Subject"], said["CreatedAt"])
        if event.kind == "removed":
            self._jobs.pop(event.path, None)
        elif said.get("State") in _ENDS and (job := self._jobs.pop(event.path, None)) is not None:
            self._ended(job, said)

    def _ended(self, job: _Job, said: Properties) -> None:
        self._measures.job_ended(job.kind, said["State"])
        result = said.get("Result", {})
        if job.kind in _SWAPS and said["State"] == "done":
            how, tier, seconds = result["how"], result["from_tier"], result["seconds"]
            self._measures.swapped(how, tier, seconds)
            brought = Brought(job.kind, how, tier, job.created_at, said["FinishedAt"], result["phases"])
            self._brought[job.subject] = brought


def _said(kind: type, event: Event) -> dict[str, Any]:
    """The fields of a result that a signal says anew."""
    return {field: event.properties[name] for field, name in PROPERTY_NAMES[kind].items() if name in event.properties}


def tiers_of(devices: Iterable[str]) -> frozenset[str]:
    """The tiers in whose memory a model is that is on these devices."""
    return frozenset("host" if device == HOST else "device" for device in devices)
