# SPDX-License-Identifier: Apache-2.0
"""The interface of engines in the daemon, and their states.

from       to                    when
absent     starting              start
absent     serving, parked       rejoin: an earlier daemon has started it
starting   serving, failed       its socket answers; the process died or refused
serving    parked, failed        park (after drain); the process died
parked     serving, failed       wake
failed     (for good)            stop leads here too

A serving engine may be rebound: it takes another checkpoint and goes on serving. If start, wake or rebind raises, the
engine is either as it was before the call, or `failed`; it is never half bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from flashd.checkpoint.files import Checkpoint
from flashd.engines.codec import FLAT, WIRE_NAME
from flashd.engines.inherited import InheritedProcess


class EngineState(StrEnum):
    ABSENT = "absent"
    STARTING = "starting"
    SERVING = "serving"
    PARKED = "parked"
    FAILED = "failed"


TRANSITIONS: Mapping[EngineState, frozenset[EngineState]] = {
    EngineState.ABSENT: frozenset({EngineState.STARTING, EngineState.SERVING, EngineState.PARKED}),
    EngineState.STARTING: frozenset({EngineState.SERVING, EngineState.FAILED}),
    EngineState.SERVING: frozenset({EngineState.PARKED, EngineState.FAILED}),
    EngineState.PARKED: frozenset({EngineState.SERVING, EngineState.FAILED}),
    EngineState.FAILED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of an engine for one model, in addition to those of its factory. None stands for the factory's value, and
    `kv_cache.AUTO` for as much as is free.
    """

    arguments: tuple[str, ...] = ()
    kv_cache_bytes: int | None = None


NO_OPTIONS = EngineOptions()


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Identity of the model that an engine holds, as plain text for records that outlive the daemon.

    `served_names` are the names that requests may use. If it is `private_to` a user, only connections of this user lead
    to its engine.
    """

    name: str = field(metadata={WIRE_NAME: "model_name"})
    served_names: tuple[str, ...] = field(metadata={WIRE_NAME: "names"})
    checkpoint_id: str
    private_to: int | None
    options: EngineOptions


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Memory that one rank reads. `layout` is a safetensors header as JSON, for `size_bytes` of data."""

    fd: int
    size_bytes: int
    layout: str


@dataclass(frozen=True, slots=True)
class BoundWeights:
    """A checkpoint, or the image that an engine on GPUs has made of it. The caller closes the descriptors.

    `ranks` are the parts of an image, one for each rank, in order, or the one checkpoint, which all ranks read.
    `arena_ids` are the ids of their contents. If `wants_image`, the engine is asked to make an image of the checkpoint,
    and returns an EngineImage if it can. A vLLM model's structure depends on the checkpoint's dtypes and names of
    tensors, so an engine that starts with an image also gets the `checkpoint_layout`.
    """

    ranks: tuple[RankMemory, ...]
    arena_ids: tuple[str, ...]
    is_image: bool = False
    wants_image: bool = False
    checkpoint_layout: str = ""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a checkpoint other than the weights, passed as a descriptor because engines cannot access the store.

    An engine that has read a file with the same digest need not read it again.
    """

    path: Path
    digest: str


@dataclass(frozen=True, slots=True)
class Binding:
    """Weights and identity for an engine to hold. `devices` has a GPU for each rank of an engine on GPUs."""

    model: ModelIdentity
    weights: BoundWeights
    side_files: Mapping[str, StoredFile]
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineImage:
    """An image that an engine has made of a checkpoint, in GPU memory that it allocated and now reads.

    No other engine can map one that `is_own`. The receiver closes the descriptors.
    """

    ranks: tuple[RankMemory, ...]
    is_own: bool = False


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Statistics of an engine.

    `memory_bytes` is the process's own resident memory without the weights in the arena, as last measured; 0 before.
    `seen_requests` counts all requests since the start.
    """

    active_requests: int
    memory_bytes: int
    seen_requests: int


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The memory that one rank of an engine needs on its GPU for a checkpoint.

    `key` addresses the image that this build of the engine makes of the checkpoint; empty if it makes none.
    `weights_bytes` is an estimate of the most that the weights may take, `cache_bytes` is the KV cache, and
    `besides_bytes` the need besides both while serving. `building_bytes` is needed until the engine serves, in addition
    to all but the KV cache, which does not exist before. With `most_cache_bytes`, the KV cache takes free memory up to
    that when the engine starts.
    """

    device: str
    key: str
    weights_bytes: int
    besides_bytes: int
    cache_bytes: int = 0
    building_bytes: int = 0
    most_cache_bytes: int = 0

    @property
    def working_bytes(self) -> int:
        """The need besides weights while serving."""
        return self.besides_bytes + self.cache_bytes

    @property
    def starting_bytes(self) -> int:
        """The need in addition to weights and `working_bytes` until the engine serves."""
        return max(0, self.building_bytes - self.cache_bytes)


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """The needs of an engine on GPUs: its ranks in order, each on a separate device. All make images, or none."""

    ranks: tuple[RankPlan, ...]

    @property
    def makes_image(self) -> bool:
        return all(rank.key for rank in self.ranks)

    def without_image(self) -> GpuPlan:
        """Plans an engine that keeps the weights in its own memory, which takes less while it starts."""
        return GpuPlan(tuple(replace(rank, key="", building_bytes=0) for rank in self.ranks))

    @property
    def cache_grows(self) -> bool:
        """Tells whether the KV cache takes free memory when the engine starts."""
        return all(rank.most_cache_bytes for rank in self.ranks)


@dataclass(frozen=True, slots=True)
class BindingRecord:
    """A binding as plain data for a record that outlives the daemon.

    `arena_ids` are the ids of the checkpoint or the parts of its image that the engine has mapped; empty while an image
    is being made, because it is not known yet.
    """

    model: ModelIdentity = field(metadata={FLAT: True})
    arena_ids: tuple[str, ...] = field(metadata={WIRE_NAME: "forms"})


@dataclass(frozen=True, slots=True)
class Rejoined:
    """The state in which an engine was found: its binding, or the last one before it was parked, and whether requests
    are held back.
    """

    record: BindingRecord
    is_shut: bool


class Engine(Protocol):
    """An inference process. Calls are made one at a time, on the event loop."""

    number: int
    kind: str
    identity: str  # of the process, different from that of all others; empty if it is not known
    state: EngineState
    socket_path: Path
    pid: int
    started_at: float
    cache_bytes: int  # KV cache of each rank since its start; 0 if it has none, or chooses the size itself
    on_exit: Callable[[str], None]  # called once, with the end of its log, if the process ends by itself

    @property
    def is_kept(self) -> bool:
        """True if the engine goes on running after `leave`, for the next daemon to find."""

    async def start(self, binding: Binding) -> EngineImage | None:
        """Starts the process and waits until its socket answers. Raises EngineFailed, with the end of its log."""

    async def drain(self, timeout_s: float, *, leaving: bool = False) -> None:
        """Holds back new requests, and waits until those in flight have finished.

        After `timeout_s` they are cut off, with an error that says so. If the engine is `leaving`, it passes new
        requests on instead of holding them back.
        """

    async def resume(self) -> None:
        """Reverses `drain`: held-back requests are answered with the weights that the engine holds."""

    async def park(self) -> None:
        """Gives up the memory of the weights. Requests get an error at once. Call `drain` first."""

    async def wake(self, binding: Binding) -> EngineImage | None:
        """Takes the same weights again, or those of another checkpoint with the same architecture, and serves."""

    async def make_image(self, binding: Binding) -> EngineImage | None:
        """Makes an image of a checkpoint's weights while the engine is parked, which it stays. It needs no memory for a
        KV cache. Raises EngineFailed; the engine is then as it was, or `failed`.
        """

    async def rebind(self, binding: Binding) -> EngineImage | None:
        """Takes another checkpoint of the same architecture, and serves.

        Call `drain` first; held-back requests are answered by the new model. If this raises and the engine is still
        serving, call `resume`.
        """

    def has_become(self, arena_ids: tuple[str, ...]) -> None:
        """Records that the daemon keeps the image made by this engine under these ids, one for each rank."""

    async def rejoin(self) -> Rejoined:
        """Asks an engine that an earlier daemon left for its state. Raises EngineFailed if it does not answer."""

    async def leave(self) -> None:
        """Lets the engine go on running without this daemon."""

    async def stop(self) -> None:
        """Ends the process, by force if necessary. Never raises."""

    async def stats(self) -> EngineStats: ...


class EngineFactory(Protocol):
    """Makes engines of one kind.

    If an engine `copies_checkpoints`, it has copied one when it serves, and does not need its arena any longer.
    """

    kind: str
    copies_checkpoints: bool

    def begin(self) -> None:
        """Starts preparations for the first engine in the background."""

    def refusal(self, architecture: str, side_files: Mapping[str, Path]) -> str:
        """Returns the reason why this kind cannot run such a checkpoint; empty if it can."""

    def rebind_key(self, checkpoint: Checkpoint, options: EngineOptions = NO_OPTIONS) -> str:
        """Returns a key. An engine can be rebound between checkpoints of the same key.

        The key is empty if only a new engine can take this checkpoint.
        """

    async def gpu_plan(self, checkpoint: Checkpoint, options: EngineOptions = NO_OPTIONS) -> GpuPlan | None:
        """Returns the needs on GPUs; None if its engines work in host memory. May wait for `begin`'s preparations."""

    def create(self, options: EngineOptions = NO_OPTIONS, *, cache_bytes: int = 0) -> Engine:
        """Makes an engine to start. `cache_bytes` is the KV cache of each rank if the options leave it open; 0 if that
        is unknown.
        """

    def rejoin(self, kept: Sequence[InheritedProcess]) -> Sequence[Engine]:
        """Returns the engines of this kind that an earlier daemon left; each still has to rejoin.

        Takes over the descriptors that it uses.
        """

    async def run_in(self, python: str) -> None:
        """Runs engines that are created from now on in this interpreter."""

    async def close(self, *, leaving: bool = True) -> None:
        """Ends the processes that start engines quickly; those kept for the next daemon stay if we are `leaving`."""
