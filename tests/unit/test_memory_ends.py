# SPDX-License-Identifier: Apache-2.0
"""Cancellations, failures and ends at any moment: no leaks, no endless waits, and budgets hold."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import threading
import time
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from sources import converted
from test_memory import FakeMover, PoolMachine, checkpoint, host_of, open_descriptors, sealed_arena, tiers
from waiting import PATIENCE_S, eventually

from flashd import tensors
from flashd.checkpoint.files import Checkpoint
from flashd.config.environment import inherited_fds
from flashd.daemon.lifecycle.descriptor_store import ArenaKeeper, FdStore
from flashd.errors import Busy, DeviceFailed, InvalidArgument, OutOfMemory
from flashd.io import cuda
from flashd.io.cuda import Gpu
from flashd.io.streamer import Options
from flashd.memory.arena import HUGE_PAGE_BYTES, Arena, HostArena, HugePages
from flashd.memory.device import CudaDevice, HostDevice, Tier
from flashd.memory.residency import Memory, Residency
from flashd.memory.transfers import Progress, Region, Residents, StreamMover
from flashd.service_manager import ServiceManager
from flashd.units import MiB

GPU = Gpu(0, "a card", "u-u-i-d", 1 << 34, False, False, True, True, True)


@dataclass(frozen=True, slots=True)
class SlowDevice(HostDevice):
    """Takes its time to allocate, as a card does for tens of gigabytes."""

    def allocate(self, size_bytes: int, label: str) -> HostArena:
        time.sleep(0.05)
        return HostArena(size_bytes, label, self.huge_pages)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_an_arena_that_comes_after_its_load_was_cancelled_is_let_go_of() -> None:
    residency = Residency([Memory(SlowDevice("host", 1 << 40, HugePages.NONE), 1 << 20)], FakeMover())
    before = open_descriptors()
    task = asyncio.create_task(residency.acquire(checkpoint("a", 4096)))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert residency.host.pool.used_bytes == 0
    await asyncio.sleep(0.1)
    assert open_descriptors() == before


async def test_large_memory_is_unmapped_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bus calls are answered meanwhile."""
    where: list[threading.Thread] = []

    def noted(do: Callable[[HostArena], None]) -> Callable[[HostArena], None]:
        def also_noted(arena: HostArena) -> None:
            where.append(threading.current_thread())
            do(arena)

        return also_noted

    monkeypatch.setattr(HostArena, "seal", noted(HostArena.seal))
    monkeypatch.setattr(HostArena, "close", noted(HostArena.close))
    mover = FakeMover()
    residency = Residency(host_of(1 << 20), mover)
    (await residency.acquire(checkpoint("a", 4096))).release()
    await residency.evict("a")
    mover.error = DeviceFailed("the link is down")
    with pytest.raises(DeviceFailed):
        await residency.acquire(checkpoint("b", 4096))
    assert len(where) == 3 and threading.main_thread() not in where
    residency.close()


async def test_what_was_copied_from_is_unmapped_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[threading.Thread] = []
    unmap = cuda.HostView.close

    def noted(view: cuda.HostView) -> None:
        where.append(threading.current_thread())
        unmap(view)

    monkeypatch.setattr(cuda.HostView, "close", noted)
    safetensors.numpy.save_file({"w": np.zeros(MiB, np.uint8)}, tmp_path / "model.safetensors")
    made = converted(tmp_path / "model.safetensors", tmp_path / "out")
    residency = Residency(tiers(4 * MiB, 4 * MiB), StreamMover(Options(), verify=True, staging_bytes=16 * MiB))
    for device in ("sim:0", "host"):
        (await residency.acquire(made, device=device)).release()
    assert where and threading.main_thread() not in where
    residency.close()


class Keeper:
    def __init__(self) -> None:
        self.letting_go = asyncio.Event()
        self.letting_go.set()
        self.error: OSError | None = None
        self.forgotten: list[str] = []

    def keep(self, device: str, checkpoint: Checkpoint, arena: Arena) -> None:
        pass

    async def forget(self, device: str, checkpoint_id: str) -> None:
        if self.error:
            raise self.error
        await self.letting_go.wait()
        self.forgotten.append(checkpoint_id)


async def test_what_its_keeper_fails_to_forget_is_let_go_of_here_all_the_same() -> None:
    keeper = Keeper()
    keeper.error = OSError(24, "Too many open files")
    residency = Residency(host_of(4096), FakeMover(), keeper=keeper)
    before = open_descriptors()
    (await residency.acquire(checkpoint("a", 4096))).release()
    (await residency.acquire(checkpoint("b", 4096))).release()
    await residency.evict("b")
    assert residency.host.pool.used_bytes == 0 and open_descriptors() == before
    residency.close()


async def test_what_a_driver_fails_to_unmap_is_let_go_of_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Registration:
        def __init__(self, *_: object) -> None:
            pass

        def close(self) -> None:
            raise DeviceFailed("cuMemHostUnregister: CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(cuda, "Registration", Registration)
    arenas: list[Any] = []
    residency = Residency(host_of(4096), FakeMover(), on_host_resident=arenas.append)
    before = open_descriptors()
    (await residency.acquire(checkpoint("a", 4096))).release()
    arenas[0].register(0)
    (await residency.acquire(checkpoint("b", 4096))).release()
    assert residency.tier_of("a") is Tier.STORED
    await residency.evict("b")
    assert open_descriptors() == before
    residency.close()


async def test_an_arena_is_sealed_before_a_gpu_is_told_of_it() -> None:
    """Sealing ends the mapping it was filled through, which a registration under way could have been using."""
    seals: list[int] = []
    residency = Residency(
        host_of(4096),
        FakeMover(),
        on_host_resident=lambda arena: seals.append(fcntl.fcntl(arena.fd, fcntl.F_GET_SEALS)),
    )
    (await residency.acquire(checkpoint("a", 4096))).release()
    assert [bool(found & fcntl.F_SEAL_SEAL) for found in seals] == [True]
    residency.close()


async def test_memory_that_is_copied_from_is_there_until_the_copy_has_ended_even_when_the_daemon_stops() -> None:
    mover = FakeMover()
    seen: list[int] = []
    has_begun = asyncio.Event()

    async def slow(checkpoint: Checkpoint, source: Region, target: Region, on_progress: Progress) -> None:
        has_begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.02)  # transfers in flight are awaited
            seen.extend((source.arena.fd, target.arena.fd))

    mover.copy = slow  # type: ignore[method-assign]
    residency = Residency(tiers(1 << 20, 1 << 20), mover)
    before = open_descriptors()
    (await residency.acquire(checkpoint("a", 4096))).release()
    wanted = asyncio.create_task(residency.acquire(checkpoint("a", 4096), device="sim:0"))
    await has_begun.wait()
    await residency.stop()
    assert len(seen) == 2 and min(seen) >= 0
    with pytest.raises(asyncio.CancelledError):
        await wanted
    residency.close()
    assert open_descriptors() == before
    with pytest.raises(Busy, match="stopping"):
        await residency.acquire(checkpoint("a", 4096))


async def test_an_eviction_that_has_begun_is_ended_before_the_daemon_stops() -> None:
    """Else whoever keeps arenas beyond us would keep what we let go of."""
    keeper = Keeper()
    residency = Residency(host_of(1 << 20), FakeMover(), keeper=keeper)
    (await residency.acquire(checkpoint("a", 4096))).release()
    eviction = asyncio.create_task(residency.evict("a"))
    await asyncio.sleep(0)
    eviction.cancel()
    await residency.stop()
    assert keeper.forgotten == ["a"] and residency.host.pool.used_bytes == 0


async def test_a_load_that_ends_before_it_begins_is_not_waited_for() -> None:
    residency = Residency(host_of(1 << 20), FakeMover())
    wanted = asyncio.create_task(residency.acquire(checkpoint("a", 4096)))
    await asyncio.sleep(0)  # the load is requested, and has not started
    residency.close()
    with pytest.raises(asyncio.CancelledError):
        await wanted
    await turns()
    assert not residency.in_use()


async def test_what_left_a_device_has_not_been_used_by_that() -> None:
    residency = Residency(tiers(2 * 4096, 4096), FakeMover())
    for name, device in (("old", "sim:0"), ("new", "host"), ("x", "sim:0")):
        (await residency.acquire(checkpoint(name, 4096), device=device)).release()
    assert [residency.tier_of(name) for name in ("old", "new", "x")] == [Tier.HOST, Tier.HOST, Tier.DEVICE]
    (await residency.acquire(checkpoint("y", 4096))).release()
    assert (residency.tier_of("old"), residency.tier_of("new")) == (Tier.STORED, Tier.HOST)
    residency.close()


async def test_who_wants_it_now_may_make_room_even_where_it_comes_down_from_a_device_already() -> None:
    keeper = Keeper()
    residency = Residency(tiers(2 * 4096, 4096), FakeMover(), keeper=keeper)
    for name, device in (("a", "sim:0"), ("evicted", "host"), ("new", "host")):
        (await residency.acquire(checkpoint(name, 4096), device=device)).release()
    held = await residency.acquire(checkpoint("evicted", 4096))
    keeper.letting_go.clear()
    held.release()
    eviction = asyncio.create_task(residency.evict("evicted"))
    await asyncio.sleep(0)
    other = asyncio.create_task(residency.acquire(checkpoint("c", 4096)))  # will take that room
    await turns()
    on_device = asyncio.create_task(residency.acquire(checkpoint("b", 4096), device="sim:0"))  # a must leave, and waits
    await turns()
    wanted = asyncio.create_task(residency.acquire(checkpoint("a", 4096)))
    await turns()
    keeper.letting_go.set()
    holds = await asyncio.gather(on_device, other, wanted)
    assert [hold.cache.name for hold in holds] == ["sim:0", "host", "host"]
    await eviction
    for hold in holds:
        hold.release()
    residency.close()


async def test_a_load_to_the_host_never_loads_to_a_device() -> None:
    """Not even if it waited there for a load that somebody then gave up."""
    reading: list[str] = []

    class SlowToEnd(FakeMover):
        async def load(
            self, checkpoint: Checkpoint, target: Region, on_progress: Progress, *, residents: Residents = ()
        ) -> None:
            reading.append(target.device.name)
            if reading == ["sim:0"]:
                try:
                    await asyncio.sleep(60)
                finally:
                    await asyncio.sleep(0.02)

    residency = Residency(tiers(1 << 20, 4096), SlowToEnd())
    given_up = asyncio.create_task(residency.acquire(checkpoint("a", 4096), device="sim:0"))
    await eventually(lambda: bool(reading))
    given_up.cancel()
    await asyncio.sleep(0)
    (await residency.acquire(checkpoint("a", 4096))).release()
    assert reading == ["sim:0", "host"] and residency.devices_of("a") == ["host"]
    await asyncio.wait([given_up])
    assert residency.cache("sim:0").pool.used_bytes == 0
    residency.close()


async def test_what_is_read_but_not_quite_there_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    can_be_sealed = threading.Event()

    def slow(arena: HostArena, seal: Callable[[HostArena], None] = HostArena.seal) -> None:
        can_be_sealed.wait(PATIENCE_S)
        seal(arena)

    monkeypatch.setattr(HostArena, "seal", slow)
    mover = FakeMover()
    residency = Residency(tiers(1 << 20, 1 << 20), mover)
    on_host = asyncio.create_task(residency.acquire(checkpoint("a", 4096)))
    await eventually(lambda: bool(mover.started))
    on_card = asyncio.create_task(residency.acquire(checkpoint("a", 4096), device="sim:0"))
    await asyncio.sleep(0.02)
    can_be_sealed.set()
    (await on_card).release()
    (await on_host).release()
    assert mover.started == ["a"] and mover.copied == [("a", "host", "sim:0")]
    residency.close()


async def test_a_device_that_fails_is_no_reason_not_to_load_to_the_host() -> None:
    mover = FakeMover()
    failing = asyncio.Event()
    load = mover.load

    async def fails_on_the_device(
        checkpoint: Checkpoint, target: Region, on_progress: Progress, *, residents: Residents = ()
    ) -> None:
        if target.is_device:
            mover.started.append("sim:0")
            await failing.wait()
            raise DeviceFailed("it has fallen off the bus")
        await load(checkpoint, target, on_progress)

    mover.load = fails_on_the_device  # type: ignore[method-assign]
    residency = Residency(tiers(1 << 20, 1 << 20), mover)
    on_device = asyncio.create_task(residency.acquire(checkpoint("a", 4096), device="sim:0"))
    await eventually(lambda: bool(mover.started))
    on_host = asyncio.create_task(residency.acquire(checkpoint("a", 4096)))
    await turns()
    await asyncio.sleep(0.02)
    failing.set()
    (await on_host).release()
    with pytest.raises(DeviceFailed):
        await on_device
    residency.close()


async def test_a_refused_eviction_evicts_nothing_though_somebody_comes_meanwhile() -> None:
    keeper = Keeper()
    residency = Residency(tiers(1 << 20, 1 << 20), FakeMover(), keeper=keeper)
    for device in ("sim:0", "host"):
        (await residency.acquire(checkpoint("a", 4096), device=device)).release()
    keeper.letting_go.clear()
    eviction = asyncio.create_task(residency.evict("a"))
    await turns()
    assert residency.devices_of("a") == [], "it leaves everywhere at once, so nobody can come in between"
    keeper.letting_go.set()
    await eviction
    residency.close()


async def test_what_is_only_expected_takes_nobodys_place() -> None:
    residency = Residency(host_of(2 * 4096), FakeMover())
    (await residency.acquire(checkpoint("used", 4096))).release()
    (await residency.acquire(checkpoint("expected", 4096), may_evict=False)).release()
    with pytest.raises(OutOfMemory, match="used since"):
        await residency.acquire(checkpoint("more", 4096), may_evict=False)
    (await residency.acquire(checkpoint("wanted", 4096))).release()
    assert residency.tier_of("used") is Tier.HOST and residency.tier_of("expected") is Tier.STORED
    residency.close()


async def test_what_is_taken_over_counts_as_large_as_it_is() -> None:
    """A daemon before us may have had other pages."""
    with HostArena(4096, "left", HugePages.SHMEM) as arena:
        arena.seal()
        fds = [os.dup(arena.fd) for _ in range(2)]
    small, enough = (Residency(host_of(budget), FakeMover()) for budget in (HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES))
    with pytest.raises(OutOfMemory):
        await small.adopt("host", checkpoint("a", 4096), fds[0])
    await enough.adopt("host", checkpoint("a", 4096), fds[1])
    assert enough.host.pool.free_bytes == 0
    enough.close()


@pytest.mark.parametrize("device", ["cuda:3", "device"])
async def test_memory_of_a_device_that_is_gone_is_let_go_of(device: str) -> None:
    residency = Residency(tiers(1 << 20, 1 << 20), FakeMover())
    before = open_descriptors()
    with pytest.raises(InvalidArgument):
        await residency.adopt(device, checkpoint("a", 4096), sealed_arena(bytes(4096)))
    assert open_descriptors() == before and not residency.devices_of("a")


def test_a_card_that_does_not_answer_is_shown_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: object) -> int:
        raise DeviceFailed("cuMemGetInfo: CUDA_ERROR_UNKNOWN")

    monkeypatch.setattr(cuda, "used_bytes", lost)
    assert CudaDevice(GPU, 0).used_bytes() == 0


def is_open(fd: int) -> bool:
    """Asks the kernel, not the file system behind the descriptor, which may be gone."""
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def test_descriptors_that_do_not_exist_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest has descriptors open from 3 on; that many it has not."""
    inheritable = {fd: os.get_inheritable(fd) for fd in range(3, 256) if is_open(fd)}
    for name, value in (("LISTEN_PID", str(os.getpid())), ("LISTEN_FDS", "1" + 12 * "0"), ("LISTEN_FDNAMES", "x:y")):
        monkeypatch.setenv(name, value)
    found = dict(inherited_fds())
    assert set(found) >= set(inheritable) and len(found) < 256
    for fd, was in inheritable.items():
        os.set_inheritable(fd, was)


def test_a_service_manager_that_hangs_does_not_hang_us(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hanging:
        hanging.bind(str(tmp_path / "notify"))
        manager = ServiceManager(str(tmp_path / "notify"))
        heard: list[bool] = []

        def tell_much() -> None:
            while not heard or heard[-1]:
                heard.append(manager.tell("STATUS=x" * 1000))

        thread = threading.Thread(target=tell_much, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()


async def test_a_model_that_cannot_be_kept_beyond_us_is_warm_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(24, "Too many open files")

    residency = Residency(host_of(1 << 20), FakeMover(), keeper=ArenaKeeper(FdStore(ServiceManager("/nowhere"))))
    with monkeypatch.context() as patch:
        patch.setattr("flashd.daemon.lifecycle.descriptor_store._described", full)
        (await residency.acquire(checkpoint("a", 4096))).release()
    assert residency.tier_of("a") is Tier.HOST
    residency.close()


class SlowKeeper(Keeper):
    """Lets go a few turns later."""

    async def forget(self, device: str, checkpoint_id: str) -> None:
        await turns(3)


class EndsMachine(PoolMachine):
    """As PoolMachine, but it counts the memory itself, not what the ledger says; whatever is under way may be cut off
    by a cancel, an eviction or the end."""

    def __init__(self) -> None:
        super().__init__()
        self.arenas: list[tuple[str, HostArena]] = []
        allocate = HostDevice.allocate

        def noted(device: HostDevice, size_bytes: int, label: str) -> HostArena:
            self.arenas.append((device.name, allocate(device, size_bytes, label)))
            return self.arenas[-1][1]

        self.patches = [
            unittest.mock.patch.object(HostDevice, "allocate", noted),
            unittest.mock.patch("flashd.memory.device_cache.to_thread", in_turns),
        ]
        for patch in self.patches:
            patch.start()
        self.residency = Residency(
            tiers(self.BUDGETS["host"], self.BUDGETS["sim:0"]),
            self.mover,
            is_pinned=self.pinned.__contains__,
            keeper=SlowKeeper(),
        )

    @rule(name=st.integers(0, 5), device=st.sampled_from(["host", "sim:0"]), turn=st.integers(0, 8))
    def acquire_what_is_expected(self, name: int, device: str, turn: int) -> None:
        async def attempt() -> None:
            wanted = checkpoint(str(name), (name + 1) * 4096)
            self.mover.error = None
            acquiring = self.residency.acquire(wanted, device=device, may_evict=False)
            self.tasks.append(asyncio.create_task(acquiring))
            await turns(turn)

        self.loop.run_until_complete(attempt())

    @rule(name=st.integers(0, 5), turn=st.integers(0, 8))
    def evict_meanwhile(self, name: int, turn: int) -> None:
        async def attempt() -> None:
            task = asyncio.create_task(self.residency.evict(str(name)))
            await turns(turn)
            task.cancel()
            with contextlib.suppress(Busy, asyncio.CancelledError):
                await task

        self.loop.run_until_complete(attempt())

    @rule(index=st.integers(0, 100), turn=st.integers(0, 8))
    def cancel_one(self, index: int, turn: int) -> None:
        async def attempt() -> None:
            await turns(turn)
            if self.tasks:
                self.tasks[index % len(self.tasks)].cancel()

        self.loop.run_until_complete(attempt())

    @invariant()
    def the_budgets_hold(self) -> None:
        for name, cache in self.residency.caches.items():
            taken = sum(arena.mapped_bytes for device, arena in self.arenas if device == name and arena.fd >= 0)
            assert taken <= cache.pool.used_bytes <= self.BUDGETS[name]
            for hold in self.holds:
                assert hold.arena.fd >= 0, "what is held is never evicted"

    def teardown(self) -> None:
        self.loop.run_until_complete(asyncio.wait_for(self.residency.stop(), 5))
        self.loop.run_until_complete(asyncio.wait_for(self._end(), 5))
        self.residency.close()
        for claim in self.claims:
            claim.release()
        assert all(cache.pool.used_bytes == 0 for cache in self.residency.caches.values())
        assert all(arena.fd < 0 for _, arena in self.arenas)
        assert not asyncio.all_tasks(self.loop)
        for patch in self.patches:
            patch.stop()
        self.patch.stop()
        self.loop.close()

    async def _end(self) -> None:
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def in_turns(function: Callable[[], Any]) -> Any:
    await turns(2)
    return function()


EndsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestEnds = EndsMachine.TestCase


@pytest.mark.parametrize("size_bytes", [0, 4096])
def test_a_mapping_that_no_tensor_keeps_is_closed(size_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered arena stays in memory as long as its mapping does."""
    mapped: list[Any] = []

    class Registration(cuda.HostView):
        def __init__(self, _ordinal: int, fd: int, mapped_bytes: int) -> None:
            super().__init__(fd, mapped_bytes)
            mapped.append(self)

        @property
        def device_address(self) -> int:
            if size_bytes:
                raise DeviceFailed("cuMemHostGetDevicePointer: CUDA_ERROR_NOT_SUPPORTED")
            return self.address

    def no_bytes(*_: object) -> str:
        return "an empty tensor, which torch cannot make here"

    monkeypatch.setattr(cuda, "gpus", lambda: [GPU])
    monkeypatch.setattr(cuda, "enter", lambda ordinal: None)
    monkeypatch.setattr(cuda, "Registration", Registration)
    monkeypatch.setattr(tensors, "device_bytes_tensor", no_bytes)
    fd = sealed_arena(bytes(4096))
    with contextlib.suppress(DeviceFailed):
        tensors.mapped(fd, size_bytes, 4096, memory="host", gpu_uuid=GPU.uuid)
    assert [mapping.address for mapping in mapped] == [0]
    os.close(fd)
