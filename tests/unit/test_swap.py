# SPDX-License-Identifier: Apache-2.0
"""Swaps: after any failure or cancellation, either the old model or the new one answers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import threading
import unittest.mock
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import converted
from waiting import PATIENCE_S, eventually

from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.manifest import Manifest
from flashd.engines.engine import (
    NO_OPTIONS,
    TRANSITIONS,
    Binding,
    BindingRecord,
    Engine,
    EngineImage,
    EngineOptions,
    EngineState,
    EngineStats,
    GpuPlan,
    RankMemory,
    RankPlan,
    Rejoined,
)
from flashd.engines.inherited import InheritedProcess
from flashd.errors import (
    Busy,
    EngineFailed,
    EngineOutOfMemory,
    FlashdError,
    NotFound,
    OutOfMemory,
    TransferFailed,
    Unsupported,
)
from flashd.memory.arena import HostArena, HugePages
from flashd.memory.device import HostDevice, Tier, simulated_device
from flashd.memory.pool import Reservation
from flashd.memory.residency import Memory, Residency
from flashd.memory.transfers import Progress, Region, Residents
from flashd.swap import slots
from flashd.swap.swapper import How, Policy, Swapper, SwapState
from flashd.swap.weights import Recipient, Supplier, Supply, Target

ARENA_BYTES = 4096
UNIQUE = "Q"  # an architecture whose engines can never be rebound
WORKING_BYTES = 3 * 4096
ENGINE_BYTES = 1 << 20  # of its process
NO_MANIFEST = Manifest(
    id="", weights="", header_digest="", digests_digest="", digest_block_bytes=4096, data_offset=4096, data_bytes=0,
    tensor_count=1, dtype="", architecture="", architecture_key="", layout="", quantization="", side_files={},
    created_at=0, source="",
)  # fmt: skip
DEVICE = HostDevice("host", 1 << 40, HugePages.NONE)


class Fault(StrEnum):
    """What may go wrong at a step; a step is an order to an engine, a load, or a move of the endpoint."""

    FAILS = "it fails"
    DIES = "the engine that carries it out dies"
    HANGS = "the engine that carries it out does not answer"
    NO_MEMORY = "there is no memory for it"
    CANCELLED = "the swap is cancelled"
    OLD_DIES = "the engine that was active before dies"
    BESIDE_DIES = "an engine that serves beside it dies"


class Script:
    """Counts the steps of all engines, loads and the endpoint; one fault strikes at a chosen one."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.fault: Fault | None = None
        self.at = -1
        self.struck = False
        self.swap: asyncio.Task[object] | None = None
        self.old: FakeEngine | None = None
        self.beside: FakeEngine | None = None

    def arm(self, fault: Fault, steps_from_now: int) -> None:
        self.fault, self.at, self.struck = fault, len(self.names) + steps_from_now, False

    def strikes(self, name: str) -> bool:
        self.names.append(name)
        strikes = self.fault is not None and len(self.names) - 1 == self.at
        self.struck = self.struck or strikes
        return strikes

    async def step(self, name: str, engine: FakeEngine | None = None) -> None:
        strikes = self.strikes(name)
        await asyncio.sleep(0)
        if not strikes:
            return
        match self.fault:
            case Fault.FAILS:
                raise EngineFailed(f"{name} was told to fail")
            case Fault.NO_MEMORY:
                raise EngineOutOfMemory(f"{name} was told to find no memory")
            case Fault.DIES if engine:
                engine.die()
            case Fault.HANGS if engine and name != "start":  # an engine limits its start itself
                await engine.ended.wait()
            case Fault.CANCELLED if self.swap:
                self.swap.cancel()
                await asyncio.sleep(0.001)  # the order still takes its time
            case Fault.OLD_DIES if self.old and self.old.state is not EngineState.FAILED:
                self.old.die()
            case Fault.BESIDE_DIES if self.beside and self.beside.state is not EngineState.FAILED:
                self.beside.die()


def image_arena(size_bytes: int = ARENA_BYTES) -> RankMemory:
    """What one rank of an engine says of the memory that it has filled."""
    arena = HostArena(size_bytes, "image", HugePages.NONE)
    arena.seal()
    return RankMemory(arena.fd, ARENA_BYTES, "the layout")


class FakeEngine:
    """Keeps the protocol to the letter: an illegal transition fails the test, as does an order given too early."""

    def __init__(self, number: int, script: Script) -> None:
        self.number = number
        self.kind = "fake"
        self.identity = f"engine {number}"
        self.state = EngineState.ABSENT
        self.binding: Binding | None = None
        self.arena_ids: tuple[str, ...] = ()
        self.is_kept = False
        self.left_as = EngineState.ABSENT
        self.socket_path = Path(f"/run/{number}.sock")
        self.pid = number
        self.started_at = 0.0
        self.cache_bytes = 0
        self.on_exit: Callable[[str], None] = lambda last_words: None
        self.open = False
        self.requests = 0
        self.times_asked = 0  # for its requests
        self.ended = asyncio.Event()
        self.options = NO_OPTIONS
        self.architectures: Mapping[str, str] = {}  # by checkpoint id
        self.makes_own = False  # images that no other engine can map
        self.makers: Mapping[str, str] = {}  # by image
        self._script = script
        self._order: asyncio.Future[None] | None = None

    async def start(self, binding: Binding) -> EngineImage | None:
        self._check_image(binding)
        self._enter(EngineState.STARTING)
        try:
            await self._script.step("start", self)
            self._check_alive()
        except EngineFailed:
            self._end()
            raise
        self._enter(EngineState.SERVING)
        self.binding, self.arena_ids, self.open = binding, (), True
        return self._made(binding)

    async def drain(self, timeout_s: float, *, leaving: bool = False) -> None:
        self.open = False
        await self._obey("drain", EngineState.SERVING, lambda: None)

    async def resume(self) -> None:
        def effect() -> None:
            self.open = True

        await self._obey("resume", EngineState.SERVING, effect)

    async def park(self) -> None:
        assert not self.open, "park without drain"
        assert self.binding is not None
        weights = self.binding.weights
        if self.binding.devices and not (weights.is_image or weights.wants_image):
            raise EngineFailed("weights that are not an image cannot leave the GPU")
        await self._obey("park", EngineState.SERVING, lambda: self._enter(EngineState.PARKED))

    async def wake(self, binding: Binding) -> EngineImage | None:
        def effect() -> None:
            self._enter(EngineState.SERVING)
            self.binding, self.arena_ids, self.open = binding, (), True

        self._check_architecture(binding)
        self._check_image(binding)
        await self._obey("wake", EngineState.PARKED, effect)
        return self._made(binding)

    async def make_image(self, binding: Binding) -> EngineImage | None:
        self._check_architecture(binding)
        await self._obey("make image", EngineState.PARKED, lambda: None)
        return self._made(binding)

    async def rebind(self, binding: Binding) -> EngineImage | None:
        def effect() -> None:
            self.binding, self.arena_ids, self.open = binding, (), True

        assert not self.open, "rebind without drain"
        self._check_architecture(binding)
        self._check_image(binding)
        await self._obey("rebind", EngineState.SERVING, effect)
        return self._made(binding)

    def has_become(self, arena_ids: tuple[str, ...]) -> None:
        self.arena_ids = arena_ids

    async def rejoin(self) -> Rejoined:
        """Of another daemon's swapper."""
        await self._script.step("rejoin", self)
        self._check_alive()
        assert self.binding is not None
        self._enter(self.left_as)
        record = BindingRecord(self.binding.model, self.arena_ids or self.binding.weights.arena_ids)
        return Rejoined(record, is_shut=not self.open)

    async def leave(self) -> None:
        self.left_as, self.state = self.state, EngineState.ABSENT

    async def stop(self) -> None:
        self._end()

    async def stats(self) -> EngineStats:
        self.times_asked += 1
        return EngineStats(self.requests, ENGINE_BYTES, 0)

    def die(self) -> None:
        self._end()
        self.on_exit("signal 9")

    async def _obey(self, name: str, when: EngineState, effect: Callable[[], None]) -> None:
        """An order that was sent is carried out, whether or not somebody still waits for the answer."""
        assert self._order is None or self._order.done(), f"{name} before the last order was answered"
        self._check_alive()
        assert self.state is when, f"{name} while {self.state}"

        async def carry_out() -> None:
            await self._script.step(name, self)
            self._check_alive()
            effect()

        self._order = asyncio.ensure_future(carry_out())
        self._order.add_done_callback(lambda order: order.exception())  # looked at, though the swapper may have left
        await asyncio.shield(self._order)

    def _made(self, binding: Binding) -> EngineImage | None:
        """What an engine on a GPU makes of its weights: memory of its own, of which it hands a descriptor on."""
        if not binding.weights.wants_image:
            return None
        return EngineImage(tuple(image_arena() for _ in binding.devices), is_own=self.makes_own)

    def _check_alive(self) -> None:
        if self.state is EngineState.FAILED:
            raise EngineFailed("the process has ended")

    def _check_architecture(self, binding: Binding) -> None:
        bound = {self.architectures[held.model.checkpoint_id] for held in (self.binding, binding) if held}
        assert len(bound) == 1

    def _check_image(self, binding: Binding) -> None:
        if binding.weights.is_image:
            makers = {self.makers.get(image, "") for image in binding.weights.arena_ids}
            assert makers <= {"", self.identity}, "an image that only another engine can map"

    def _end(self) -> None:
        self.state = EngineState.FAILED
        self.open = False
        self.ended.set()

    def _enter(self, state: EngineState) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state} to {state}"
        self.state = state


class Factory:
    kind = "fake"
    copies_checkpoints = False

    def __init__(
        self, script: Script, gpus: Sequence[str], starting_bytes: int, cache_bytes: int, most_cache_bytes: int
    ) -> None:
        self._script = script
        self._gpus = gpus
        self._starting_bytes = starting_bytes
        self._cache_bytes = cache_bytes
        self._most_cache_bytes = most_cache_bytes
        self._numbers = itertools.count(1)
        self.engines: list[FakeEngine] = []
        self.make_own = False
        self.makers: Mapping[str, str] = {}
        self._architectures: dict[str, str] = {}

    def refusal(self, architecture: str, side_files: Mapping[str, Path]) -> str:
        return "" if architecture else "no architecture"

    def begin(self) -> None: ...

    def rebind_key(self, checkpoint: Checkpoint, options: EngineOptions = NO_OPTIONS) -> str:
        manifest = checkpoint.manifest
        self._architectures[checkpoint.id] = manifest.architecture_key
        return "" if manifest.architecture == UNIQUE else f"{manifest.architecture_key} {options}"

    async def gpu_plan(self, checkpoint: Checkpoint, options: EngineOptions = NO_OPTIONS) -> GpuPlan | None:
        if not self._gpus:
            return None
        return GpuPlan(
            tuple(
                RankPlan(
                    gpu,
                    f"image of {checkpoint.id} on {gpu}",
                    weights_bytes=2 * ARENA_BYTES,  # before loading, an engine reports more than it takes afterwards
                    besides_bytes=WORKING_BYTES - self._cache_bytes,
                    cache_bytes=self._cache_bytes,
                    building_bytes=self._starting_bytes,
                    most_cache_bytes=self._most_cache_bytes,
                )
                for gpu in self._gpus
            )
        )

    def create(self, options: EngineOptions = NO_OPTIONS, *, cache_bytes: int = 0) -> FakeEngine:
        self.engines.append(FakeEngine(next(self._numbers), self._script))
        self.engines[-1].cache_bytes = cache_bytes
        self.engines[-1].options = options
        self.engines[-1].makes_own = self.make_own
        self.engines[-1].makers = self.makers
        self.engines[-1].architectures = self._architectures
        return self.engines[-1]

    def working_bytes(self, engine: Engine) -> int:
        """What an engine that serves takes besides weights, on each GPU."""
        return WORKING_BYTES - self._cache_bytes + engine.cache_bytes

    def rejoin(self, kept: Sequence[InheritedProcess]) -> Sequence[Engine]:
        raise AssertionError("nothing is kept")

    async def run_in(self, python: str) -> None:
        raise AssertionError("there is one interpreter")

    async def close(self) -> None: ...


class MemoryImages:
    """Those that were made, none of which is written."""

    def __init__(self) -> None:
        self.known: dict[str, Checkpoint] = {}
        self.makers: dict[str, str] = {}
        self.made_of: dict[str, str] = {}

    def get(self, key: str) -> Checkpoint | None:
        return self.known.get(key)

    def is_stored(self, key: str) -> bool:
        return False

    def layout_json(self, image: Checkpoint) -> str:
        return "the layout"

    def describe(self, key: str, layout: str, data_bytes: int, made_of: str, *, maker: str = "") -> Checkpoint:
        image = Checkpoint(Path("/nowhere"), replace(NO_MANIFEST, id=key, data_bytes=data_bytes))
        self.makers[key] = maker
        self.made_of[key] = made_of
        return self.known.setdefault(key, image)

    def drop(self, key: str) -> None:
        self.known.pop(key, None)

    def drop_unless(self, is_there: Callable[[str], bool]) -> list[str]:
        doomed = [key for key in self.known if self.makers[key] and not is_there(self.makers[key])]
        for key in doomed:
            self.drop(key)
        return doomed


class World:
    """A swapper with everything around it. On GPUs, of which an engine uses all, `room` is for so many images and what
    engines need besides, on each."""

    def __init__(
        self,
        *,
        room: int = 10,
        policy: Policy = Policy(drain_timeout_s=1, max_parked=2),  # noqa: B008
        gpus: int = 0,
        starting_bytes: int = 0,
        cache_bytes: int = 0,
        most_cache_bytes: int = 0,
        copies: bool = False,
        own_images: bool = False,
    ) -> None:
        self.script = Script()
        self.gpus = [f"sim:{number}" for number in range(gpus)]
        self.factory = Factory(self.script, self.gpus, starting_bytes, cache_bytes, most_cache_bytes)
        self.factory.copies_checkpoints = copies
        self.images = MemoryImages()
        self.factory.make_own, self.factory.makers = own_images, self.images.makers
        self.endpoint: Path | None = None
        self.opened: set[Path] = set()  # sockets of engines that serve beside the active one
        self.resting: list[str] = []  # displaced models
        self.lost: list[str] = []
        self.loads = True
        self.changed: Callable[[], None] = lambda: None
        self.free_bytes = 1 << 40  # of the machine
        budget_bytes = (room + 1) * ARENA_BYTES + room * WORKING_BYTES
        cards = [Memory(replace(simulated_device(1 << 30, DEVICE), name=name), budget_bytes) for name in self.gpus]
        self.residency = Residency([Memory(DEVICE, max(1, gpus) * room * ARENA_BYTES), *cards], self)
        self.supplier = Supplier(self.residency, {"fake": self.factory}, self.images)
        self.policy = policy
        self.swapper = self.new_swapper()

    def new_swapper(self) -> Swapper:
        return Swapper(
            self.supplier,
            {"fake": self.factory},
            self,
            self.policy,
            on_change=lambda: self.changed(),  # noqa: PLW0108 -- tests replace it
            on_lost=lambda target, was_active: self.lost.append(target.model_name),
            on_displaced=self._rest,
            free_bytes=lambda: self.free_bytes,
        )

    async def pass_on(
        self, targets: Mapping[str, Target], *, is_known: Callable[[str], bool] = lambda name: True
    ) -> None:
        """Another daemon takes over the engines, and knows the models that are known."""
        engines = [engine for engine in self.factory.engines if engine.state is not EngineState.FAILED]
        supplies = [slot.supply for slot in self.swapper.slots if slot.supply]
        for engine in engines:
            engine.is_kept = True
        assert await self.swapper.close() == bool(engines)
        for supply in supplies:
            supply.release()  # with its process

        async def recall(engine: Engine, record: BindingRecord) -> tuple[Target, Supply | None]:
            name = record.model.name
            if not is_known(name):
                raise NotFound(f"there is no {name}")
            is_parked = engine.state is EngineState.PARKED
            supply = (
                None if is_parked else await self.supplier.resume(targets[name], record.arena_ids, Recipient.of(engine))
            )
            return targets[name], supply

        self.swapper = self.new_swapper()
        await self.swapper.take_over(engines, recall, self.endpoint, set(self.opened))

    def point_to(self, socket_path: Path | None, *, is_private: bool = False) -> None:
        if self.script.strikes("point") and self.script.fault is Fault.FAILS and socket_path:
            raise OSError("no space for a link")
        self.endpoint = socket_path

    def open(self, socket_path: Path, *, is_private: bool) -> None:
        if self.script.strikes("open") and self.script.fault is Fault.FAILS:
            raise OSError("no space for a mark")
        self.opened.add(socket_path)

    def shut(self, socket_path: Path) -> None:
        self.opened.discard(socket_path)

    def _rest(self, target: Target) -> bool:
        self.resting.append(target.model_name)
        return False

    async def swap(self, target: Target) -> FlashdError | OSError | asyncio.CancelledError | None:
        """Swaps; returns the error of a swap that failed as a swap may fail."""
        return await self._bring(self.swapper.swap(target))

    async def serve(self, target: Target) -> FlashdError | OSError | asyncio.CancelledError | None:
        return await self._bring(self.swapper.serve(target))

    async def _bring(
        self, swap: Coroutine[object, None, object]
    ) -> FlashdError | OSError | asyncio.CancelledError | None:
        active = self.swapper.slots.active
        self.script.old = active.engine if active else None  # type: ignore[assignment]
        beside = [slot.engine for slot in self.swapper.slots.serving if slot is not active]
        self.script.beside = beside[0] if beside else None  # type: ignore[assignment]
        self.script.swap = asyncio.ensure_future(swap)
        try:
            await self.script.swap
        except (FlashdError, OSError, asyncio.CancelledError) as error:
            return error
        return None

    async def load(
        self, checkpoint: Checkpoint, target: Region, on_progress: Progress, *, residents: Residents = ()
    ) -> None:
        if not self.loads:
            raise TransferFailed("the disk is gone")
        await self.script.step("load")

    async def copy(self, checkpoint: Checkpoint, source: Region, target: Region, on_progress: Progress) -> None:
        assert len(self.residency.caches) > 1, "there is one tier"

    async def matches(self, checkpoint: Checkpoint, region: Region) -> bool:
        raise AssertionError("nothing is taken over")

    def answering(self) -> str | None:
        """The model that a request to the endpoint would reach, if it would be answered."""
        for engine in self.factory.engines:
            if engine.socket_path == self.endpoint and engine.state is EngineState.SERVING and engine.open:
                assert engine.binding
                return engine.binding.model.name
        return None

    def serving(self) -> tuple[str, set[str]]:
        """The model that the endpoint leads to, and those that clients can ask at sockets of their own."""
        beside = {
            engine.binding.model.name
            for engine in self.factory.engines
            if engine.socket_path in self.opened and engine.state is EngineState.SERVING and engine.open
            if engine.binding
        }
        return self.answering() or "", beside

    def check(self) -> None:
        """What must hold whenever no swap is under way."""
        active, serving_slots = self.swapper.slots.active, self.swapper.slots.serving
        assert self.swapper.state is SwapState.IDLE
        names = [slot.target.model_name for slot in serving_slots]
        assert self.serving() == (active.target.model_name if active else "", set(names[1:] if active else names))
        assert len(set(names)) == len(names), "no model serves twice"
        serving = {e.number for e in self.factory.engines if e.state is EngineState.SERVING}
        assert serving == {slot.engine.number for slot in serving_slots}
        slots = {slot.engine.number for slot in self.swapper.slots}
        alive = {e.number for e in self.factory.engines if e.state in {EngineState.SERVING, EngineState.PARKED}}
        assert slots == alive, "no engine is forgotten, none is remembered that is gone"
        held = {hold.checkpoint_id for slot in self.swapper.slots if slot.supply for hold in slot.supply.holds}
        ids = {slot.target.checkpoint.id for slot in serving_slots}
        named = held
        if self.factory.make_own and self.gpus:
            named = {f"image of {self.images.made_of.get(one, one)} on {gpu}" for one in held for gpu in self.gpus}
        forms = {f"image of {one} on {gpu}" for one in ids for gpu in self.gpus} or ids
        if self.factory.copies_checkpoints and not self.gpus:
            forms = set()
        assert named == forms, "only what serves is held, as long as its engine reads it"
        for checkpoint_id in held:
            assert self.residency.holds(checkpoint_id) == 1
        for cache in self.residency.caches.values():
            claimed = cache.pool.used_bytes - sum(resident.size_bytes for resident in cache.residents())
            needed = sum(self.factory.working_bytes(slot.engine) for slot in serving_slots)
            assert claimed == (needed if cache.name in self.gpus else 0), "and only it needs more"

    def ended(self) -> None:
        """What must hold when all is over."""
        self.residency.close()
        assert all(cache.pool.used_bytes == 0 for cache in self.residency.caches.values())


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    """a1, a2, a3 share an architecture; b, c and q have their own; x has none."""
    root = tmp_path_factory.mktemp("targets")
    made = {}
    for seed, (name, architecture) in enumerate(
        {"a1": "A", "a2": "A", "a3": "A", "b": "B", "c": "C", "q": UNIQUE}.items()
    ):
        folder = root / name
        folder.mkdir()
        weights = {"w": np.random.default_rng(seed).integers(0, 255, ARENA_BYTES, np.uint8)}
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        made[name] = Target(name, (name,), converted(folder, root / f"{name}-out"), "fake")
    plain = made["a1"].checkpoint
    unknown = Checkpoint(plain.directory, replace(plain.manifest, architecture="", architecture_key=""))
    made["x"] = Target("x", ("x",), unknown, "fake")
    return made


async def test_start_rebind_wake_and_already_active(targets: dict[str, Target]) -> None:
    world = World()
    hows = []
    for name in ("a1", "a2", "a1", "a1", "b", "a3", "b"):
        outcome = await world.swapper.swap(targets[name])
        assert world.answering() == name == outcome.model_name
        world.check()
        hows.append((outcome.how, outcome.from_tier))
    assert hows == [
        (How.START, Tier.STORED),
        (How.REBIND, Tier.STORED),
        (How.REBIND, Tier.HOST),
        (How.ALREADY_ACTIVE, Tier.HOST),
        (How.START, Tier.STORED),
        (How.WAKE, Tier.STORED),
        (How.WAKE, Tier.HOST),
    ]
    assert len(world.factory.engines) == 2


async def test_another_argument_is_another_engine_though_the_model_is_the_same(targets: dict[str, Target]) -> None:
    world = World()
    with_it = replace(targets["a1"], options=EngineOptions(arguments=("--max-num-seqs", "8")))
    hows = []
    for target in (targets["a1"], with_it, with_it, targets["a2"], with_it):
        hows.append((await world.swapper.swap(target)).how)
        world.check()
    assert hows == [How.START, How.START, How.ALREADY_ACTIVE, How.WAKE, How.WAKE]
    assert [engine.options for engine in world.factory.engines] == [EngineOptions(), with_it.options]


async def test_the_old_model_answers_until_the_new_one_does(targets: dict[str, Target]) -> None:
    world = World()
    await world.swapper.swap(targets["a1"])
    for name in ("a2", "b"):
        before = world.answering()
        done = asyncio.create_task(world.swapper.swap(targets[name]))
        while not done.done():
            in_place = world.swapper.state is SwapState.SWITCHING and name == "a2"
            assert in_place or world.answering() in {before, name}, world.swapper.state
            await asyncio.sleep(0)
        await done


async def test_too_large_for_both_makes_way_and_comes_back_if_it_fails(targets: dict[str, Target]) -> None:
    world = World(room=1)
    await world.swapper.swap(targets["a1"])
    assert (await world.swapper.swap(targets["a2"])).how is How.WAKE
    world.check()
    outcome = await world.swapper.swap(targets["b"])
    assert set(outcome.phases) == {"loading", "making_way", "switching", "serving"}
    world.check()
    world.script.arm(Fault.FAILS, 3)  # drain, park, load, start
    assert isinstance(await world.swap(targets["c"]), EngineFailed)
    assert world.script.names[-7:] == ["drain", "park", "load", "start", "load", "wake", "point"]
    world.check()
    assert world.answering() == "b"


async def test_a_cancel_while_making_way_does_not_wait_for_the_load(targets: dict[str, Target]) -> None:
    world = World(room=1)
    await world.swapper.swap(targets["a1"])
    for moment in (0, 1):  # drain, park
        world.script.arm(Fault.CANCELLED, moment)
        steps = len(world.script.names)
        assert isinstance(await world.swap(targets["b"]), asyncio.CancelledError)
        assert "start" not in world.script.names[steps:]
        world.check()
        assert world.answering() == "a1"


async def test_what_can_never_fit_is_refused_and_nothing_stops(targets: dict[str, Target]) -> None:
    world = World(room=1)
    await world.swapper.swap(targets["a1"])
    big = targets["b"].checkpoint
    huge = Checkpoint(big.directory, replace(big.manifest, data_bytes=9 * ARENA_BYTES))
    steps = len(world.script.names)
    with pytest.raises(OutOfMemory):
        await world.swapper.swap(Target("huge", ("huge",), huge, "fake"))
    assert len(world.script.names) == steps, "the old engine was not even drained"
    world.check()
    assert world.answering() == "a1"


async def test_what_no_engine_can_run_is_refused_at_once(targets: dict[str, Target]) -> None:
    world = World()
    await world.swapper.swap(targets["a1"])
    with pytest.raises(Unsupported):
        await world.swapper.swap(targets["x"])
    world.check()


HANGS_S = 0.15  # how long a fake engine's order may take: longer than a busy machine lets us wait for a turn

ROUTES = {
    "rebind": (["a1"], "a2", 10),
    "start beside": (["a1"], "b", 10),
    "wake": (["a1", "b"], "a2", 10),
    "wake the same": (["a1", "b"], "a1", 10),
    "make way, rebind": (["a1"], "a2", 1),
    "make way, start": (["a1"], "b", 1),
    "make way, wake": (["a1", "b"], "a2", 1),
    "surplus": (["a1", "b", "c"], "a1", 10),
    "from nothing": ([], "a1", 10),
}


@pytest.mark.parametrize("gpus", [0, 1, 2], ids=["host", "gpu", "two-gpus"])
@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("route", list(ROUTES))
async def test_a_fault_at_any_step_of_any_swap_leaves_somebody_answering(
    route: str, fault: Fault, gpus: int, targets: dict[str, Target]
) -> None:
    """The new model if the swap succeeded, the old one if it did not: nothing else, and no engine or hold is lost."""
    first, wanted, room = ROUTES[route]
    order_timeout_s = HANGS_S if fault is Fault.HANGS else 60.0
    for moment in itertools.count():
        world = World(room=room, policy=Policy(0.0, 1, order_timeout_s), gpus=gpus)
        for name in first:
            await world.swapper.swap(targets[name])
        before = world.answering()
        world.script.arm(fault, moment)
        error = await world.swap(targets[wanted])
        world.script.fault = None
        world.check()
        assert world.answering() == (before if error else wanted), (moment, world.script.names, error)
        await world.swapper.swap(targets["a3"])
        world.check()
        assert world.answering() == "a3"
        await world.swapper.close()
        assert all(engine.state is EngineState.FAILED for engine in world.factory.engines)
        world.ended()
        if not world.script.struck:
            assert moment >= 2, "every route has steps"
            return


# Earlier steps, the model to serve, the room for models; then the serving models, the active one
# first, where there is one.
SERVE_ROUTES: dict[str, tuple[list[tuple[str, str]], str, int, str, set[str]]] = {
    "start": ([("swap", "a1")], "b", 10, "a1", {"b"}),
    "start another": ([("swap", "a1"), ("serve", "b")], "c", 10, "a1", {"b", "c"}),
    "wake": ([("swap", "a1"), ("swap", "b")], "a2", 10, "b", {"a2"}),
    "rebind one beside": ([("swap", "b"), ("serve", "a1")], "a2", 10, "b", {"a2"}),
    "rebind the active one": ([("swap", "a1")], "a2", 10, "", {"a2"}),
    "one beside makes way": ([("swap", "b"), ("serve", "c")], "a1", 2, "b", {"a1"}),
    "the active one makes way": ([("swap", "b")], "a1", 1, "", {"a1"}),
    "two make way": ([("swap", "b"), ("serve", "c"), ("serve", "q")], "a1", 3, "b", {"q", "a1"}),
    "one that takes one model ever makes way": ([("swap", "b"), ("serve", "q")], "a1", 2, "b", {"a1"}),
    "from nothing": ([], "a1", 10, "", {"a1"}),
}


@pytest.mark.parametrize("gpus", [0, 2], ids=["host", "two-gpus"])
@pytest.mark.parametrize("fault", [None, *Fault])
@pytest.mark.parametrize("route", list(SERVE_ROUTES))
async def test_a_fault_at_any_step_leaves_what_served_or_what_was_to_serve(
    route: str, fault: Fault | None, gpus: int, targets: dict[str, Target]
) -> None:
    steps, wanted, room, active, beside = SERVE_ROUTES[route]
    order_timeout_s = HANGS_S if fault is Fault.HANGS else 60.0
    for moment in itertools.count():
        world = World(room=room, policy=Policy(0.0, 1, order_timeout_s), gpus=gpus)
        for step, name in steps:
            await getattr(world.swapper, step)(targets[name])
        before = world.serving()
        if fault is not None:
            world.script.arm(fault, moment)
        error = await world.serve(targets[wanted])
        world.script.fault = None
        lost, world.lost = set(world.lost), []
        world.check()
        if error is None:
            expected = ("" if active in lost else active, beside - lost)
        else:
            assert fault is not None, error
            expected = before[0], before[1] - (lost - world.serving()[1])  # restored models are reported too
        assert world.serving() == expected, (moment, world.script.names, error, lost)
        await world.swapper.swap(targets["c"])
        world.check()
        assert world.answering() == "c"
        await world.swapper.close()
        assert not world.opened and all(engine.state is EngineState.FAILED for engine in world.factory.engines)
        world.ended()
        if not world.script.struck:
            assert moment >= 2 or fault is None, "every route has steps"
            return


async def test_what_serves_already_stays_and_a_swap_to_it_moves_only_the_endpoint(targets: dict[str, Target]) -> None:
    world = World()
    await world.swapper.swap(targets["a1"])
    await world.swapper.serve(targets["b"])
    assert (await world.swapper.serve(targets["a1"])).how is How.ALREADY_ACTIVE
    assert (await world.swapper.swap(targets["b"])).how is How.ALREADY_ACTIVE
    assert world.serving() == ("b", set())
    world.check()
    assert (await world.swapper.serve(targets["a2"])).how is How.WAKE
    await world.swapper.park(targets["a2"])
    assert world.serving() == ("b", set())
    world.check()
    await world.swapper.close()
    world.ended()


async def test_idle_engines_make_way_before_busy_ones_and_the_active_one_last(targets: dict[str, Target]) -> None:
    world = World(room=3)
    await world.swapper.swap(targets["a1"])
    await world.swapper.serve(targets["b"])
    await world.swapper.serve(targets["c"])
    assert [t.model_name for t in await world.swapper.displaced_by(targets["q"])] == ["b"]  # idle the longest
    world.factory.engines[1].requests = 1
    assert [t.model_name for t in await world.swapper.displaced_by(targets["q"])] == ["c"]
    assert [t.model_name for t in await world.swapper.displaced_by(targets["a2"])] == ["a1"]  # has the engine for it
    assert await world.swapper.displaced_by(targets["b"]) == []
    world.factory.engines[2].requests = 1
    assert [t.model_name for t in await world.swapper.displaced_by(targets["q"])] == ["a1"]  # idle, if active
    world.factory.engines[0].requests = 1
    await world.swapper.serve(targets["q"])
    assert world.serving() == ("a1", {"c", "q"})
    world.check()
    await world.swapper.close()
    world.ended()


async def test_a_swap_of_one_engine_asks_nothing_that_it_need_not_know(targets: dict[str, Target]) -> None:
    """An engine that is busy may take long to say so."""
    world = World(room=1)
    for name in ("a1", "a2", "b", "a3"):
        await world.swapper.swap(targets[name])
    assert [engine.times_asked for engine in world.factory.engines] == [0, 0]
    await world.swapper.close()
    world.ended()


async def test_the_active_model_is_told_to_be_displaced_before_its_requests_are_awaited(
    targets: dict[str, Target],
) -> None:
    """A client that follows what serves asks it no more, while it may take long to end what it answers."""
    world = World()
    await world.swapper.swap(targets["a1"])
    seen: list[tuple[str, object]] = []
    world.changed = lambda: seen.append((world.script.names[-1], world.swapper.slots.of("a1")))
    await world.swapper.serve(targets["a2"])
    assert ("point", None) in seen and "drain" in world.script.names[world.script.names.index("point", 3) :]
    await world.swapper.close()
    world.ended()


def contended(**options: Any) -> World:
    """On a GPU, where models of one architecture may have two engines."""
    return World(**{"room": 10, "gpus": 1, "policy": Policy(1, 2, per_architecture=2), **options})


async def take_turns(world: World, targets: Mapping[str, Target], *names: str) -> list[How]:
    """Between turns, what is started beside is waited for."""
    hows = []
    for name in names:
        hows.append((await world.swapper.serve(targets[name])).how)
        await world.swapper.settled()
        world.check()
    return hows


async def test_models_that_take_turns_often_get_an_engine_each_while_memory_is_free(
    targets: dict[str, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(slots, "time", SimpleNamespace(monotonic=lambda: now))
    world = contended()

    async def turns(*names: str, after_s: float) -> list[How]:
        nonlocal now
        hows = []
        for name in names:
            now += after_s
            hows += await take_turns(world, targets, name)
        return hows

    assert await turns("a1", "a2", "a1", "a2", "a1", "a2", after_s=31) == [How.START] + 5 * [How.REBIND]
    assert await turns("a1", "a2", after_s=2) == 2 * [How.REBIND], "the next one is the fourth in 30 s"
    assert len(world.swapper.slots) == 1
    assert await turns("a1", after_s=2) == [How.REBIND]
    assert world.serving() == ("", {"a1"}) and len(world.swapper.slots.parked) == 1
    assert await world.swapper.displaced_by(targets["a2"]) == []
    assert await turns("a2", after_s=0) == [How.WAKE]
    assert world.serving() == ("", {"a1", "a2"})
    assert await turns("a3", after_s=0) == [How.REBIND], "two engines are as many as may be"
    await world.swapper.close()
    world.ended()


class Held:
    """Holds back the next start of an engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_begun, self.may_go_on = asyncio.Event(), asyncio.Event()
        start = FakeEngine.start

        async def held(engine: FakeEngine, binding: Binding) -> EngineImage | None:
            if not self.is_begun.is_set():
                self.is_begun.set()
                await self.may_go_on.wait()
            return await start(engine, binding)

        monkeypatch.setattr(FakeEngine, "start", held)


async def test_nobody_waits_for_the_start_of_an_engine_beside(
    targets: dict[str, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = contended()
    await world.swapper.swap(targets["b"])
    await world.swapper.park()
    await take_turns(world, targets, "a1", "a2", "a1", "a2")
    held = Held(monkeypatch)
    assert (await world.swapper.serve(targets["a1"])).how is How.REBIND
    await held.is_begun.wait()
    assert [t.model_name for t in await world.swapper.displaced_by(targets["a2"])] == ["a1"]
    assert (await world.swapper.serve(targets["a2"])).how is How.REBIND, "they go on taking turns"
    assert (await world.swapper.swap(targets["b"])).how is How.WAKE
    held.may_go_on.set()
    await world.swapper.settled()
    world.check()
    assert (await world.swapper.serve(targets["a1"])).how is How.WAKE
    assert world.serving() == ("b", {"a1", "a2"})
    await world.swapper.close()
    world.ended()


async def test_an_engine_that_is_started_beside_gives_way(
    targets: dict[str, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that serves is put away for one that nobody has asked for."""
    world = contended(room=3)
    await world.swapper.serve(targets["b"])
    await take_turns(world, targets, "a1", "a2", "a1", "a2")
    held = Held(monkeypatch)
    await world.swapper.serve(targets["a1"])
    await held.is_begun.wait()
    assert await world.swapper.displaced_by(targets["c"]) == []
    assert (await world.swapper.serve(targets["c"])).how is How.START
    assert world.serving() == ("", {"a1", "b", "c"})
    assert [engine.state for engine in world.factory.engines].count(EngineState.FAILED) == 1
    world.check()
    await world.swapper.close()
    world.ended()


@pytest.mark.parametrize("how", ["the daemon ends", "memory is short"])
async def test_a_start_beside_is_given_up_when(
    how: str, targets: dict[str, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = contended()
    await take_turns(world, targets, "a1", "a2", "a1", "a2")
    held = Held(monkeypatch)
    await world.swapper.serve(targets["a1"])
    await held.is_begun.wait()
    if how == "memory is short":
        assert world.swapper.has_parked and await world.swapper.stop_parked(at_most=1) == 1
        world.check()
    await world.swapper.close()
    assert len(world.factory.engines) == 2
    assert all(engine.state is EngineState.FAILED for engine in world.factory.engines)
    world.ended()


@pytest.mark.parametrize(
    ("gpus", "room", "limit", "first", "free_bytes"),
    [
        (0, 10, 2, "serve", 1 << 40), (1, 1, 2, "serve", 1 << 40), (1, 10, 2, "serve", ENGINE_BYTES - 1),
        (1, 10, 1, "serve", 1 << 40), (1, 10, 2, "swap", 1 << 40),
    ],
    ids=["its memory is unknown", "the GPU is full", "the machine is", "one may be", "it replaces the active one"],
)  # fmt: skip
async def test_models_go_on_taking_turns_where(
    gpus: int, room: int, limit: int, first: str, free_bytes: int, targets: dict[str, Target]
) -> None:
    world = World(room=room, gpus=gpus, policy=Policy(1, 2, per_architecture=limit))
    world.free_bytes = free_bytes
    for name in ("a1", "a2") * 4:
        await (world.swap if first == "swap" else world.serve)(targets[name])
        await world.swapper.settled()
        world.check()
    assert len(world.factory.engines) == 1
    await world.swapper.close()
    world.ended()


@pytest.mark.parametrize("fault", [Fault.NO_MEMORY, Fault.FAILS, Fault.DIES])
@pytest.mark.parametrize("step", ["start", "drain", "park"])
async def test_models_go_on_taking_turns_where_no_other_engine_starts(
    step: str, fault: Fault, targets: dict[str, Target]
) -> None:
    world = contended(cache_bytes=ARENA_BYTES)
    await take_turns(world, targets, "a1", "a2", "a1", "a2")
    world.script.arm(fault, 3 + ["start", "drain", "park"].index(step))  # drain, rebind, open
    assert await take_turns(world, targets, "a1") == [How.REBIND]
    assert world.script.names[world.script.at] == step
    world.script.fault = None
    assert world.serving() == ("", {"a1"}) and len(world.swapper.slots) == 1
    names = ("a2", "a1", "a2", "a1", "a2", "a1")
    assert await take_turns(world, targets, *names) == 6 * [How.REBIND], "none is started again for each turn"
    await world.swapper.close()
    world.ended()


async def test_an_engine_beside_that_ends_is_told_of_and_its_swap_goes_on(targets: dict[str, Target]) -> None:
    world = World()
    await world.swapper.swap(targets["a1"])
    await world.swapper.serve(targets["b"])
    world.factory.engines[1].die()
    assert world.lost == ["b"] and world.serving() == ("a1", set())
    world.check()
    await world.swapper.close()
    world.ended()


async def test_engines_that_serve_beside_are_passed_on(targets: dict[str, Target]) -> None:
    world = World()
    await world.swapper.swap(targets["a1"])
    await world.swapper.serve(targets["b"])
    await world.swapper.serve(targets["c"])
    await world.swapper.park(targets["c"])
    await world.pass_on(targets)
    assert world.serving() == ("a1", {"b"})
    world.check()
    await world.swapper.close()
    world.ended()


@settings(max_examples=60, deadline=None)
@given(
    room=st.sampled_from([1, 2, 3, 10]),
    gpus=st.integers(0, 2),
    most_cache_bytes=st.sampled_from([0, 4 * ARENA_BYTES, 1 << 30]),
    per_architecture=st.integers(1, 3),
    copies=st.booleans(),
    own_images=st.booleans(),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["swap", "serve"]), st.sampled_from(["a1", "a2", "a3", "b", "c", "q"]),
            st.sampled_from([None, *Fault]), st.integers(0, 7),
        ),
        max_size=12,
    ),
)  # fmt: skip
def test_any_sequence_of_swaps_serves_and_faults(
    room: int,
    gpus: int,
    most_cache_bytes: int,
    per_architecture: int,
    copies: bool,
    own_images: bool,
    steps: list[tuple[str, str, Fault | None, int]],
    targets: dict[str, Target],
) -> None:
    async def run() -> None:
        policy = Policy(0.0, 1, HANGS_S, per_architecture=per_architecture)
        world = World(
            room=room, policy=policy, gpus=gpus, cache_bytes=ARENA_BYTES, most_cache_bytes=most_cache_bytes,
            copies=copies, own_images=own_images,
        )  # fmt: skip
        for step, name, fault, moment in steps:
            before = world.serving()
            if fault:
                world.script.arm(fault, moment)
            error = await (world.swap if step == "swap" else world.serve)(targets[name])
            await world.swapper.settled()
            world.script.fault = None
            lost, world.lost = set(world.lost), []
            world.check()
            active, beside = world.serving()
            if error:
                assert active == before[0] and before[1] - lost <= beside <= before[1]
            elif name not in lost:  # its engine, which served already, may end after it was made the active one
                assert name == active if step == "swap" else name in {active, *beside}
        await world.swapper.close()
        world.ended()

    asyncio.run(run())


@pytest.mark.parametrize("fault", [Fault.HANGS, Fault.FAILS, Fault.DIES])
@pytest.mark.parametrize("wanted", ["a2", "b"])
async def test_a_swap_away_from_an_engine_that_is_stuck_ends_it_after_the_drain_limit(
    wanted: str, fault: Fault, targets: dict[str, Target]
) -> None:
    """One that could have taken the new model, too."""
    world = World(policy=Policy(drain_timeout_s=0.0, order_timeout_s=60.0, cut_timeout_s=0.05))
    await world.swapper.swap(targets["a1"])
    (stuck,) = world.factory.engines
    world.script.arm(fault, 1 if wanted == "a2" else 3)  # load, drain; load, start, point, drain
    async with asyncio.timeout(30):
        outcome = await world.swapper.swap(targets[wanted])
    assert world.script.struck and world.script.names[world.script.at] == "drain"
    assert outcome.how is How.START and world.answering() == wanted
    assert stuck.state is EngineState.FAILED
    world.check()
    await world.swapper.close()
    world.ended()


@settings(max_examples=40, deadline=None)
@given(
    room=st.sampled_from([1, 2, 10]),
    gpus=st.integers(0, 2),
    swaps=st.lists(
        st.tuples(st.sampled_from(["a1", "a2", "a3", "b", "c"]), st.sampled_from([None, *Fault]), st.integers(0, 7)),
        max_size=12,
    ),
)
def test_any_sequence_of_swaps_and_faults(
    room: int, gpus: int, swaps: list[tuple[str, Fault | None, int]], targets: dict[str, Target]
) -> None:
    async def run() -> None:
        world = World(room=room, policy=Policy(0.0, 1, HANGS_S), gpus=gpus)
        for name, fault, moment in swaps:
            before = world.answering()
            if fault:
                world.script.arm(fault, moment)
            error = await world.swap(targets[name])
            world.script.fault = None
            world.check()
            assert world.answering() == (before if error else name)
        await world.swapper.close()
        world.ended()

    asyncio.run(run())


async def test_an_image_is_made_once_and_mapped_from_then_on(targets: dict[str, Target]) -> None:
    world = World(gpus=1)
    for name in ("a1", "b", "a2"):
        await world.swapper.swap(targets[name])
        world.check()
    steps = len(world.script.names)
    for name in ("a1", "b", "a2"):
        outcome = await world.swapper.swap(targets[name])
        assert outcome.from_tier is Tier.DEVICE
        world.check()
    assert "load" not in world.script.names[steps:], "nothing is read, in whichever tier the checkpoint is"
    cache = world.residency.cache("sim:0")
    assert sorted(i.id for i in world.images.known.values()) == sorted(r.checkpoint.id for r in cache.residents())
    await world.swapper.park()
    for checkpoint_id in [resident.checkpoint.id for resident in cache.residents()]:
        await world.residency.evict(checkpoint_id)
    await world.residency.evict(targets["a1"].checkpoint.id)
    await world.swapper.swap(targets["a1"])
    assert world.script.names[-3:] == ["load", "wake", "point"], "what no tier has any more is made again"
    world.check()
    await world.swapper.close()
    world.ended()


async def test_an_engine_that_starts_with_an_image_is_told_the_layout_of_the_checkpoint(
    targets: dict[str, Target],
) -> None:
    world = World(gpus=1)
    for is_image in (False, True):
        await world.swapper.swap(targets["a1"])
        (slot,) = world.swapper.slots
        weights = slot.engine.binding.weights  # type: ignore[attr-defined]
        assert weights.is_image is is_image
        assert weights.checkpoint_layout == (targets["a1"].checkpoint.layout_json() if is_image else "")
        await world.swapper.stop_engine(slot.engine.number)
    await world.swapper.close()
    world.ended()


async def test_a_parked_engine_makes_the_image_of_a_new_model_and_the_first_swap_maps_it(
    targets: dict[str, Target],
) -> None:
    world = World(gpus=1)
    for name in ("a1", "b"):
        await world.swapper.swap(targets[name])
    steps = len(world.script.names)
    assert await world.swapper.prepare(targets["a2"])
    assert world.answering() == "b" and world.script.names[steps:] == ["load", "make image"]
    world.check()
    assert not await world.swapper.prepare(targets["a2"]), "it is there already"
    assert not await world.swapper.prepare(targets["c"]), "no engine of its kind is parked"
    assert not await world.swapper.prepare(targets["b"]), "that engine answers"
    world.check()
    outcome = await world.swapper.swap(targets["a2"])
    assert (outcome.how, outcome.from_tier) == (How.WAKE, Tier.DEVICE)
    world.check()


async def test_an_image_is_made_where_the_cache_of_its_engine_has_no_room(targets: dict[str, Target]) -> None:
    """Another engine has taken what was free for its own."""
    world = World(gpus=1, cache_bytes=ARENA_BYTES, most_cache_bytes=1 << 30)
    for name in ("a1", "b"):
        await world.swapper.serve(targets[name])
        await world.swapper.park(targets["a1"]) if name == "a1" else None
    pool = world.residency.cache("sim:0").pool
    assert world.factory.engines[0].cache_bytes > pool.free_bytes
    assert await world.swapper.prepare(targets["a2"])
    world.check()
    assert len(world.factory.engines) == 2 and world.factory.engines[0].state is EngineState.PARKED
    await world.swapper.close()
    world.ended()


async def test_nothing_makes_way_for_what_nobody_has_asked_for(targets: dict[str, Target]) -> None:
    world = World(gpus=1, room=2)
    for name in ("a1", "b"):
        await world.swapper.swap(targets[name])
    there = {name: cache.pool.used_bytes for name, cache in world.residency.caches.items()}
    assert not await world.swapper.prepare(targets["a2"])
    assert {name: cache.pool.used_bytes for name, cache in world.residency.caches.items()} == there
    world.check()


@pytest.mark.parametrize("fault", list(Fault))
async def test_a_fault_at_any_step_of_making_ready_costs_the_parked_engine_at_most(
    fault: Fault, targets: dict[str, Target]
) -> None:
    for moment in itertools.count():
        world = World(policy=Policy(0.0, 1, HANGS_S), gpus=1)
        for name in ("a1", "b"):
            await world.swapper.swap(targets[name])
        world.script.old = world.factory.engines[0]
        world.script.arm(fault, moment)
        world.script.swap = asyncio.ensure_future(world.swapper.prepare(targets["a2"]))
        await asyncio.gather(world.script.swap, return_exceptions=True)
        world.script.fault = None
        world.check()
        assert world.answering() == "b", (moment, world.script.names)
        await world.swapper.swap(targets["a2"])
        assert world.answering() == "a2"
        world.check()
        await world.swapper.close()
        world.ended()
        if not world.script.struck:
            assert moment >= 2
            return


async def test_room_for_a_start_is_made_and_given_back_when_it_serves(targets: dict[str, Target]) -> None:
    world = World(room=2, gpus=1, starting_bytes=ARENA_BYTES)  # with which b would fit beside a2, but for its start
    for name, how, makes_way in (("a1", How.START, False), ("a2", How.REBIND, False), ("b", How.START, True)):
        outcome = await world.swapper.swap(targets[name])
        assert (outcome.how, "making_way" in outcome.phases) == (how, makes_way)
        world.check()
    assert (await world.swapper.swap(targets["a1"])).how is How.WAKE
    world.check()


async def test_a_cache_takes_what_is_free_but_room_for_one_more_such_model(targets: dict[str, Target]) -> None:
    world = World(room=10, gpus=2, cache_bytes=ARENA_BYTES, most_cache_bytes=1 << 30)  # 41 pieces on each
    like_it = 2 + 3  # pieces for weights as they are planned, and besides
    await world.swapper.swap(targets["a1"])
    engine = world.factory.engines[0]
    assert engine.cache_bytes == (41 - like_it - like_it + 1) * ARENA_BYTES
    world.check()

    await world.swapper.swap(targets["a2"])
    assert world.factory.engines == [engine], "a model of the same architecture gets the engine with its cache"
    world.check()

    await world.swapper.serve(targets["b"])
    assert world.factory.engines[1].cache_bytes == ARENA_BYTES, (
        "and there was room for another, with the least it needs"
    )
    assert world.serving() == ("a2", {"b"})
    world.check()

    await world.swapper.park(targets["a2"])
    await world.swapper.park(targets["b"])
    assert (await world.swapper.serve(targets["a1"])).how is How.WAKE
    assert engine.cache_bytes == (41 - like_it - like_it + 1) * ARENA_BYTES, "which it got again"
    world.check()
    await world.pass_on(targets)
    world.check()
    await world.swapper.close(leaving=False)
    world.ended()


async def test_a_cache_takes_nothing_that_is_freed_for_something_else(
    targets: dict[str, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(room=10, gpus=1, cache_bytes=ARENA_BYTES, most_cache_bytes=1 << 30)
    await world.swapper.swap(targets["b"])
    await world.swapper.stop_engine(1)
    cache, load = world.residency.cache("sim:0"), world.load
    claims: list[asyncio.Task[Reservation]] = []

    async def loaded(*args: Any, **options: Any) -> None:
        """Meanwhile something else needs more than is free, and so that the image of b leaves."""
        claims.append(asyncio.create_task(cache.claim(cache.pool.free_bytes + ARENA_BYTES)))
        while cache.residents():
            await asyncio.sleep(0)
        await load(*args, **options)

    monkeypatch.setattr(world, "load", loaded)
    with cache.reading(""):  # for which the memory of the image is waited for
        swap = asyncio.create_task(world.swapper.swap(targets["a1"]))
        await asyncio.wait({swap}, timeout=0.1)
        assert claims and not claims[0].done()
    (await claims[0]).release()
    await swap
    assert world.factory.engines[1].cache_bytes == ARENA_BYTES
    world.check()
    await world.swapper.close()
    world.ended()


async def test_a_cache_is_no_larger_than_is_of_use(targets: dict[str, Target]) -> None:
    world = World(room=10, gpus=1, cache_bytes=ARENA_BYTES, most_cache_bytes=2 * ARENA_BYTES)
    await world.swapper.swap(targets["a1"])
    assert world.factory.engines[0].cache_bytes == 2 * ARENA_BYTES
    world.check()


async def test_a_cache_for_which_there_is_no_room_after_a_nap_is_a_smaller_one(targets: dict[str, Target]) -> None:
    """The engine is started anew for it, and nothing makes way."""
    world = World(room=10, gpus=1, cache_bytes=ARENA_BYTES, most_cache_bytes=1 << 30)
    await world.swapper.serve(targets["a1"])
    await world.swapper.park(targets["a1"])
    await world.swapper.serve(targets["b"])
    world.check()
    assert world.factory.engines[1].cache_bytes > 20 * ARENA_BYTES, "of what the first one does not use"
    assert await world.swapper.displaced_by(targets["a2"]) == []
    assert (await world.swapper.serve(targets["a2"])).how is How.START
    assert world.serving() == ("", {"a2", "b"})
    assert world.factory.engines[2].cache_bytes == ARENA_BYTES
    assert world.factory.engines[0].state is EngineState.FAILED
    world.check()


@pytest.mark.parametrize(("first", "step"), [([], "start"), (["a1"], "wake")])
async def test_a_cache_for_which_a_gpu_has_less_memory_than_its_pool_says_is_the_least(
    first: list[str], step: str, targets: dict[str, Target]
) -> None:
    world = World(room=10, gpus=1, cache_bytes=ARENA_BYTES, most_cache_bytes=1 << 30)
    for name in first:
        await world.swapper.swap(targets[name])
        await world.swapper.park()
        assert world.factory.engines[-1].cache_bytes > ARENA_BYTES
    world.script.arm(Fault.NO_MEMORY, 1)  # after the load
    outcome = await world.swapper.swap(targets["a2"])
    assert world.script.names[world.script.at] == step
    assert outcome.how is How.START and world.answering() == "a2"
    assert world.factory.engines[-1].cache_bytes == ARENA_BYTES
    world.check()
    await world.swapper.close()
    world.ended()


def used_at_starts(world: World, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list, to which every start of an engine adds the bytes of the first GPU's pool that are in use."""
    pool, start = world.residency.cache("sim:0").pool, FakeEngine.start
    used_bytes: list[int] = []

    async def watched(engine: FakeEngine, binding: Binding) -> EngineImage | None:
        used_bytes.append(pool.used_bytes)
        return await start(engine, binding)

    monkeypatch.setattr(FakeEngine, "start", watched)
    return used_bytes


async def test_the_memory_for_a_start_is_reserved_again_if_its_cache_has_to_be_smaller(
    targets: dict[str, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of it had become cache."""
    building_bytes = 12 * ARENA_BYTES
    world = World(room=6, gpus=1, starting_bytes=building_bytes, cache_bytes=ARENA_BYTES, most_cache_bytes=1 << 30)
    used_bytes = used_at_starts(world, monkeypatch)
    world.script.arm(Fault.NO_MEMORY, 1)  # after the load
    await world.swapper.swap(targets["a1"])
    besides_bytes, weights_bytes = WORKING_BYTES - ARENA_BYTES, 2 * ARENA_BYTES
    assert len(used_bytes) == 2 and used_bytes[1] == besides_bytes + weights_bytes + building_bytes
    world.check()
    await world.swapper.close()
    world.ended()


async def test_a_start_in_place_of_an_engine_that_died_in_its_sleep_has_its_memory(
    targets: dict[str, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(room=6, gpus=1, starting_bytes=12 * ARENA_BYTES)
    used_bytes = used_at_starts(world, monkeypatch)
    await world.swapper.swap(targets["a1"])
    await world.swapper.park()
    world.script.arm(Fault.DIES, 0)
    assert (await world.swapper.swap(targets["a1"])).how is How.START
    assert world.script.names[world.script.at] == "wake"
    assert used_bytes[1] == ARENA_BYTES + WORKING_BYTES + 12 * ARENA_BYTES, (
        "of its image, while serving, and until then"
    )
    world.check()
    await world.swapper.close()
    world.ended()


@pytest.mark.parametrize(("room", "how"), [(20, How.WAKE), (10, How.START)], ids=["there is room", "there is none"])
async def test_another_parked_engine_than_the_dead_one_is_woken_if_its_own_cache_has_room(
    room: int, how: How, targets: dict[str, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    most_bytes = 20 * ARENA_BYTES
    policy = Policy(1, 2, per_architecture=2)
    world = World(room=room, gpus=1, policy=policy, cache_bytes=ARENA_BYTES, most_cache_bytes=most_bytes)
    await world.swapper.serve(targets["a1"])
    monkeypatch.setattr(world.factory, "_most_cache_bytes", 2 * ARENA_BYTES)
    monkeypatch.setattr(slots.EngineSlot, "is_contended", True)
    await world.swapper.serve(targets["a2"])
    await world.swapper.settled()
    monkeypatch.setattr(slots.EngineSlot, "is_contended", False)
    large, small = world.factory.engines
    assert large.cache_bytes == most_bytes and small.cache_bytes == 2 * ARENA_BYTES
    await world.swapper.park(targets["a2"])
    assert (await world.swapper.serve(targets["a1"])).engine_number == large.number, "the one that was parked last"
    await world.swapper.serve(targets["a2"])
    await world.swapper.park(targets["a1"])
    await world.swapper.park(targets["a2"])
    if how is How.START:
        await world.swapper.serve(targets["b"])
        monkeypatch.setattr(world.factory, "_most_cache_bytes", most_bytes)
        await world.swapper.serve(targets["c"])
    world.script.arm(Fault.DIES, 1)  # after the load; the small one was parked last
    outcome = await world.swapper.serve(targets["a3"])
    assert small.state is EngineState.FAILED and outcome.how is how
    world.check()
    await world.swapper.close()
    world.ended()


async def test_an_engine_with_an_image_is_not_taken_over_where_its_gpu_is_gone(targets: dict[str, Target]) -> None:
    world = World(gpus=1, copies=True)
    await world.swapper.swap(targets["a1"])
    world.factory._gpus = []
    await world.pass_on(targets)
    assert world.factory.engines[0].state is EngineState.FAILED and not world.swapper.slots


async def test_memory_for_a_start_becomes_cache_when_it_is_over(targets: dict[str, Target]) -> None:
    building_bytes = 12 * ARENA_BYTES
    world = World(room=6, gpus=1, starting_bytes=building_bytes, cache_bytes=ARENA_BYTES, most_cache_bytes=1 << 30)
    await world.swapper.swap(targets["a1"])
    needed = 2 + 3  # pieces for weights as they are planned, and besides
    left = 25 - needed - (needed + 11)  # with the start of one more such model
    assert world.factory.engines[0].cache_bytes == (1 + left) * ARENA_BYTES
    world.check()


async def test_what_an_engine_has_copied_is_not_held_for_it(targets: dict[str, Target]) -> None:
    world = World(copies=True)
    for name in ("a1", "a2", "b", "a1"):  # start, rebind, start, wake
        await world.swapper.swap(targets[name])
        world.check()
        await world.residency.evict(targets[name].checkpoint.id)
    await world.pass_on(targets)
    world.check()
    assert world.answering() == "a1", "the next daemon does not need it either"
    await world.swapper.close(leaving=False)
    world.ended()


async def test_a_start_for_which_there_is_never_room_is_refused_before_anything_starts(
    targets: dict[str, Target],
) -> None:
    world = World(room=1, gpus=1)
    taken = await world.residency.cache("sim:0").claim(ARENA_BYTES)
    with pytest.raises(OutOfMemory):
        await world.swapper.swap(targets["a1"])
    assert not world.factory.engines
    taken.release()
    world.ended()


async def test_an_image_that_makes_no_sense_is_not_kept(targets: dict[str, Target], tmp_path: Path) -> None:
    world = World(gpus=1)
    for wrong in ("not an arena", "another size"):
        file = (tmp_path / "file").open("wb")

        def made(
            engine: FakeEngine, binding: Binding, wrong: str = wrong, fd: int = os.dup(file.fileno())
        ) -> EngineImage:
            if wrong == "not an arena":
                return EngineImage((RankMemory(fd, ARENA_BYTES, "the layout"),))
            return EngineImage((image_arena(3 * ARENA_BYTES),))

        with unittest.mock.patch.object(FakeEngine, "_made", made):
            await world.swapper.swap(targets["a1" if wrong == "not an arena" else "b"])
        file.close()
        assert world.images.known == {} and world.answering()
        active = world.swapper.slots.active
        assert active and active.supply and not active.supply.is_image
    await world.swapper.close()
    world.ended()


@pytest.mark.parametrize("how", ["start", "rebind"])
async def test_a_cancel_while_an_image_is_taken_in_leaves_no_memory_that_nobody_has(
    targets: dict[str, Target], how: str
) -> None:
    world = World(gpus=1)
    if how == "rebind":
        await world.swapper.swap(targets["a2"])
    begun, may_go_on = threading.Event(), threading.Event()
    adopted: list[HostArena] = []
    adopt = HostDevice.adopt

    def slowly(device: HostDevice, fd: int, size_bytes: int) -> HostArena:
        begun.set()
        assert may_go_on.wait(PATIENCE_S)
        adopted.append(adopt(device, fd, size_bytes))
        return adopted[0]

    with unittest.mock.patch.object(HostDevice, "adopt", slowly):
        swap = asyncio.create_task(world.swapper.swap(targets["a1"]))
        assert await asyncio.to_thread(begun.wait, 10)
        swap.cancel()
        await asyncio.sleep(0)
        may_go_on.set()
        with contextlib.suppress(asyncio.CancelledError):  # too late for an engine with the new weights
            await swap
    world.check()
    (arena,) = adopted
    owned = [resident.arena for resident in world.residency.cache("sim:0").residents()]
    assert arena in owned, "it is in the ledger, to be evicted when its room is needed"
    await world.swapper.close()
    world.ended()


async def test_a_model_too_large_for_its_image_beside_it_serves_without_one(targets: dict[str, Target]) -> None:
    """While an image is made, the weights are on the GPU twice."""
    world = World(room=4, gpus=1, starting_bytes=20 * ARENA_BYTES)
    await world.swapper.serve(targets["b"])
    active = world.swapper.slots.of("b")
    assert active and active.supply and not active.supply.is_image and active.engine.binding
    assert not active.engine.binding.weights.wants_image and not active.engine.binding.weights.is_image
    assert not active.supply.plan.makes_image and not active.takes_others
    await world.swapper.serve(targets["c"])
    assert {slot.target.model_name for slot in world.swapper.slots.serving} == {"b", "c"}, "there is room for both"
    assert not world.images.known
    await world.swapper.close()
    world.ended()


async def test_a_model_makes_an_image_if_it_can_when_others_make_way(targets: dict[str, Target]) -> None:
    world = World(room=4, gpus=1, starting_bytes=10 * ARENA_BYTES)
    await world.swapper.serve(targets["b"])
    await world.swapper.serve(targets["c"])
    (serving,) = world.swapper.slots.serving
    assert serving.target.model_name == "c" and serving.supply and serving.supply.is_image
    world.check()
    await world.swapper.close()
    world.ended()


async def test_what_served_without_an_image_is_put_back_so(targets: dict[str, Target]) -> None:
    world = World(room=1, gpus=1, starting_bytes=20 * ARENA_BYTES)
    await world.swapper.swap(targets["b"])
    start = FakeEngine.start

    async def start_unless_c(engine: FakeEngine, binding: Binding) -> EngineImage | None:
        if binding.model.name == "c":
            raise EngineFailed("its configuration is wrong")
        return await start(engine, binding)

    with unittest.mock.patch.object(FakeEngine, "start", start_unless_c), pytest.raises(EngineFailed):
        await world.swapper.swap(targets["c"])
    active = world.swapper.slots.active
    assert world.answering() == "b" and active and active.supply and not active.supply.is_image
    assert len(world.factory.engines) == 3, "it was stopped to make room"
    await world.swapper.close()
    world.ended()


async def test_an_image_that_only_its_engine_can_map_is_mapped_by_it_and_gone_with_it(
    targets: dict[str, Target],
) -> None:
    world = World(gpus=1, own_images=True)
    await world.swapper.swap(targets["a1"])
    await world.swapper.swap(targets["a2"])
    (engine,) = world.factory.engines
    assert engine.binding and not engine.binding.weights.is_image, "each is made when its weights come first"
    for name in ("a1", "a2"):
        await world.swapper.swap(targets[name])
        assert engine.binding.weights.is_image and engine.binding.model.name == name
    await world.swapper.park()
    await world.swapper.swap(targets["a1"])
    assert world.script.names[-2:] == ["wake", "point"] and engine.binding.weights.is_image
    world.check()
    await world.pass_on(targets)
    active = world.swapper.slots.active
    assert active and active.supply and active.supply.maker == engine.identity, "the next daemon knows whose it is"
    await world.swapper.swap(targets["a2"])
    assert engine.binding.weights.is_image
    engine.die()
    await eventually(lambda: not world.images.known)
    await world.swapper.swap(targets["a1"])
    another = world.factory.engines[-1]
    assert another is not engine and another.binding and not another.binding.weights.is_image
    world.check()
    await world.swapper.close()
    world.ended()


async def test_an_engine_that_cannot_take_other_weights_makes_way_for_a_new_one(targets: dict[str, Target]) -> None:
    """It ends itself if it would answer with a mixture of both."""
    world = World(gpus=1, own_images=True)
    await world.swapper.swap(targets["a1"])
    rebind = FakeEngine.rebind

    async def end(engine: FakeEngine, binding: Binding) -> EngineImage | None:
        engine.die()
        return await rebind(engine, binding)

    world.script.fault = None
    with unittest.mock.patch.object(FakeEngine, "rebind", end):
        outcome = await world.swapper.swap(targets["a2"])
    assert outcome.how is How.START and world.answering() == "a2"
    world.check()
    await world.swapper.settled()
    assert {world.images.makers[key] for key in world.images.known} == {"engine 2"}
    await world.swapper.close()
    world.ended()


async def test_memory_for_an_image_is_not_reserved_again_for_an_engine_that_makes_none(
    targets: dict[str, Target],
) -> None:
    world = World(gpus=1, starting_bytes=2 * ARENA_BYTES)
    with unittest.mock.patch.object(FakeEngine, "_made", lambda engine, binding: None):
        await world.swapper.swap(targets["b"])
        (engine,) = world.factory.engines
        assert engine.binding and engine.binding.weights.wants_image
        await world.swapper.swap(targets["c"])
        await world.swapper.swap(targets["b"])
    active = world.swapper.slots.active
    assert world.answering() == "b" and active and active.supply and not active.supply.wants_image
    await world.swapper.close()
    world.ended()


async def test_an_image_of_an_engine_that_has_ended_is_not_kept(targets: dict[str, Target]) -> None:
    world = World(gpus=1, own_images=True)
    take_in = Supplier.take_in

    async def after_its_end(supplier: Supplier, *arguments: Any) -> None:
        world.factory.engines[-1].die()
        supplier.engine_ended(world.factory.engines[-1])
        await supplier.settled()
        await take_in(supplier, *arguments)

    with unittest.mock.patch.object(Supplier, "take_in", after_its_end), contextlib.suppress(EngineFailed):
        await world.swapper.swap(targets["b"])
    await world.swapper.settled()
    assert not world.images.known and not world.residency.cache("sim:0").residents()
    await world.swapper.close()
    world.ended()


async def test_an_engine_that_ends_while_its_own_image_is_brought_is_replaced(targets: dict[str, Target]) -> None:
    world = World(gpus=1, own_images=True)
    await world.swapper.swap(targets["a1"])
    await world.swapper.swap(targets["a2"])
    await world.swapper.park()
    (engine,) = world.factory.engines
    provide = Supplier.provide

    async def and_die(supplier: Supplier, *arguments: Any, **options: Any) -> Supply:
        supply = await provide(supplier, *arguments, **options)
        if engine.state is not EngineState.FAILED:
            assert supply.maker == engine.identity
            engine.die()
        return supply

    with unittest.mock.patch.object(Supplier, "provide", and_die):
        await world.swapper.swap(targets["a1"])
    another = world.factory.engines[-1]
    assert another is not engine and another.binding and another.binding.weights.wants_image
    world.check()
    await world.swapper.close()
    world.ended()


async def test_an_image_of_two_ranks_is_on_two_devices_and_whole_or_not_at_all(targets: dict[str, Target]) -> None:
    world = World(gpus=2)
    await world.swapper.swap(targets["a1"])
    active = world.swapper.slots.active
    assert active and active.engine.binding and active.supply
    assert active.engine.binding.devices == ("sim:0", "sim:1")
    await world.swapper.swap(targets["b"])
    await world.swapper.swap(targets["a1"])
    again = world.swapper.slots.active
    assert again and again.supply and again.engine.binding
    held = [hold.arena.fd for hold in again.supply.holds]
    assert len(held) == 2 and [rank.fd for rank in again.engine.binding.weights.ranks] == held
    world.check()

    await world.swapper.park()
    lost, left = (f"image of {targets['a1'].checkpoint.id} on {gpu}" for gpu in ("sim:1", "sim:0"))
    await world.residency.evict(lost)
    await world.swapper.swap(targets["a1"])
    assert world.script.names[-2:] == ["wake", "point"], "a part that is nowhere any more is made again, with the other"
    assert {lost, left} < world.images.known.keys()
    world.check()

    def half(engine: FakeEngine, binding: Binding) -> EngineImage:
        return EngineImage((image_arena(),))

    with unittest.mock.patch.object(FakeEngine, "_made", half):
        await world.swapper.swap(targets["c"])
    active = world.swapper.slots.active
    assert active and active.supply and not active.supply.is_image, "one rank's part is no image"
    await world.swapper.close()
    world.ended()


async def test_memory_that_was_reserved_for_weights_is_taken_by_nothing_else(
    targets: dict[str, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(gpus=1)
    await world.swapper.swap(targets["a1"])
    await world.swapper.stop_engine(1)
    cache = world.residency.cache("sim:0")
    (await cache.claim(cache.pool.budget_bytes)).release()  # for which the image moved to the host
    (image,) = world.images.known.values()
    assert world.residency.devices_of(image.id) == ["host"]
    others = [await cache.claim(cache.pool.free_bytes - WORKING_BYTES - ARENA_BYTES)]
    claim, greedy = cache.claim, set[asyncio.Task[None]]()

    async def take_what_is_free() -> None:
        while True:
            if cache.pool.free_bytes:
                others.append(await claim(cache.pool.free_bytes))
            await asyncio.sleep(0)

    async def claimed(size_bytes: int) -> Reservation:
        made = await claim(size_bytes)
        greedy.add(asyncio.create_task(take_what_is_free()))
        return made

    monkeypatch.setattr(cache, "claim", claimed)
    outcome = await world.swapper.swap(targets["a1"])
    assert outcome.from_tier is Tier.HOST and len(others) == 1
    for each in greedy:
        each.cancel()
    for other in others:
        other.release()
    world.check()
    await world.swapper.close()
    world.ended()


async def test_nothing_moves_unless_there_is_room_on_every_device(targets: dict[str, Target]) -> None:
    world = World(gpus=2, room=2)
    await world.swapper.swap(targets["a1"])
    await world.swapper.swap(targets["b"])
    await world.swapper.park()
    for name in ("a1", "b"):
        await world.residency.evict(*(f"image of {targets[name].checkpoint.id} on {gpu}" for gpu in world.gpus))
    second = world.residency.cache("sim:1")
    taken = await second.claim(second.pool.budget_bytes - WORKING_BYTES)
    world.script.names.clear()
    assert isinstance(await world.swap(targets["a1"]), OutOfMemory)
    assert world.script.names == [], "nothing was loaded, and no engine was told of it"
    assert world.residency.cache("sim:0").pool.used_bytes == 0
    taken.release()
    await world.swapper.close()
    world.ended()


@pytest.mark.parametrize("gpus", [0, 1, 2])
async def test_another_daemon_goes_on_with_what_it_finds(targets: dict[str, Target], gpus: int) -> None:
    world = World(gpus=gpus)
    for name in ("b", "a1"):
        await world.swapper.swap(targets[name])
    for _ in range(2):
        await world.pass_on(targets)
        world.check()
        assert world.answering() == "a1"
        assert [slot.target for slot in world.swapper.slots] == [targets["a1"], targets["b"]]
    assert (await world.swapper.swap(targets["a2"])).how is How.REBIND
    assert (await world.swapper.swap(targets["b"])).how is How.WAKE
    await world.pass_on(targets)
    world.check()
    assert world.answering() == "b" and len(world.factory.engines) == 2


async def test_what_was_half_done_when_the_daemon_ended_is_done(targets: dict[str, Target]) -> None:
    """One that was held answers, if it is the active one; one that was to be parked is."""
    world = World()
    await world.swapper.swap(targets["b"])
    b = world.factory.engines[0]
    killed = EngineFailed("the daemon was killed")
    with unittest.mock.patch.object(b, "park", side_effect=killed), unittest.mock.patch.object(b, "stop"):
        await world.swapper.swap(targets["a1"])
    a = world.factory.engines[1]
    assert b.state is EngineState.SERVING and not b.open
    a.open = False
    await b.leave()
    await world.pass_on(targets)
    assert (a.state, a.open, b.state) == (EngineState.SERVING, True, EngineState.PARKED)


@pytest.mark.parametrize("fault", [Fault.FAILS, Fault.DIES])
async def test_one_that_does_not_say_what_it_holds_is_ended(targets: dict[str, Target], fault: Fault) -> None:
    world = World()
    for name in ("b", "a1"):
        await world.swapper.swap(targets[name])
    world.script.arm(fault, 1)  # the parked one speaks first
    await world.pass_on(targets)
    world.check()
    assert world.answering() is None and world.endpoint is None
    assert [slot.target.model_name for slot in world.swapper.slots] == ["b"]
    assert (await world.swapper.swap(targets["a1"])).how is How.START
    world.check()


async def test_one_whose_model_or_memory_is_gone_is_ended(targets: dict[str, Target]) -> None:
    world = World()
    for name in ("c", "b", "a1"):
        await world.swapper.swap(targets[name])
    b, a1 = (targets[name].checkpoint.id for name in ("b", "a1"))
    close = world.swapper.close

    async def closed_and_lost() -> bool:
        left = await close()
        world.swapper.slots.active.supply.release()  # type: ignore[union-attr]
        await world.residency.evict(a1)
        return left

    with unittest.mock.patch.object(world.swapper, "close", closed_and_lost):
        await world.pass_on(targets, is_known=lambda name: name != "c")
    world.check()
    assert [slot.target.checkpoint.id for slot in world.swapper.slots] == [b]


async def test_an_engine_that_dies_in_its_sleep_is_replaced_on_the_way(targets: dict[str, Target]) -> None:
    world = World()
    for name in ("a1", "b"):
        await world.swapper.swap(targets[name])
    world.script.arm(Fault.DIES, 1)  # load, wake
    assert (await world.swapper.swap(targets["a2"])).how is How.START
    world.check()


async def test_when_nothing_can_be_put_back_nobody_answers_and_the_next_swap_works(targets: dict[str, Target]) -> None:
    world = World(room=1)
    await world.swapper.swap(targets["a1"])
    world.loads = False
    assert isinstance(await world.swap(targets["b"]), TransferFailed)
    world.check()
    assert world.answering() is None and world.endpoint is None
    world.loads = True
    await world.swapper.swap(targets["b"])
    world.check()
    assert world.answering() == "b"


async def test_the_new_engine_dying_while_the_old_one_is_parked_is_told_of(targets: dict[str, Target]) -> None:
    world = World()
    await world.swapper.swap(targets["a1"])
    swap = asyncio.ensure_future(world.swapper.swap(targets["b"]))
    while world.swapper.state is not SwapState.SERVING:
        await asyncio.sleep(0)
    world.factory.engines[1].die()
    assert (await swap).how is How.START
    assert world.lost == ["b"] and world.answering() is None
    world.check()


async def test_new_aliases_reach_the_engine(targets: dict[str, Target]) -> None:
    world = World()
    await world.swapper.swap(targets["a1"])
    renamed = replace(targets["a1"], names=("a1", "friend"))
    assert (await world.swapper.swap(renamed)).how is How.REBIND
    binding = world.factory.engines[0].binding
    assert binding and binding.model.served_names == ("a1", "friend")
    assert (await world.swapper.swap(renamed)).how is How.ALREADY_ACTIVE
    world.check()


async def test_swaps_that_wait_when_the_daemon_ends_start_nothing(targets: dict[str, Target]) -> None:
    world = World()
    swaps = [asyncio.ensure_future(world.swapper.swap(targets[name])) for name in ("a1", "b")]
    await asyncio.sleep(0)
    closed = asyncio.ensure_future(world.swapper.close())
    late = asyncio.ensure_future(world.swapper.swap(targets["c"]))
    results = await asyncio.gather(*swaps, closed, late, return_exceptions=True)
    assert isinstance(results[1], Busy) and isinstance(results[3], Busy)
    assert len(world.swapper.slots) == 0 and len(world.factory.engines) == 1


async def test_swaps_to_one_model_asked_at_once_are_one_load_and_one_start(targets: dict[str, Target]) -> None:
    world = World()
    outcomes = await asyncio.gather(*(world.swapper.swap(targets["a1"]) for _ in range(5)))
    assert [outcome.how for outcome in outcomes] == [How.START, *[How.ALREADY_ACTIVE] * 4]
    assert world.script.names == ["load", "start", "point"]


async def test_a_swap_cancelled_in_the_line_lets_the_others_pass(targets: dict[str, Target]) -> None:
    world = World()
    swaps = [asyncio.ensure_future(world.swapper.swap(targets[name])) for name in ("a1", "b", "a2")]
    await asyncio.sleep(0)
    swaps[1].cancel()
    await asyncio.wait(swaps)
    assert swaps[1].cancelled() and len(world.factory.engines) == 1
    world.check()
    assert world.answering() == "a2"


async def test_two_clients_back_and_forth_never_deadlock_and_keep_their_order(targets: dict[str, Target]) -> None:
    world = World(room=2)
    order: list[str] = []

    async def client(names: list[str]) -> None:
        for _ in range(25):
            for name in names:
                await world.swapper.swap(targets[name])
                order.append(name)

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(client(["a1", "b"]), client(["a2", "c"]))
    # Each asks for its next when its last is done: strictly in turn.
    assert order == ["a1", "a2", "b", "c"] * 25
    world.check()


async def test_swaps_are_done_in_the_order_asked(targets: dict[str, Target]) -> None:
    world = World()
    done: list[str] = []

    async def one(name: str) -> None:
        await world.swapper.swap(targets[name])
        done.append(name)

    await asyncio.gather(*(one(name) for name in ("b", "a1", "c", "a2", "b")))
    assert done == ["b", "a1", "c", "a2", "b"]


async def test_parking_and_too_many_parked(targets: dict[str, Target]) -> None:
    world = World(policy=Policy(drain_timeout_s=1, max_parked=1))
    with pytest.raises(NotFound):
        await world.swapper.park()
    for name in ("a1", "b", "c"):
        await world.swapper.swap(targets[name])
    assert [slot.target.model_name for slot in world.swapper.slots] == ["c", "b"]
    assert world.factory.engines[0].state is EngineState.FAILED
    await world.swapper.park()
    world.check()
    assert world.endpoint is None and world.answering() is None
    assert (await world.swapper.swap(targets["c"])).how is How.WAKE


async def test_what_parked_engines_take_is_given_up_for_one_that_finds_no_memory(targets: dict[str, Target]) -> None:
    world = World()
    for name in ("a1", "b"):
        await world.swapper.swap(targets[name])
    world.script.arm(Fault.NO_MEMORY, 1)  # load, start
    assert (await world.swapper.swap(targets["c"])).how is How.START
    world.check()
    assert [slot.target.model_name for slot in world.swapper.slots] == ["c", "b"], (
        "who answered is parked, and not ended"
    )
    assert len(world.factory.engines) == 4
    await world.swapper.stop_parked(at_most=5)
    world.script.arm(Fault.NO_MEMORY, 0)  # start: its weights are there
    assert isinstance(await world.swap(targets["a1"]), EngineOutOfMemory), "nobody is there to be given up"
    world.check()
    assert world.answering() == "c"


async def test_parked_engines_are_stopped_longest_parked_first(targets: dict[str, Target]) -> None:
    world = World()
    for name in ("a1", "b", "c"):
        await world.swapper.swap(targets[name])
    assert world.swapper.has_parked
    assert await world.swapper.stop_parked(at_most=1) == 1
    assert [slot.target.model_name for slot in world.swapper.slots] == ["c", "b"]
    assert await world.swapper.stop_parked(at_most=5) == 1
    assert not world.swapper.has_parked and world.answering() == "c"
    world.check()


async def test_an_engine_that_none_could_wake_is_not_kept(targets: dict[str, Target]) -> None:
    world = World()
    await world.swapper.swap(targets["q"])
    await world.swapper.swap(targets["a1"])
    assert [slot.target.model_name for slot in world.swapper.slots] == ["a1"]
    assert (await world.swapper.swap(targets["q"])).how is How.START
    await world.swapper.park()
    assert [slot.target.model_name for slot in world.swapper.slots] == ["a1"]
    world.check()


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("name", ["a1", "q"])
async def test_what_cannot_be_parked_is_drained_and_stopped_to_make_way(
    name: str, gpus: int, targets: dict[str, Target]
) -> None:
    async def refused(engine: FakeEngine) -> None:
        raise Unsupported("weights that are not an image cannot leave")

    world = World(room=1, gpus=gpus)
    with unittest.mock.patch.object(FakeEngine, "park", refused):
        await world.swapper.swap(targets[name])
        outcome = await world.swapper.swap(targets["b"])
    assert "making_way" in outcome.phases and "drain" in world.script.names
    assert [slot.target.model_name for slot in world.swapper.slots] == ["b"]
    world.check()


async def test_an_engine_on_a_gpu_takes_others_only_by_image(targets: dict[str, Target]) -> None:
    world = World(gpus=1)
    with unittest.mock.patch.object(FakeEngine, "_made", lambda engine, binding: None):
        await world.swapper.swap(targets["a1"])
        assert (await world.swapper.swap(targets["a2"])).how is How.START


async def test_a_dead_active_engine_is_told_of_once(targets: dict[str, Target]) -> None:
    world = World()
    await world.swapper.swap(targets["a1"])
    world.factory.engines[0].die()
    assert world.lost == ["a1"] and world.swapper.slots.active is None and world.endpoint is None
    world.check()
    assert (await world.swapper.swap(targets["a1"])).how is How.START


async def test_engines_can_be_stopped_one_by_one(targets: dict[str, Target]) -> None:
    world = World()
    for name in ("a1", "b"):
        await world.swapper.swap(targets[name])
    await world.swapper.stop_engine(1)
    await world.swapper.stop_engine(2)
    world.check()
    with pytest.raises(NotFound):
        await world.swapper.stop_engine(1)
