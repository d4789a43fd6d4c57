# SPDX-License-Identifier: Apache-2.0
"""The state of the machine, as JSON: `GET /flashd/v1/state` and `GET /flashd/v1/events`.

No value is null, so that a change can be a merge patch (RFC 7396), in which null removes a name. Times are in seconds
since the epoch, and 0 means never or not yet. Fields are only ever added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashd.client.results import Engine, Model
from flashd.client.tiers import Part
from flashd.json_values import JsonObject


def _said(doc: str) -> Any:
    """A field with its documentation."""
    return dataclasses.field(metadata={"doc": doc})


@dataclass(frozen=True, slots=True)
class DaemonState:
    """`daemon`: the daemon itself."""

    connected: bool = _said("whether the daemon runs; while it does not, the rest is what was known last")
    version: str = _said("its version")
    active: str = _said("the active model; empty for none")
    resting: str = _said("the model that was parked because it was idle, and that the next request wakes")
    default_engine: str = _said("the engine for models that choose none: `torch` or `vllm`")
    default_engine_reason: str = _said("why, in English")
    problems: tuple[Mapping[str, str], ...] = _said("what an administrator has to solve: `what` and `remedy`")
    inbox: tuple[Mapping[str, str], ...] = _said("sources that are no models yet: `name`, `state` and `detail`")


@dataclass(frozen=True, slots=True)
class ModelState:
    """`models.NAME`: a model."""

    aliases: tuple[str, ...] = _said("further names")
    architecture: str = _said("first entry of `architectures` in config.json")
    format: str = _said("`safetensors` or `gguf`")
    dtype: str = _said("the dtype of most of the bytes")
    size_bytes: int = _said("bytes of the weights")
    context_length: int = _said("most tokens at once; 0 if unknown")
    tensors: int = _said("number of tensors; fine-tunes of one base have as many")
    residency: str = _said("the fastest tier that holds it: `stored`, `host` or `device`")
    devices: tuple[str, ...] = _said("the devices whose memory holds it")
    serving: bool = _said("whether an engine answers for it")
    engine: str = _said("the kind of that engine; empty if it does not serve")
    pinned: bool = _said("whether it is protected from eviction")
    private: bool = _said("whether it is private")
    leases: int = _said("leases on its memory, with those of engines")
    last_used_at: int = _said("time of the last swap or lease")
    use_count: int = _said("number of swaps to it")
    adapters: tuple[str, ...] = _said("adapters that a request may name instead")
    capabilities: tuple[str, ...] = _said("`completion`, `embedding`, `tools`, `vision`")
    waiting: int = _said("requests that wait for it")
    answering: int = _said("requests that it answers now")


@dataclass(frozen=True, slots=True)
class EngineState:
    """`engines.PID`: an inference process."""

    kind: str = _said("`torch` or `vllm`")
    state: str = _said("`starting`, `serving`, `parked` or `failed`")
    model: str = _said("the model that it has, or had when it was parked")
    active_requests: int = _said("requests in it at the last measurement")
    memory_bytes: int = _said("its own memory of the host, without weights")
    device_bytes: int = _said("GPU memory of its processes, with weights that it has mapped; 0 if unknown")
    kv_cache_bytes: int = _said("its KV cache; 0 while it is parked")
    weights: str = _said("`image` or `checkpoint`: what its weights are mapped from; empty while it is parked")
    started_at: int = _said("when it was started")


@dataclass(frozen=True, slots=True)
class JobState:
    """`jobs.NUMBER`: a long operation; the last few hundred are kept."""

    kind: str = _said("`swap`, `serve`, `load`, `pull`, `import` and so on")
    subject: str = _said("the model or other name that it is about")
    state: str = _said("`collecting`, `queued`, `running`, `done`, `failed` or `cancelled`")
    phase: str = _said("current activity, in a word or two")
    done_bytes: int = _said("bytes so far")
    total_bytes: int = _said("bytes at the end; 0 while that is unknown")
    created_at: float = _said("when it was asked for")
    finished_at: float = _said("when it ended")
    how: str = _said("of a swap: `already-active`, `rebind`, `wake` or `start`")
    from_tier: str = _said("of a swap: the tier in which the weights were")
    phases: Mapping[str, float] = _said("of a swap: seconds in each phase, in order")
    error: str = _said("name of the error that ended it, without `org.flashd1.Error.`")
    message: str = _said("what went wrong; a swap that fails leaves what served before")
    hint: str = _said("what to do about it")


@dataclass(frozen=True, slots=True)
class RequestState:
    """`requests.NUMBER`: a request for a model whose answer has ended; the last few hundred are kept, without what
    was asked and answered."""

    model: str = _said("the model")
    endpoint: str = _said("the path")
    arrived_at: float = _said("when it came")
    wait_s: float = _said("seconds in which it waited for its model")
    first_byte_s: float = _said("seconds from its arrival to the first byte of the answer; 0 if there was none")
    seconds: float = _said("seconds from its arrival to the end of the answer")
    status: int = _said("HTTP status; 499 if the client left before the answer began")
    error: str = _said("name of the error; empty if there was none")
    prompt_tokens: int = _said("tokens of the prompt; 0 if unknown")
    completion_tokens: int = _said("tokens of the answer; 0 if unknown")


@dataclass(frozen=True, slots=True)
class Rights:
    """`rights`: why the client may not do something, with the remedy; empty if it may."""

    memory: str = _said("swap, load, evict, park at once, cancel jobs")
    models: str = _said("pull, pin and remove models, make them private or public")


@dataclass(frozen=True, slots=True)
class TierState:
    """`tiers[]`: a GPU's memory, the host's, or the store; fastest first."""

    name: str = _said("the device, or `store`")
    kind: str = _said("`host`, `cuda`, `unified`, `simulated` or `store`")
    product: str = _said("product name of the GPU")
    total_bytes: int = _said("all of it")
    budget_bytes: int = _said("the most that models may take of it; the rest is the reserve")
    used_bytes: int = _said("what models take, by flashd's own count")
    parts: tuple[Part, ...] = _said("what it holds, below")
    is_shared: bool = _said("whether it is the memory of a GPU and of the host")


@dataclass(frozen=True, slots=True)
class PartState:
    """`tiers[].parts[]`: a part of a tier."""

    kind: str = _said(
        "`weights`, `cache` (a KV cache), `engine` (what else an engine takes; on a GPU context, code and graphs), "
        "`more` (images, and models that are not shown) or `others` (other programs)"
    )
    size_bytes: int = _said("bytes")
    model: str = _said("the model whose it is; empty for none, or several")
    held: str = _said(
        "of weights, why they do not make way: `serving`, `leased`, `pinned` or `stored`, empty if they would; of an "
        "engine, its state"
    )
    count: int = _said("how many small parts this one stands for")


PARTS: Mapping[str, type] = {
    "daemon": DaemonState,
    "rights": Rights,
    "models": ModelState,
    "engines": EngineState,
    "jobs": JobState,
    "requests": RequestState,
    "tiers": TierState,
    "tiers.parts": PartState,
}

State = JsonObject  # of each name in PARTS


def model_state(model: Model, engine: str, waiting: int, answering: int) -> JsonObject:
    same = _shared(ModelState, model)
    return as_json(ModelState(**same, tensors=model.tensor_count, engine=engine, waiting=waiting, answering=answering))


def engine_state(engine: Engine) -> JsonObject:
    return as_json(EngineState(**_shared(EngineState, engine)))


def _shared(kind: type[Any], source: object) -> JsonObject:
    """The fields of a class that a result of the client has too."""
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: getattr(source, name) for name in names if hasattr(source, name)}


def as_json(value: Any) -> JsonObject:
    """An instance of one of these classes, with lists for tuples, as a reader of the JSON text has it."""
    return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if dataclasses.is_dataclass(value):
        return as_json(value)
    return dict(value) if isinstance(value, Mapping) else value


def patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> JsonObject:
    """The merge patch (RFC 7396) that makes `after` of `before`; empty if they are equal."""
    found: JsonObject = dict.fromkeys(before.keys() - after.keys())
    for name, value in after.items():
        old = before.get(name)
        if old is value:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            if inner := patch(old, value):
                found[name] = inner
        elif name not in before or old != value:
            found[name] = value
    return found
