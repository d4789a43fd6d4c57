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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sources import converted

from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.manifest import Manifest
from flashd.errors import Busy, CorruptCheckpoint, NotFound, OutOfMemory
from flashd.memory.arena import HUGE_PAGE_BYTES, Arena, HugePages, probe_huge_pages
from flashd.memory.device import HostDevice, total_memory_bytes
from flashd.memory.lease import LeaseBook
from flashd.memory.pool import Pool
from flashd.memory.residency import Progress, Residency, StreamLoader, Tier
from flashd.streamer import Options, Transfer, TransferResult
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


class FakeLoader:
    """Loads when it is told to; may fail."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.started: list[str] = []
        self.error: Exception | None = None

    async def __call__(self, checkpoint: Checkpoint, arena: Arena, on_progress: Progress) -> None:
        self.started.append(checkpoint.id)
        on_progress(0, checkpoint.manifest.data_bytes)
        await self.gate.wait()
        if self.error:
            raise self.error


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_sealed_arena_can_be_read_and_not_changed() -> None:
    with Arena(100_000, "test", HugePages.NONE) as arena:
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


def test_memory_handed_out_outlives_the_arena() -> None:
    arena = Arena(4096, "test", HugePages.NONE)
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
    for limit, expected in (("max", 1_024_000), ("500000", 500_000)):
        (tmp_path / "max").write_text(limit)
        assert total_memory_bytes(tmp_path / "meminfo", tmp_path / "max") == expected


async def test_least_recently_used_goes_first_and_pinned_and_held_stay() -> None:
    loader, pinned = FakeLoader(), {"p"}
    residency = Residency(DEVICE, Pool("host", 4 * 4096), loader, is_pinned=pinned.__contains__)
    a, b, p, h, x = (checkpoint(name, 4096) for name in "abphx")
    for each in (a, b, p):
        (await residency.acquire(each)).release()
    hold = await residency.acquire(h)
    (await residency.acquire(a)).release()  # b is now the least recently used
    (await residency.acquire(x)).release()
    assert [residency.tier_of(i) for i in "abphx"] == [Tier.HOST, Tier.STORED, Tier.HOST, Tier.HOST, Tier.HOST]
    with pytest.raises(Busy):
        residency.evict("h")
    hold.release()
    hold.release()  # a second release is nothing
    residency.evict("h")
    assert residency.holds("h") == 0 and residency.tier_of("h") is Tier.STORED
    residency.close()


async def test_what_cannot_fit_is_refused_with_numbers_and_evicts_nobody() -> None:
    residency = Residency(DEVICE, Pool("host", 3 * 4096), FakeLoader())
    (await residency.acquire(checkpoint("a", 4096))).release()
    hold = await residency.acquire(checkpoint("b", 4096))
    with pytest.raises(OutOfMemory) as caught:
        await residency.acquire(checkpoint("big", 3 * 4096))
    assert "12.3 kB" in caught.value.message and "4.1 kB" in caught.value.message and caught.value.hint
    assert residency.tier_of("a") is Tier.HOST, "evicting it would not have helped"
    hold.release()
    residency.close()


async def test_two_who_want_the_same_load_it_once() -> None:
    loader = FakeLoader()
    loader.gate.clear()
    residency = Residency(DEVICE, Pool("host", 1 << 20), loader)
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
    loader = FakeLoader()
    loader.gate.clear()
    residency = Residency(DEVICE, Pool("host", 1 << 20), loader)
    before = open_descriptors()
    task = asyncio.create_task(residency.acquire(checkpoint("a", 4096)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert residency.pool.used_bytes == 0 and residency.tier_of("a") is Tier.STORED
    assert open_descriptors() == before and residency.in_use() == set()


async def test_who_comes_while_a_load_is_given_up_gets_another_one() -> None:
    """A load that was given up takes a moment to end: its disk requests are awaited."""
    started = []

    async def slow_to_end(checkpoint: Checkpoint, arena: Arena, on_progress: Progress) -> None:
        started.append(checkpoint.id)
        if len(started) == 1:
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.01)

    residency = Residency(DEVICE, Pool("host", 4096), slow_to_end)
    first = asyncio.create_task(residency.acquire(checkpoint("a", 4096)))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0)
    with await residency.acquire(checkpoint("a", 4096)):
        assert started == ["a", "a"] and first.cancelled()
    residency.close()


async def test_what_was_just_loaded_stays_for_who_asked() -> None:
    """Between the end of a load and the turn of who waits for it, others may run, and want the room."""
    loader = FakeLoader()
    residency = Residency(DEVICE, Pool("host", 4096), loader)
    wanted = asyncio.create_task(residency.acquire(checkpoint("a", 4096)))
    while residency.tier_of("a") is Tier.STORED:
        await asyncio.sleep(0)
    assert not wanted.done()
    with pytest.raises(OutOfMemory):
        await residency.acquire(checkpoint("b", 4096))
    with pytest.raises(Busy):
        residency.evict("a")
    (await wanted).release()
    assert loader.started == ["a"] and residency.pool.free_bytes == 0
    residency.evict("a")
    residency.close()


async def test_a_load_under_way_counts_as_taken() -> None:
    loader = FakeLoader()
    loader.gate.clear()
    residency = Residency(DEVICE, Pool("host", 3 * 4096), loader)
    loading = asyncio.create_task(residency.acquire(checkpoint("a", 2 * 4096)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert residency.fixed_bytes() == 2 * 4096
    with pytest.raises(OutOfMemory, match=r"8\.19 kB are leased"):
        await residency.acquire(checkpoint("b", 2 * 4096))
    loader.gate.set()
    (await loading).release()
    residency.close()


async def test_a_failed_load_leaves_nothing_and_can_be_tried_again() -> None:
    loader = FakeLoader()
    loader.error = CorruptCheckpoint("block 3")
    residency = Residency(DEVICE, Pool("host", 1 << 20), loader)
    with pytest.raises(CorruptCheckpoint):
        await residency.acquire(checkpoint("a", 4096))
    assert residency.pool.used_bytes == 0
    loader.error = None
    with await residency.acquire(checkpoint("a", 4096)) as hold:
        assert hold.from_tier is Tier.STORED
    residency.close()


async def test_the_streamer_fills_the_arena_and_a_changed_byte_stops_it(tmp_path: Path) -> None:
    weights = {"w": np.random.default_rng(0).standard_normal((2000, 1000), np.float32)}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    made = converted(tmp_path / "model.safetensors", tmp_path / "out")
    results: list[Any] = []
    loader = StreamLoader(Options(), verify=True, on_loaded=lambda c, result: results.append(result))
    residency = Residency(DEVICE, Pool("host", 64 * MiB), loader)
    with await residency.acquire(made) as hold:
        fd = hold.arena.open_read_only()
        with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
            assert mapped[: hold.arena.size_bytes] == weights["w"].tobytes()
        os.close(fd)
    assert results[0].size_bytes == weights["w"].nbytes
    residency.evict(made.id)
    with made.weights_path.open("r+b") as file:
        file.seek(made.manifest.data_offset + 1000)
        file.write(b"\xff\xff")
    with pytest.raises(CorruptCheckpoint, match="does not match its digest"):
        await residency.acquire(made)
    assert residency.pool.used_bytes == 0
    residency.close()


async def test_however_often_it_is_cancelled_memory_outlives_what_is_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors.numpy.save_file({"w": np.zeros(64 * MiB, np.uint8)}, tmp_path / "model.safetensors")
    made = converted(tmp_path / "model.safetensors", tmp_path / "out")
    order: list[str] = []
    wait, close = Transfer.wait, Arena.close

    def slow_wait(transfer: Transfer, timeout_s: float | None = None) -> TransferResult:
        try:
            return wait(transfer, timeout_s)
        finally:
            time.sleep(0.1)
            order.append("ended")

    def noted_close(arena: Arena) -> None:
        order.append("closed")
        close(arena)

    monkeypatch.setattr(Transfer, "wait", slow_wait)
    monkeypatch.setattr(Arena, "close", noted_close)
    loader = StreamLoader(Options(), verify=True, on_loaded=lambda c, result: None)
    residency = Residency(DEVICE, Pool("host", 128 * MiB), loader)
    task = asyncio.create_task(residency.acquire(made))
    await asyncio.sleep(0.01)
    for _ in range(3):  # as when a job is cancelled and the daemon is stopped
        task.cancel()
        residency.close()
        await asyncio.sleep(0.01)
    await asyncio.wait([task])
    while residency.in_use():
        await asyncio.sleep(0.01)
    assert order == ["ended", "closed"] and residency.pool.used_bytes == 0


def test_where_reserved_huge_pages_are_gone_ordinary_ones_do() -> None:
    device = HostDevice("host", 1 << 40, HugePages.HUGETLB)
    reserved_bytes = int(Path("/proc/meminfo").read_text().split("HugePages_Free:")[1].split()[0]) * HUGE_PAGE_BYTES
    with device.allocate(reserved_bytes + 1, "test") as arena:
        assert arena.mapped_bytes == reserved_bytes + HUGE_PAGE_BYTES
        ctypes.memset(arena.address, 1, 4096)
        arena.seal()


async def test_leases_die_with_their_owner() -> None:
    residency = Residency(DEVICE, Pool("host", 1 << 20), FakeLoader())
    ended: list[int] = []
    book = LeaseBook(on_end=lambda lease: ended.append(lease.number))
    for owner in (":1.1", ":1.1", ":1.2"):
        book.add("m", owner, 1000, await residency.acquire(checkpoint("a", 4096)))
    assert residency.holds("a") == 3
    book.release_owner(":1.1")
    assert residency.holds("a") == 1 and ended == [1, 2]
    book.release(3)
    with pytest.raises(NotFound):
        book.release(3)
    residency.close()


class PoolMachine(RuleBasedStateMachine):
    """Random acquisitions, releases, evictions, pins, failing and cancelled loads, against a model of the pool."""

    BUDGET = 10 * 4096

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.loader = self.loop.run_until_complete(self._make_loader())
        self.pinned: set[str] = set()
        self.residency = Residency(DEVICE, Pool("host", self.BUDGET), self.loader, is_pinned=self.pinned.__contains__)
        self.holds: list[Any] = []

    async def _make_loader(self) -> FakeLoader:
        return FakeLoader()

    @rule(name=st.integers(0, 5), failing=st.booleans(), cancelled=st.booleans())
    def acquire(self, name: int, failing: bool, cancelled: bool) -> None:
        async def attempt() -> None:
            self.loader.error = CorruptCheckpoint("x") if failing else None
            task = asyncio.create_task(self.residency.acquire(checkpoint(str(name), (name + 1) * 4096)))
            if cancelled:
                await asyncio.sleep(0)
                task.cancel()
            with contextlib.suppress(OutOfMemory, CorruptCheckpoint, asyncio.CancelledError):
                self.holds.append(await task)

        self.loop.run_until_complete(attempt())

    @precondition(lambda self: self.holds)
    @rule(index=st.integers(0, 100))
    def release(self, index: int) -> None:
        self.holds.pop(index % len(self.holds)).release()

    @rule(name=st.integers(0, 5))
    def evict(self, name: int) -> None:
        try:
            self.residency.evict(str(name))
        except Busy:
            assert any(hold.checkpoint_id == str(name) for hold in self.holds)

    @rule(name=st.integers(0, 5))
    def toggle_pin(self, name: int) -> None:
        self.pinned ^= {str(name)}

    @invariant()
    def the_budget_holds(self) -> None:
        resident = {str(n) for n in range(6) if self.residency.tier_of(str(n)) is Tier.HOST}
        used = sum((int(n) + 1) * 4096 for n in resident)
        assert self.residency.pool.used_bytes == used <= self.BUDGET
        for hold in self.holds:
            assert hold.checkpoint_id in resident, "what is held is never evicted"
        held = {hold.checkpoint_id for hold in self.holds}
        assert {n for n in resident if self.residency.holds(n)} == held

    def teardown(self) -> None:
        self.residency.close()
        assert self.residency.pool.used_bytes == 0
        self.loop.close()


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase
