# SPDX-License-Identifier: Apache-2.0
"""Dataclasses that the client returns: models, engines, devices, status and so on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from flashd.dbus import wire

T = TypeVar("T")
Properties = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Model:
    """Properties of a model at the time of the call. Times are in seconds since the epoch; 0 for never."""

    name: str
    aliases: tuple[str, ...]
    checkpoint: str
    architecture: str
    dtype: str
    size_bytes: int
    tensor_count: int
    residency: str
    devices: tuple[str, ...]
    active: bool
    pinned: bool
    leases: int
    created_at: int
    last_used_at: int
    use_count: int
    source: str
    path: str
    owner_uid: int = 0
    private: bool = False
    serving: bool = False
    context_length: int = 0
    adapters: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    format: str = "safetensors"


@dataclass(frozen=True, slots=True)
class Engine:
    """Properties of an inference process at the time of the call."""

    kind: str
    state: str
    model: str
    architecture: str
    endpoint: str
    pid: int
    active_requests: int
    memory_bytes: int
    device_bytes: int
    weights: str
    started_at: int
    path: str
    kv_cache_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Device:
    """Properties of the host's memory or a GPU, and of its pool, at the time of the call."""

    name: str
    kind: str
    model: str
    uuid: str
    total_bytes: int
    budget_bytes: int
    used_bytes: int
    leased_bytes: int
    driver_used_bytes: int
    huge_pages: str
    integrated: bool
    reads_host_pages: bool
    maps_memory: bool
    exports_memory: bool
    path: str


@dataclass(frozen=True, slots=True)
class Environment:
    """A Python environment for engines. `current` if new engines run in it; `fits` if it suits flashd's Python."""

    kind: str
    number: int
    version: str
    current: bool
    fits: bool
    size_bytes: int
    created_at: int


@dataclass(frozen=True, slots=True)
class InboxItem:
    """A source in the inbox that is not a model. Its state is settling, incomplete, converting, failed or unused."""

    name: str
    state: str
    detail: str


@dataclass(frozen=True, slots=True)
class Stray:
    """An entry of a models folder that is no source, and why: for example a folder without weights."""

    path: str
    why: str


@dataclass(frozen=True, slots=True)
class WatchedFolder:
    """The way the daemon notices changes in a models folder: `how` is "events", or "every 30 s" without events.

    `why_not` says why there are no events, with a remedy. `looked_at` is the time of the last scan, in seconds since
    the epoch; 0 for never.
    """

    folder: str
    how: str
    why_not: str
    looked_at: float


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with the daemon's state, and its remedy."""

    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Status:
    """State of the daemon at the time of the call.

    `active_model` and `resting_model` are names, empty for none. The resting model was parked because it was idle; the
    next request wakes it. `problems` are those that an administrator has to solve, such as a store that is not mounted
    or damaged files.
    """

    version: str
    state: str
    active_model: str
    endpoint: str
    models_directories: tuple[str, ...]
    store_path: str
    store_bytes: int
    store_quota_bytes: int
    store_free_bytes: int
    inbox_items: tuple[InboxItem, ...]
    problems: tuple[Problem, ...] = ()
    resting_model: str = ""
    inbox_watched: tuple[WatchedFolder, ...] = ()
    inbox_strays: tuple[Stray, ...] = ()
    default_engine: str = ""
    default_engine_reason: str = ""


@dataclass(frozen=True, slots=True)
class SwapOutcome:
    """Outcome of a swap. `how` is already-active, rebind, wake or start; `from_tier` is the weights' tier before."""

    model: str
    how: str
    from_tier: str
    seconds: float
    endpoint: str

    @classmethod
    def from_result(cls, result: Properties) -> SwapOutcome:
        """Converts the result of a swap's job."""
        name = name_of(result["model"])
        return cls(name, result["how"], result["from_tier"], result["seconds"], result["endpoint"])


@dataclass(frozen=True, slots=True)
class Event:
    """A change on the bus: an object was added, changed or removed, or a job finished."""

    kind: str
    path: str
    interface: str
    properties: Properties


def name_of(path: str) -> str:
    """Returns the name of the model with this object path; empty for the path /, which stands for none."""
    return wire.unescape(path.rsplit("/", 1)[-1]) if path != "/" else ""


def strays_of(found: Status) -> str:
    """Describes the entries of the models folders that are no models, in one line; empty if there are none."""
    has_one_folder = len(found.models_directories) == 1
    return ", ".join(
        f"{stray.path.rsplit('/', 1)[-1] if has_one_folder else stray.path} ({stray.why})"
        for stray in found.inbox_strays
    )


def model_from(path: str, found: Properties) -> Model:
    return _made(Model, found, path=path)


def engine_from(path: str, found: Properties) -> Engine:
    defaults = {"DeviceBytes": 0, "Weights": "", "KvCacheBytes": 0}  # an older daemon has none of them
    return _made(Engine, {**defaults, **found, "Model": name_of(found["Model"])}, path=path)


def device_from(path: str, found: Properties) -> Device:
    return _made(Device, found, path=path)


def status_from(found: Properties) -> Status:
    values = {
        **found,
        "ActiveModel": name_of(found["ActiveModel"]),
        "RestingModel": name_of(found.get("RestingModel", "/")),  # an older daemon has none of these four
        "InboxItems": [InboxItem(*each) for each in found["InboxItems"]],
        "Problems": [Problem(*each) for each in found.get("Problems", ())],
        "InboxWatched": [WatchedFolder(*each) for each in found.get("InboxWatched", ())],
        "InboxStrays": [Stray(*each) for each in found.get("InboxStrays", ())],
    }
    return _made(Status, values)


def _made(kind: type[T], found: Properties, **others: object) -> T:
    """Makes a result whose fields are an object's properties, and `others`. Properties without a field are left out."""
    values = {field: found[name] for field, name in PROPERTY_NAMES[kind].items() if name in found}
    return kind(**{field: tuple(v) if isinstance(v, list) else v for field, v in values.items()}, **others)


def _property_name(field: str) -> str:
    return "DType" if field == "dtype" else "".join(word.capitalize() for word in field.split("_"))


# Of each result, the property of the bus that a field shows: `size_bytes` → `SizeBytes`.
PROPERTY_NAMES: Mapping[type, Mapping[str, str]] = {
    kind: {field: _property_name(field) for field in kind.__annotations__ if field != "path"}
    for kind in (Model, Engine, Device, Status)
}
