# SPDX-License-Identifier: Apache-2.0
"""What each tier of memory holds, as bars to scale show it: arithmetic over what the daemon says of its objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from flashd.client.results import Device, Engine, Model, Status

HOST, STORE, STORED = "host", "store", "stored"
_MOST_PARTS = 60  # of one kind in a tier; the smallest are shown as one
# Held weights first, then what would make way, so that a bar reads from fixed to movable.
_ORDER = {"serving": 0, "leased": 1, "pinned": 2, "": 3}


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a tier.

    `kind` is weights, cache (an engine's KV cache), engine (what else an engine takes: on a GPU context, code and
    graphs), more (images, and models that the caller may not see) or others (other programs). `held` says why weights
    do not make way (serving, leased or pinned; stored, in the store), or the state of an engine; it is empty for
    weights that would. `count` is how many small parts this one stands for.
    """

    kind: str
    size_bytes: int
    model: str = ""
    held: str = ""
    count: int = 1


@dataclass(frozen=True, slots=True)
class Tier:
    """A device's memory, or the store. `is_shared` is whether a GPU uses the host's memory, which is then one tier.

    `budget_bytes` is the most that flashd's pool takes of `total_bytes`; the rest is the reserve. `used_bytes` is
    flashd's own count.
    """

    name: str
    kind: str
    product: str
    total_bytes: int
    budget_bytes: int
    used_bytes: int
    parts: tuple[Part, ...]
    is_shared: bool = False


def tiers(
    models: Sequence[Model], engines: Sequence[Engine], devices: Sequence[Device], status: Status | None
) -> list[Tier]:
    """The tiers, fastest first. What `models` and `engines` leave out counts as `more` or `others`."""
    gpus = [device for device in devices if device.name != HOST]
    is_shared = any(device.kind == "unified" for device in gpus)
    found = [_gpu(device, gpus, models, engines) for device in gpus]
    found += [_host(device, models, engines) for device in devices if device.name == HOST and not is_shared]
    return [*found, *([_store(status, models)] if status is not None else [])]


def _gpu(device: Device, gpus: Sequence[Device], models: Sequence[Model], engines: Sequence[Engine]) -> Tier:
    parts = list(_weights(device, models))
    for engine in engines:
        if _place(engine, models, gpus) != device.name:
            continue
        model = next((each for each in models if each.name == engine.model), None)
        mapped_bytes = model.size_bytes if model and engine.state == "serving" and device.name in model.devices else 0
        own_bytes = engine.device_bytes - mapped_bytes - engine.kv_cache_bytes
        parts.append(Part("cache", engine.kv_cache_bytes, engine.model, engine.state))
        parts.append(Part("engine", own_bytes, engine.model, engine.state))
        if device.kind == "unified":  # whose memory is the host's
            parts.append(Part("engine", engine.memory_bytes, engine.model, engine.state))
    return _tier(device, parts, is_shared=device.kind == "unified")


def _place(engine: Engine, models: Sequence[Model], gpus: Sequence[Device]) -> str:
    """The GPU whose memory an engine takes; of several, the first that holds its model."""
    names = [gpu.name for gpu in gpus]
    held = next((model.devices for model in models if model.name == engine.model), ())
    return next((name for name in names if name in held), names[0] if engine.device_bytes and names else "")


def _host(device: Device, models: Sequence[Model], engines: Sequence[Engine]) -> Tier:
    parts = list(_weights(device, models))
    parts += [Part("engine", engine.memory_bytes, engine.model, engine.state) for engine in engines]
    return _tier(device, parts)


def _tier(device: Device, parts: list[Part], *, is_shared: bool = False) -> Tier:
    arenas = sum(part.size_bytes for part in parts if part.kind == "weights")
    engines = sum(max(0, part.size_bytes) for part in parts if part.kind in {"cache", "engine"})
    parts.append(Part("more", device.used_bytes - arenas))
    if device.kind != "simulated":  # a piece of the host's memory, whose other users the host shows
        parts.append(Part("others", device.driver_used_bytes - max(device.used_bytes, arenas) - engines))
    return Tier(
        *(device.name, device.kind, device.model, device.total_bytes, device.budget_bytes, device.used_bytes),
        tuple(_merged(parts)), is_shared,
    )  # fmt: skip


def _weights(device: Device, models: Iterable[Model]) -> Iterator[Part]:
    for model in models:
        if device.name in model.devices:
            parts = max(1, sum(name != HOST for name in model.devices)) if device.name != HOST else 1
            yield Part("weights", model.size_bytes // parts, model.name, _held(model))


def _held(model: Model) -> str:
    if model.serving:
        return "serving"
    return "leased" if model.leases else "pinned" if model.pinned else ""


def _store(status: Status, models: Sequence[Model]) -> Tier:
    """Fine-tunes that share a part are stored once, so the models' sizes may exceed what the store takes."""
    total_bytes = status.store_quota_bytes or status.store_bytes + status.store_free_bytes
    parts = [Part("weights", model.size_bytes, model.name, STORED) for model in models]
    parts.append(Part("more", status.store_bytes - sum(part.size_bytes for part in parts)))
    return Tier(STORE, STORE, "", total_bytes, total_bytes, status.store_bytes, tuple(_merged(parts)))


def _merged(parts: Iterable[Part]) -> Iterator[Part]:
    """The parts that are any, held and large ones first, with the smallest of each kind as one."""
    by_kind: dict[str, list[Part]] = {kind: [] for kind in ("weights", "cache", "engine", "more", "others")}
    for part in parts:
        if part.size_bytes > 0:
            by_kind[part.kind].append(part)
    for kind, those in by_kind.items():
        shown = sorted(those, key=lambda part: (_ORDER.get(part.held, 0), -part.size_bytes, part.model))
        if len(shown) > _MOST_PARTS:
            large = set(sorted(shown, key=lambda part: -part.size_bytes)[:_MOST_PARTS])
            rest = [part for part in shown if part not in large]
            shown = [part for part in shown if part in large]
            shown.append(Part(kind, sum(part.size_bytes for part in rest), count=len(rest)))
        yield from shown
