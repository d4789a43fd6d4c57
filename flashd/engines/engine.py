# SPDX-License-Identifier: Apache-2.0
"""What is an engine, seen from the daemon?

from       to                    when
absent     starting              start
absent     serving, parked       rejoin: it ran already, and a daemon before us drove it
starting   serving, failed       its socket answers; the process died or refused
serving    parked, failed        park (after drain); the process died
parked     serving, failed       wake
failed     (for good)            stop leads here too

A serving engine may be `rebind`ed: it takes another checkpoint and goes on serving. Where start, wake or rebind raise,
the engine either is as it was before the call, or `failed`; it is never half bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from flashd.checkpoint.files import Checkpoint
from flashd.engines.kept import Kept


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
class RankArena:
    """Memory of one rank; `layout` is a safetensors header as JSON, of `size_bytes` of data."""

    fd: int
    size_bytes: int
    layout: str


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is told for one model besides what its factory tells all. None: as those."""

    arguments: tuple[str, ...] = ()
    kv_cache_bytes: int | None = None


NO_OPTIONS = EngineOptions()


@dataclass(frozen=True, slots=True)
class Binding:
    """What an engine is to hold: one model's checkpoint, resident in an arena.

    `arena_fd` stays the caller's. `layout` is the safetensors header as JSON; `side_files` are opened by us and handed
    over as descriptors, so that an engine needs no access to the store; by their `digests` it knows again what it has
    read before. `names` are what requests may call the model. What an engine builds may depend on the dtypes and names
    of tensors (vLLM's does), so one that starts with an image is also told the `checkpoint_layout`.

    An engine on GPUs, one of `devices` a rank, may be given the image of the checkpoint that its build made before
    (`is_image`), or be asked to make one (`wants_image`): then its answer is a Made, if it can. Of an image, what is
    said first is of rank 0, and `further` has the other ranks', in order; a checkpoint is one, which all ranks read.

    `private_to`, `options` and `forms`, the ids of the checkpoint or of its image's parts, are for whoever finds the
    engine later.
    """

    model_name: str
    names: tuple[str, ...]
    checkpoint_id: str
    architecture_key: str
    arena_fd: int
    arena_bytes: int
    layout: str
    side_files: Mapping[str, Path]
    digests: Mapping[str, str]
    checkpoint_layout: str = ""
    devices: tuple[str, ...] = ()
    is_image: bool = False
    wants_image: bool = False
    further: tuple[RankArena, ...] = ()
    private_to: int | None = None
    forms: tuple[str, ...] = ()
    options: EngineOptions = NO_OPTIONS


@dataclass(frozen=True, slots=True)
class Made:
    """An image that an engine has made of a checkpoint, in memory that it allocated on its GPUs and now reads from: one
    arena a rank, in order. The descriptors are the receiver's."""

    arenas: tuple[RankArena, ...]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """`memory_bytes` is resident memory that is the process's own, as measured last, 0 at first; the weights in the
    arena are not. `seen_requests` counts all since the start."""

    active_requests: int
    memory_bytes: int
    seen_requests: int


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank of an engine will need on its GPU for a checkpoint.

    `key` addresses the image that this build of the engine makes of it; empty if it makes none. `weights_bytes` is the
    most that its weights may take, as far as can be told before; `working_bytes` what it takes besides while serving,
    and `starting_bytes` what it takes on top of both until it does.
    """

    device: str
    key: str
    weights_bytes: int
    working_bytes: int
    starting_bytes: int = 0


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """What an engine on GPUs will need: the ranks in order, each on a device of its own. All make images, or none."""

    ranks: tuple[RankPlan, ...]

    @property
    def makes_image(self) -> bool:
        return all(rank.key for rank in self.ranks)


@dataclass(frozen=True, slots=True)
class Holding:
    """A binding in words that outlive the daemon which gave it.

    `forms` is what is mapped: the checkpoint, or the parts of an image of it; none while nobody knows, since one is
    being made.
    """

    model_name: str
    names: tuple[str, ...]
    checkpoint_id: str
    private_to: int | None
    options: EngineOptions
    forms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rejoined:
    """How an engine was found: what it holds, or held before it was parked; whether requests are held back."""

    holding: Holding
    is_shut: bool


class Engine(Protocol):
    """One inference process. Calls are made one at a time, on the event loop."""

    number: int
    kind: str
    state: EngineState
    socket_path: Path
    pid: int
    started_at: float
    on_exit: Callable[[str], None]  # told once, with its last words, if the process ends unasked

    @property
    def is_kept(self) -> bool:
        """Whether it runs on when we `leave`, and a daemon after us finds it."""

    async def start(self, binding: Binding) -> Made | None:
        """Returns when its socket answers. Raises EngineFailed, with the process's last words."""

    async def drain(self, timeout_s: float) -> None:
        """Holds new requests back, and returns when those in flight have finished or `timeout_s` is over: then they
        are cut, with an error that says so."""

    async def resume(self) -> None:
        """Undoes `drain`: requests held back are answered by what the engine holds."""

    async def park(self) -> None:
        """Lets go of the weights; requests get an error at once. Call `drain` first."""

    async def wake(self, binding: Binding) -> Made | None:
        """Takes weights again, the same or another checkpoint's of its architecture, and serves."""

    async def rebind(self, binding: Binding) -> Made | None:
        """Takes another checkpoint of the same architecture, and serves. Call `drain` first; requests held back are
        answered by the new one. If this raises and the engine serves still, it needs to `resume`."""

    def has_become(self, forms: tuple[str, ...]) -> None:
        """What it made of its weights is an image that we keep by these ids, one a rank."""

    async def rejoin(self) -> Rejoined:
        """Takes up an engine that a daemon before us has left. Raises EngineFailed if nobody can say what it holds."""

    async def leave(self) -> None:
        """Lets go of it, and lets it run."""

    async def stop(self) -> None:
        """Ends the process, by force if it must. Never raises."""

    async def stats(self) -> EngineStats: ...


class EngineFactory(Protocol):
    """Makes engines of one kind."""

    kind: str

    def begin(self) -> None:
        """Makes ready, in the background, what the first engine would wait for."""

    def refusal(self, architecture: str, side_files: Mapping[str, Path]) -> str:
        """Why this kind cannot run such a checkpoint; empty if it can."""

    def rebind_key(self, checkpoint: Checkpoint, options: EngineOptions = NO_OPTIONS) -> str:
        """Engines that hold a checkpoint can take any other of the same key; empty: none but a new engine can."""

    async def gpu_plan(self, checkpoint: Checkpoint, options: EngineOptions = NO_OPTIONS) -> GpuPlan | None:
        """None if its engines work in host memory. May wait for the first engine to be possible."""

    def create(self, options: EngineOptions = NO_OPTIONS) -> Engine: ...

    def rejoin(self, kept: Sequence[Kept]) -> Sequence[Engine]:
        """The engines of this kind among what a daemon before us left, each yet to rejoin. Takes over what it uses."""

    async def run_in(self, python: str) -> None:
        """Has engines that are created from now on run in this interpreter."""

    async def close(self) -> None:
        """Ends whatever the factory keeps running to start engines quickly."""
