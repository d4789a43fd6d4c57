# SPDX-License-Identifier: Apache-2.0
"""Arenas cannot be changed once sealed, and no sequence of operations exceeds a budget."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import mmap
import os
import time
import unittest.mock
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sources import converted

from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.manifest import Manifest
from flashd.config.settings import MemoryConfig
from flashd.daemon.serving.memory_setup import memories
from flashd.errors import AlreadyExists, Busy, CorruptCheckpoint, InvalidArgument, NotFound, OutOfMemory, TransferFailed
from flashd.io import cuda
from flashd.io.cuda import Gpu
from flashd.io.streamer import Options, Transfer, TransferResult
from flashd.memory.arena import HUGE_PAGE_BYTES, Arena, HostArena, HugePages, probe_huge_pages
from flashd.memory.device import HostDevice, Kind, Tier, simulated_device, total_memory_bytes
from flashd.memory.device_cache import Hold
from flashd.memory.lease import LeaseBook
from flashd.memory.pool import Reservation
from flashd.memory.residency import Memory, Residency
from flashd.memory.transfers import Progress, Region, Residents, StreamMover
from flashd.units import MiB

DEVICE = HostDevice("host", 1 << 40, HugePages.NONE)


def checkpoint(name: str, size_bytes: int) -> Checkpoint:
    """A checkpoint that is never opened."""
    empty = dict.fromkeys(
        ("weights", "header_digest", "digests_digest", "dtype", "architecture", "architecture_key", "layout",
         "quantization", "source"), "")  # fmt: skip
    return Checkpoint(
        Path("/nowhere"),
        Manifest(id=name, digest_block_bytes=MiB, data_offset=4096, data_bytes=size_bytes, tensor_count=1,
                 side_files={}, created_at=0, **empty),
    )  # fmt: skip


def tiers(host_bytes: int, device_bytes: int) -> list[Memory]:
    return [*host_of(host_bytes), Memory(simulated_device(1 << 30, DEVICE), device_bytes)]


def host_of(budget_bytes: int) -> list[Memory]:
    return [Memory(DEVICE, budget_bytes)]


class FakeMover:
    """Moves when it is told to; may fail."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.started: list[str] = []
        self.copied: list[tuple[str, str, str]] = []
        self.error: Exception | None = None

    async def load(
        self, checkpoint: Checkpoint, target: Region, on_progress: Progress, *, residents: Residents = ()
    ) -> None:
        self.started.append(checkpoint.id)
        on_progress(0, checkpoint.manifest.data_bytes)
        await self.gate.wait()
        if self.error:
            raise self.error

    async def copy(self, checkpoint: Checkpoint, source: Region, target: Region, on_progress: Progress) -> None:
        self.copied.append((checkpoint.id, source.device.name, target.device.name))
        await self.gate.wait()
        if self.error:
            raise self.error

    async def matches(self, checkpoint: Checkpoint, region: Region) -> bool:
        return True


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_sealed_arena_can_be_read_and_not_changed() -> None:
    with HostArena(100_000, "test", HugePages.NONE) as arena:
        assert arena.mapped_bytes % mmap.PAGESIZE == 0
        ctypes.memset(arena.address, 7, 100)
        arena.seal()
        fd = arena.open_read_only()
        with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
            assert mapped[:100] == b"\x07" * 100
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            mmap.mmap(arena.fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError):
            os.write(fd, b"x")
        for size in (0, 200_000):
            with pytest.raises(PermissionError):
                os.ftruncate(arena.fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        os.close(fd)


def test_a_gpu_that_pins_only_writable_memory_is_told_of_a_sealed_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer drivers refuse to register what is mapped for reading only; a sealed arena has one mapping they take."""
    told: list[tuple[str, bool]] = []

    def register(ordinal: int, address: int, size_bytes: int, *, is_read_only: bool = False) -> None:
        told.append((permissions(address), is_read_only))

    monkeypatch.setattr(cuda, "register", register)
    monkeypatch.setattr(cuda, "unregister", lambda ordinal, address: told.append((permissions(address), False)))
    with HostArena(8192, "test", HugePages.NONE, registers_read_only=False) as arena:
        ctypes.memset(arena.address, 7, 100)
        arena.seal()
        with pytest.raises(PermissionError):
            mmap.mmap(arena.fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        arena.register(0)
        with arena.viewed() as view:
            assert view.is_registered
            assert permissions(view.address) == "r--s"
            assert ctypes.string_at(view.address, 100) == b"\x07" * 100
    assert told == [("rw-s", False), ("r--s", False)]


def permissions(address: int) -> str:
    """Of the mapping at an address of this process (proc_pid_maps(5))."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, found = line.split()[:2]
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return found
    raise AssertionError("nothing is mapped there")


def test_memory_handed_out_outlives_the_arena() -> None:
    arena = HostArena(4096, "test", HugePages.NONE)
    arena.seal()
    fd = arena.open_read_only()
    arena.close()
    assert os.fstat(fd).st_size == 4096
    os.close(fd)


@pytest.mark.parametrize(
    ("free", "shmem", "expected"),
    [
        ("3", "[never]", HugePages.HUGETLB),
        ("0", "always [advise] never", HugePages.SHMEM),
        ("0", "always advise [never]", HugePages.NONE),
    ],
)
def test_huge_pages_are_probed(free: str, shmem: str, expected: HugePages, tmp_path: Path) -> None:
    (tmp_path / "free_hugepages").write_text(free)
    (tmp_path / "shmem_enabled").write_text(shmem)
    assert probe_huge_pages(tmp_path, tmp_path / "shmem_enabled") is expected
    assert probe_huge_pages(tmp_path / "no", tmp_path / "no") is HugePages.NONE


def test_the_machine_is_as_large_as_its_control_group_lets_it_be(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       1000 kB\nMemFree: 1 kB\n")
    hierarchy = tmp_path / "cgroup"
    unit = hierarchy / "system.slice" / "flashd.service"
    unit.mkdir(parents=True)
    (tmp_path / "own").write_text("1:name=systemd:/elsewhere\n0::/system.slice/flashd.service\n")

    def total() -> int:
        return total_memory_bytes(tmp_path / "meminfo", tmp_path / "own", hierarchy)

    assert total() == 1_024_000
    for group, limit, expected in (
        (unit, "max", 1_024_000),
        (unit, "500000", 500_000),  # the unit's MemoryMax=
        (unit.parent, "400000", 400_000),  # its slice's
        (hierarchy, "300000", 300_000),  # in a container
    ):
        (group / "memory.max").write_text(limit)
        assert total() == expected
    (tmp_path / "memory.max").write_text("1")  # not of the hierarchy
    assert total() == 300_000
    (tmp_path / "own").write_text("nothing\n")
    assert total() == 1_024_000


async def test_least_recently_used_goes_first_and_pinned_and_held_stay() -> None:
    loader, pinned = FakeMover(), {"p"}
    residency = Residency(host_of(4 * 4096), loader, is_pinned=pinned.__contains__)
    a, b, p, h, x = (checkpoint(name, 4096) for name in "abphx")
    for each in (a, b, p):
        (await residency.acquire(each)).release()
    hold = await residency.acquire(h)
    (await residency.acquire(a)).release()  # b is now the least recently used
    (await residency.acquire(x)).release()
    assert [residency.tier_of(i) for i in "abphx"] == [Tier.HOST, Tier.STORED, Tier.HOST, Tier.HOST, Tier.HOST]
    with pytest.raises(Busy):
        await residency.evict("h")
    hold.release()
    hold.release()  # a second release is nothing
    await residency.evict("h")
    assert residency.holds("h") == 0 and residency.tier_of("h") is Tier.STORED
    residency.close()


async def test_what_cannot_fit_is_refused_with_numbers_and_evicts_nobody() -> None:
    residency = Residency(host_of(3 * 4096), FakeMover())
    (await residency.acquire(checkpoint("a", 4096))).release()
    hold = await residency.acquire(checkpoint("b", 4096))
    with pytest.raises(OutOfMemory) as caught:
        await residency.acquire(checkpoint("big", 3 * 4096))
    assert "12.3 kB" in caught.value.message and "4.1 kB" in caught.value.message and caught.value.hint
    assert residency.tier_of("a") is Tier.HOST, "evicting it would not have helped"
    hold.release()
    residency.close()


async def test_two_who_want_the_same_load_it_once() -> None:
    loader = FakeMover()
    loader.gate.clear()
    residency = Residency(host_of(1 << 20), loader)
    wanted = checkpoint("a", 4096)
    told: list[tuple[int, int]] = []
    tasks = [asyncio.create_task(residency.acquire(wanted, lambda d, t: told.append((d, t)))) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    tasks[0].cancel()
    loader.gate.set()
    holds = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(holds[0], asyncio.CancelledError)
    assert loader.started == ["a"] and residency.holds("a") == 2 and told
    residency.close()


async def test_a_load_nobody_waits_for_is_ended_and_leaves_nothing() -> None:
    loader = FakeMover()
    loader.gate.clear()
    residency = Residency(host_of(1 << 20), loader)
    before = open_descriptors()
    task = asyncio.create_task(residency.acquire(checkpoint("a", 4096)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert residency.host.pool.used_bytes == 0 and residency.tier_of("a") is Tier.STORED
    assert open_descriptors() == before and residency.in_use() == set()


async def test_who_comes_while_a_load_is_given_up_gets_another_one() -> None:
    """A load that was given up takes a moment to end: its disk requests are awaited."""
    started = []

    class SlowToEnd(FakeMover):
        async def load(
            self, checkpoint: Checkpoint, target: Region, on_progress: Progress, *, residents: Residents = ()
        ) -> None:
            started.append(checkpoint.id)
            if len(started) == 1:
                try:
                    await asyncio.sleep(60)
                finally:
                    await asyncio.sleep(0.01)

    residency = Residency(host_of(4096), SlowToEnd())
    first = asyncio.create_task(residency.acquire(checkpoint("a", 4096)))
    while not started:
        await asyncio.sleep(0.001)
    first.cancel()
    await asyncio.sleep(0)
    with await residency.acquire(checkpoint("a", 4096)):
        assert started == ["a", "a"] and first.cancelled()
    residency.close()


async def test_what_was_just_loaded_stays_for_who_asked() -> None:
    """Between the end of a load and the turn of who waits for it, others may run, and want the room."""
    loader = FakeMover()
    residency = Residency(host_of(4096), loader)
    wanted = asyncio.create_task(residency.acquire(checkpoint("a", 4096)))
    while residency.tier_of("a") is Tier.STORED:
        await asyncio.sleep(0)
    assert not wanted.done()
    with pytest.raises(OutOfMemory):
        await residency.acquire(checkpoint("b", 4096))
    with pytest.raises(Busy):
        await residency.evict("a")
    (await wanted).release()
    assert loader.started == ["a"] and residency.host.pool.free_bytes == 0
    await residency.evict("a")
    residency.close()


async def test_a_load_under_way_counts_as_taken() -> None:
    loader = FakeMover()
    loader.gate.clear()
    residency = Residency(host_of(3 * 4096), loader)
    loading = asyncio.create_task(residency.acquire(checkpoint("a", 2 * 4096)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert residency.host.fixed_bytes() == 2 * 4096
    with pytest.raises(OutOfMemory, match=r"8\.19 kB are leased"):
        await residency.acquire(checkpoint("b", 2 * 4096))
    loader.gate.set()
    (await loading).release()
    residency.close()


async def test_a_failed_load_leaves_nothing_and_can_be_tried_again() -> None:
    loader = FakeMover()
    loader.error = CorruptCheckpoint("block 3")
    residency = Residency(host_of(1 << 20), loader)
    with pytest.raises(CorruptCheckpoint):
        await residency.acquire(checkpoint("a", 4096))
    assert residency.host.pool.used_bytes == 0
    loader.error = None
    with await residency.acquire(checkpoint("a", 4096)) as hold:
        assert hold.from_tier is Tier.STORED
    residency.close()


async def test_the_streamer_fills_the_arena_and_a_changed_byte_stops_it(tmp_path: Path) -> None:
    weights = {"w": np.random.default_rng(0).standard_normal((2000, 1000), np.float32)}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    made = converted(tmp_path / "model.safetensors", tmp_path / "out")
    results: list[Any] = []
    loader = StreamMover(
        Options(), verify=True, staging_bytes=64 * MiB, on_loaded=lambda c, result: results.append(result)
    )
    residency = Residency(host_of(64 * MiB), loader)
    with await residency.acquire(made) as hold:
        fd = hold.arena.open_read_only()
        with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
            assert mapped[: hold.arena.size_bytes] == weights["w"].tobytes()
        os.close(fd)
    assert results[0].size_bytes == weights["w"].nbytes
    await residency.evict(made.id)
    with made.weights_path.open("r+b") as file:
        file.seek(made.manifest.data_offset + 1000)
        file.write(b"\xff\xff")
    with pytest.raises(CorruptCheckpoint, match="does not match its digest"):
        await residency.acquire(made)
    assert residency.host.pool.used_bytes == 0
    residency.close()


async def test_however_often_it_is_cancelled_memory_outlives_what_is_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors.numpy.save_file({"w": np.zeros(64 * MiB, np.uint8)}, tmp_path / "model.safetensors")
    made = converted(tmp_path / "model.safetensors", tmp_path / "out")
    order: list[str] = []
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()
    wait, close = Transfer.wait, HostArena.close

    def slow_wait(transfer: Transfer, timeout_s: float | None = None) -> TransferResult:
        loop.call_soon_threadsafe(begun.set)
        try:
            return wait(transfer, timeout_s)
        finally:
            time.sleep(0.1)
            order.append("ended")

    def noted_close(arena: HostArena) -> None:
        order.append("closed")
        close(arena)

    monkeypatch.setattr(Transfer, "wait", slow_wait)
    monkeypatch.setattr(HostArena, "close", noted_close)
    loader = StreamMover(Options(), verify=True, staging_bytes=64 * MiB)
    residency = Residency(host_of(128 * MiB), loader)
    task = asyncio.create_task(residency.acquire(made))
    await begun.wait()
    for _ in range(3):  # as when a job is cancelled and the daemon is stopped
        task.cancel()
        residency.close()
        await asyncio.sleep(0.01)
    await asyncio.wait([task])
    while residency.in_use():
        await asyncio.sleep(0.01)
    assert order == ["ended", "closed"] and residency.host.pool.used_bytes == 0


def test_where_reserved_huge_pages_are_gone_ordinary_ones_do() -> None:
    device = HostDevice("host", 1 << 40, HugePages.HUGETLB)
    reserved_bytes = int(Path("/proc/meminfo").read_text().split("HugePages_Free:")[1].split()[0]) * HUGE_PAGE_BYTES
    with device.allocate(reserved_bytes + 1, "test") as arena:
        assert arena.mapped_bytes == reserved_bytes + HUGE_PAGE_BYTES
        ctypes.memset(arena.address, 1, 4096)
        arena.seal()


async def test_leases_die_with_their_owner() -> None:
    residency = Residency(host_of(1 << 20), FakeMover())
    ended: list[int] = []
    book = LeaseBook(on_end=lambda lease: ended.append(lease.number))
    for owner in (":1.1", ":1.1", ":1.2"):
        book.add("m", owner, 1000, "host", await residency.acquire(checkpoint("a", 4096)))
    assert residency.holds("a") == 3
    book.release_owner(":1.1")
    assert residency.holds("a") == 1 and ended == [1, 2]
    book.release(3)
    with pytest.raises(NotFound):
        book.release(3)
    residency.close()


async def in_turn(function: Any, *arguments: Any) -> Any:
    await asyncio.sleep(0)
    return function(*arguments)


class PoolMachine(RuleBasedStateMachine):
    """Random acquisitions, releases, evictions, pins, failing and cancelled moves on two tiers, several at once.

    Against a model of the pools: it knows what is held and how large it is, and asks after every step. Threads are
    replaced by turns of the loop, so that what is found can be found again.
    """

    BUDGETS: ClassVar = {"host": 10 * 4096, "sim:0": 6 * 4096}

    def __init__(self) -> None:
        super().__init__()
        self.patch = unittest.mock.patch("flashd.memory.device_cache.to_thread", in_turn)
        self.patch.start()
        self.loop = asyncio.new_event_loop()
        self.mover = self.loop.run_until_complete(self._make_mover())
        self.pinned: set[str] = set()
        self.residency = Residency(
            tiers(self.BUDGETS["host"], self.BUDGETS["sim:0"]), self.mover, is_pinned=self.pinned.__contains__
        )
        self.holds: list[Hold] = []
        self.tasks: list[asyncio.Task[Hold]] = []
        self.claims: list[Reservation] = []  # on the device

    async def _make_mover(self) -> FakeMover:
        return FakeMover()

    @rule(
        name=st.integers(0, 5), device=st.sampled_from(["host", "sim:0"]), failing=st.booleans(),
        end=st.sampled_from(["await", "cancel", "cancel later", "leave"]), turns=st.integers(0, 8),
    )  # fmt: skip
    def acquire(self, name: int, device: str, failing: bool, end: str, turns: int) -> None:
        async def attempt() -> None:
            self.mover.error = CorruptCheckpoint("x") if failing else None
            task = asyncio.create_task(self.residency.acquire(checkpoint(str(name), (name + 1) * 4096), device=device))
            self.tasks.append(task)
            if end.startswith("cancel"):
                for _ in range(turns if end == "cancel later" else 1):
                    await asyncio.sleep(0)
                task.cancel()
            if end == "leave":
                for _ in range(turns):
                    await asyncio.sleep(0)
                    self.the_budgets_hold()
                return
            await self._settle()

        self.loop.run_until_complete(attempt())

    async def _settle(self) -> None:
        for task in self.tasks:
            with contextlib.suppress(OutOfMemory, CorruptCheckpoint, asyncio.CancelledError):
                self.holds.append(await task)
        self.tasks.clear()

    @rule()
    def settle(self) -> None:
        self.loop.run_until_complete(self._settle())

    @precondition(lambda self: self.holds)
    @rule(index=st.integers(0, 100))
    def release(self, index: int) -> None:
        self.holds.pop(index % len(self.holds)).release()

    @rule(name=st.integers(0, 5))
    def evict(self, name: int) -> None:
        async def attempt() -> None:
            await self._settle()
            try:
                await self.residency.evict(str(name))
            except Busy:
                assert any(hold.checkpoint_id == str(name) for hold in self.holds)
            else:
                assert self.residency.tier_of(str(name)) is Tier.STORED

        self.loop.run_until_complete(attempt())

    @rule(claimed=st.integers(1, 8), filled=st.integers(1, 8), end=st.sampled_from(["hold", "give up", "keep"]))
    def fill_what_was_claimed(self, claimed: int, filled: int, end: str) -> None:
        """An engine fills memory of its own making, in room that was made for it."""

        async def attempt() -> None:
            await self._settle()
            cache = self.residency.cache("sim:0")
            try:
                claim = await cache.claim(claimed * 4096)
            except OutOfMemory:
                return
            self.claims.append(claim)
            if end == "keep":  # taken by the engine
                return
            arena = HostArena(filled * 4096, "made", HugePages.NONE)
            arena.seal()
            made = checkpoint(str(filled - 1), filled * 4096)
            try:
                if end == "hold":
                    self.holds.append(cache.admit(made, arena, claim))
                    self.claims.remove(claim)
                    return
            except AlreadyExists:
                assert made.id in cache
            except OutOfMemory:
                assert filled > claimed
            arena.close()
            self.claims.remove(claim)
            claim.release()

        self.loop.run_until_complete(attempt())

    @precondition(lambda self: self.claims)
    @rule()
    def release_a_claim(self) -> None:
        self.claims.pop().release()

    @rule(name=st.integers(0, 5))
    def toggle_pin(self, name: int) -> None:
        self.pinned ^= {str(name)}

    @invariant()
    def the_budgets_hold(self) -> None:
        for name, cache in self.residency.caches.items():
            resident = {r.checkpoint.id: r for r in cache.residents()}
            used = sum((int(n) + 1) * 4096 for n in resident)
            used += sum(claim.size_bytes for claim in self.claims if name == "sim:0")
            assert used <= cache.pool.used_bytes <= self.BUDGETS[name]
            if not self.tasks:
                assert used == cache.pool.used_bytes, "what nobody loads any more is not counted"
            for hold in self.holds:
                if hold.cache is cache:
                    assert hold.checkpoint_id in resident, "what is held is never evicted"
                    assert hold.arena.fd >= 0

    def teardown(self) -> None:
        self.loop.run_until_complete(self._settle())
        self.residency.close()
        for claim in self.claims:
            claim.release()
        assert all(cache.pool.used_bytes == 0 for cache in self.residency.caches.values())
        self.loop.close()
        self.patch.stop()


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


async def test_a_device_is_filled_from_the_host_tier_where_that_has_it() -> None:
    mover = FakeMover()
    residency = Residency(tiers(1 << 20, 1 << 20), mover)
    a, b = checkpoint("a", 4096), checkpoint("b", 4096)
    (await residency.acquire(a)).release()
    hold = await residency.acquire(a, device="sim:0")
    assert hold.from_tier is Tier.HOST and mover.copied == [("a", "host", "sim:0")]
    assert residency.tier_of("a") is Tier.DEVICE and residency.devices_of("a") == ["host", "sim:0"]
    (await residency.acquire(b, device="device")).release()
    assert mover.started == ["a", "b"] and residency.devices_of("b") == ["sim:0"]
    (await residency.acquire(b)).release()
    assert mover.copied[-1] == ("b", "sim:0", "host"), "nor is the disk asked for what a device has"
    with pytest.raises(Busy):
        await residency.evict("a")
    assert residency.tier_of("a") is Tier.DEVICE, "a refused eviction evicts nothing"
    hold.release()
    await residency.evict("a")
    assert residency.tier_of("a") is Tier.STORED
    with pytest.raises(InvalidArgument, match="no device 'cuda:7'"):
        await residency.acquire(a, device="cuda:7")
    residency.close()
    with pytest.raises(InvalidArgument, match="there is no GPU"):
        Residency(host_of(4096), mover).cache("device")


async def test_who_wants_it_on_a_device_while_it_comes_to_the_host_waits_for_that() -> None:
    mover = FakeMover()
    mover.gate.clear()
    residency = Residency(tiers(1 << 20, 1 << 20), mover)
    a = checkpoint("a", 4096)
    tasks = [asyncio.create_task(residency.acquire(a, device=device)) for device in ("host", "sim:0")]
    await asyncio.sleep(0.01)
    mover.gate.set()
    for hold in await asyncio.gather(*tasks):
        hold.release()
    # Whichever has its memory first asks the disk, and the other one waits for it.
    assert mover.started == ["a"] and mover.copied in ([("a", "host", "sim:0")], [("a", "sim:0", "host")])
    residency.close()


async def test_what_leaves_a_device_goes_to_the_host_if_nothing_there_was_used_since() -> None:
    mover = FakeMover()
    residency = Residency(tiers(2 * 4096, 4096), mover)
    a, b, c, old, new = (checkpoint(name, 4096) for name in ("a", "b", "c", "old", "new"))
    (await residency.acquire(old)).release()
    (await residency.acquire(a, device="sim:0")).release()
    (await residency.acquire(new)).release()
    (await residency.acquire(b, device="sim:0")).release()
    assert mover.copied == [("a", "sim:0", "host")], "a took the place of old"
    assert [residency.tier_of(i) for i in ("old", "new", "a", "b")] == [Tier.STORED, Tier.HOST, Tier.HOST, Tier.DEVICE]
    for each in (a, new):
        (await residency.acquire(each)).release()
    (await residency.acquire(c, device="sim:0")).release()
    assert residency.tier_of("b") is Tier.STORED, "it was used before all that the host tier has"
    assert {residency.tier_of(i) for i in ("a", "new")} == {Tier.HOST}
    residency.close()


async def test_a_failed_way_down_does_not_stop_the_load_that_needs_the_room() -> None:
    mover = FakeMover()
    residency = Residency(tiers(1 << 20, 4096), mover)
    (await residency.acquire(checkpoint("a", 4096), device="sim:0")).release()

    async def failing(*_: object) -> None:
        raise TransferFailed("the link is down")

    mover.copy = failing  # type: ignore[method-assign]
    (await residency.acquire(checkpoint("b", 4096), device="sim:0")).release()
    assert [residency.tier_of(i) for i in "ab"] == [Tier.STORED, Tier.DEVICE]
    assert residency.host.pool.used_bytes == 0
    residency.close()


async def test_on_unified_memory_both_tiers_are_one_and_nothing_is_copied() -> None:
    mover = FakeMover()
    gpu = Gpu(0, "GB10", "u-u-i-d", 1 << 40, True, True, True, True, False)
    device = replace(DEVICE, kind=Kind.UNIFIED, gpu=gpu)
    residency = Residency([Memory(device, 2 * 4096)], mover)
    a = checkpoint("a", 4096)
    holds = [await residency.acquire(a, device=device) for device in ("host", "cuda:0", "device")]
    assert len({hold.arena.fd for hold in holds}) == 1
    assert (mover.started, mover.copied) == (["a"], [])
    assert residency.host.pool.used_bytes == 4096
    assert residency.tier_of("a") is Tier.DEVICE and residency.devices_of("a") == ["host", "cuda:0"]
    for hold in holds:
        hold.release()
    await residency.evict("a")
    residency.close()


async def test_the_tiers_hold_the_same_bytes(tmp_path: Path) -> None:
    """Down, up and down again by the real streamer, and the digests found on each."""
    weights = {"w": np.random.default_rng(0).standard_normal((3000, 1000), np.float32)}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    made = converted(tmp_path / "model.safetensors", tmp_path / "out")
    mover = StreamMover(Options(), verify=True, staging_bytes=32 * MiB)
    residency = Residency(tiers(64 * MiB, 16 * MiB), mover)
    for device in ("sim:0", "host"):
        with await residency.acquire(made, device=device) as hold:
            assert await mover.matches(made, hold.region)
            fd = hold.arena.open_read_only()
            with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
                assert mapped[: hold.arena.size_bytes] == weights["w"].tobytes()
            os.close(fd)
    residency.close()


async def test_memory_is_counted_until_it_is_free() -> None:
    """Whoever keeps arenas beyond us may take a moment to let go."""
    letting_go = asyncio.Event()

    class SlowKeeper:
        def keep(self, device: str, checkpoint: Checkpoint, arena: Arena) -> None:
            pass

        async def forget(self, device: str, checkpoint_id: str) -> None:
            await letting_go.wait()

    residency = Residency(host_of(4096), FakeMover(), keeper=SlowKeeper())
    (await residency.acquire(checkpoint("a", 4096))).release()
    eviction = asyncio.create_task(residency.evict("a"))
    wanted = asyncio.create_task(residency.acquire(checkpoint("b", 4096)))
    await asyncio.sleep(0.01)
    assert residency.tier_of("a") is Tier.STORED and residency.host.pool.used_bytes == 4096
    eviction.cancel()  # too late
    await asyncio.sleep(0)
    letting_go.set()
    (await wanted).release()
    assert residency.tier_of("b") is Tier.HOST
    residency.close()


def sealed_arena(contents: bytes) -> int:
    """A descriptor of an arena that another process left."""
    with HostArena(len(contents), "left", HugePages.NONE) as arena:
        ctypes.memmove(arena.address, contents, len(contents))
        arena.seal()
        return os.dup(arena.fd)


async def test_an_arena_of_a_daemon_before_us_is_taken_over_if_it_is_what_it_should_be(tmp_path: Path) -> None:
    contents = np.random.default_rng(0).integers(0, 255, 20 * MiB, np.uint8)
    safetensors.numpy.save_file({"w": contents}, tmp_path / "model.safetensors")
    made = converted(tmp_path / "model.safetensors", tmp_path / "out")
    made.weights_path.unlink()  # it must not be read
    mover = StreamMover(Options(), verify=True, staging_bytes=32 * MiB)
    residency = Residency(tiers(64 * MiB, 64 * MiB), mover)
    before = open_descriptors()
    good = contents.tobytes()
    spoiled = bytearray(good)
    spoiled[-1] ^= 1
    pipe, other_end = os.pipe()
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, len(good))
    for fd in (sealed_arena(good[:-1000]), sealed_arena(bytes(spoiled)), unsealed, pipe):
        with pytest.raises(InvalidArgument):
            await residency.adopt("host", made, fd)
        assert residency.host.pool.used_bytes == 0
    os.close(other_end)
    assert open_descriptors() == before, "what is not taken over is let go of"
    for device in ("host", "sim:0"):
        await residency.adopt(device, made, sealed_arena(good))
        with await residency.acquire(made, device=device) as hold:
            assert hold.from_tier is not Tier.STORED
    too_small = Residency(tiers(1 * MiB, 1 * MiB), mover)
    with pytest.raises(OutOfMemory):
        await too_small.adopt("host", made, sealed_arena(good))
    too_small.close()
    residency.close()
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("is_integrated", "kinds"), [(True, [Kind.UNIFIED]), (False, [Kind.HOST, Kind.CUDA])], ids=["GB10", "HMM desktop"]
)
def test_only_an_integrated_gpu_has_one_memory_with_the_host(
    is_integrated: bool, kinds: list[Kind], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Discrete cards read host pages too, with the open driver's HMM and on GH200, and keep their own memory."""
    gpu = Gpu(0, "a card", "GPU-1", 80 << 30, is_integrated, True, True, True, True, registers_read_only=False)
    monkeypatch.setattr(cuda, "gpus", lambda: [gpu])
    found = memories(MemoryConfig())
    assert [memory.device.kind for memory in found] == kinds
    host = found[0].device
    assert isinstance(host, HostDevice) and not host.registers_read_only
