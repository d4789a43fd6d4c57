# SPDX-License-Identifier: Apache-2.0
"""The common part of two fine-tunes is read from the disk once, within the budgets."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from sources import converted
from test_memory import FakeMover, checkpoint, host_of, tiers

from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.sharing import find_shared
from flashd.errors import CorruptCheckpoint
from flashd.io.streamer import Digests, Options, blake3
from flashd.memory.arena import HugePages
from flashd.memory.device import HostDevice
from flashd.memory.device_cache import Hold
from flashd.memory.residency import Memory, Residency
from flashd.memory.transfers import StreamMover
from flashd.units import MiB

LAYERS = 6


def tune(folder: Path, changed: Sequence[int]) -> Checkpoint:
    """A checkpoint of layers of 16 MiB, of which some are not as the others' are."""
    source = folder / "source"
    source.mkdir(parents=True)
    random = np.random.default_rng(0)
    tensors = {f"layer.{n}.weight": random.standard_normal((4096, 1024), dtype=np.float32) for n in range(LAYERS)}
    for number in changed:
        tensors[f"layer.{number}.weight"] = tensors[f"layer.{number}.weight"] + np.float32(len(str(folder)))
    save_file({**tensors, "norm": np.arange(7, dtype=np.float32)}, source / "model.safetensors")
    return converted(source, folder / "checkpoint")


def spoil(found: Checkpoint, layers: Sequence[int]) -> None:
    """Makes layers unreadable on the disk: whoever loads them from there meets a wrong digest."""
    with found.weights_path.open("r+b") as file:
        for number in layers:
            file.seek(found.extent.offset + number * 16 * MiB)
            file.write(b"spoiled!" * 1000)


def bytes_of(hold: Hold) -> bytes:
    with hold.arena.viewed() as view:
        return hold.region.device.read(view.address, hold.arena.size_bytes)


def weights_of(found: Checkpoint) -> bytes:
    return found.weights_path.read_bytes()[found.extent.offset :]


def residency_of(memories: Sequence[Memory], *, verify: bool = True) -> Residency:
    return Residency(memories, StreamMover(Options(), verify=verify, staging_bytes=32 * MiB))


@pytest.mark.parametrize("device", ["host", "sim:0"])
async def test_only_what_differs_is_read_from_the_disk(device: str, tmp_path: Path) -> None:
    base, tuned = tune(tmp_path / "base", []), tune(tmp_path / "tuned", [2, 4])
    assert base.manifest.layout == tuned.manifest.layout
    wanted = weights_of(tuned)
    spoil(tuned, [0, 1, 3, 5])
    residency = residency_of(tiers(1 << 30, 1 << 30))
    (await residency.acquire(base)).release()
    with await residency.acquire(tuned, device=device) as hold:
        assert bytes_of(hold) == wanted
    await residency.stop()
    residency.close()


@pytest.mark.parametrize("device", ["host", "sim:0"])
async def test_what_differs_does_come_from_the_disk_and_is_verified(device: str, tmp_path: Path) -> None:
    base, tuned = tune(tmp_path / "base", []), tune(tmp_path / "tuned", [2, 4])
    spoil(tuned, [4])
    residency = residency_of(tiers(1 << 30, 1 << 30))
    (await residency.acquire(base)).release()
    with pytest.raises(CorruptCheckpoint, match="block"):
        await residency.acquire(tuned, device=device)
    await residency.stop()
    residency.close()


async def test_blocks_may_lie_in_several_checkpoints(tmp_path: Path) -> None:
    base, other = tune(tmp_path / "base", [0]), tune(tmp_path / "a" / "other", [1])
    tuned = tune(tmp_path / "tuned", [])
    wanted = weights_of(tuned)
    spoil(tuned, range(LAYERS))
    residency = residency_of(host_of(1 << 30))
    for resident in (base, other):
        (await residency.acquire(resident)).release()
    with await residency.acquire(tuned) as hold:
        assert bytes_of(hold) == wanted
    await residency.stop()
    residency.close()


async def test_huge_pages_are_copied_from_as_well(tmp_path: Path) -> None:
    base, tuned = tune(tmp_path / "base", []), tune(tmp_path / "tuned", [1])
    wanted = weights_of(tuned)
    spoil(tuned, [0, 5])
    residency = residency_of([Memory(HostDevice("host", 1 << 40, HugePages.SHMEM), 1 << 30)])
    (await residency.acquire(base)).release()
    with await residency.acquire(tuned) as hold:
        assert bytes_of(hold) == wanted
    await residency.stop()
    residency.close()


async def test_ordinary_pages_are_copied_from_huge_ones_of_a_daemon_before_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel cannot copy from one to the other, they are read into place."""

    def refuses(*arguments: int) -> int:
        raise OSError(errno.EXDEV, "not on one file system")

    monkeypatch.setattr(os, "copy_file_range", refuses)
    base, tuned = tune(tmp_path / "base", []), tune(tmp_path / "tuned", [1])
    wanted = weights_of(tuned)
    spoil(tuned, [2, 3, 4, 5])
    residency = residency_of(host_of(1 << 30))
    (await residency.acquire(base)).release()
    with await residency.acquire(tuned) as hold:
        assert bytes_of(hold) == wanted
    await residency.stop()
    residency.close()


async def test_a_resident_without_readable_digests_is_passed_over(tmp_path: Path) -> None:
    base, tuned = tune(tmp_path / "base", []), tune(tmp_path / "tuned", [1])
    residency = residency_of(host_of(1 << 30))
    (await residency.acquire(base)).release()
    (base.directory / "digests.b3").unlink()
    with await residency.acquire(tuned) as hold:
        assert bytes_of(hold) == weights_of(tuned)
    await residency.stop()
    residency.close()


async def test_memory_that_is_copied_from_counts_until_the_copy_has_ended() -> None:
    """What is evicted meanwhile is gone for everybody else, and its room is taken only when it is free."""
    mover = FakeMover()
    residency = Residency(host_of(2 * 4096), mover)
    (await residency.acquire(checkpoint("a", 4096))).release()
    arena = next(iter(residency.host.residents())).arena
    mover.gate.clear()
    second = asyncio.create_task(residency.acquire(checkpoint("b", 4096)))
    while mover.started != ["a", "b"]:
        await asyncio.sleep(0.001)
    third = asyncio.create_task(residency.acquire(checkpoint("c", 4096)))
    await asyncio.sleep(0.05)
    assert "a" not in residency.host and arena.fd >= 0
    assert residency.host.pool.used_bytes == 2 * 4096
    assert mover.started == ["a", "b"]
    mover.gate.set()
    (await second).release()
    (await third).release()
    assert arena.fd < 0 and mover.started == ["a", "b", "c"]
    await residency.stop()
    residency.close()


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_a_load_that_ends_early_lets_go_of_what_it_copied_from(how: str) -> None:
    mover = FakeMover()
    residency = Residency(host_of(2 * 4096), mover)
    (await residency.acquire(checkpoint("a", 4096))).release()
    mover.gate.clear()
    second = asyncio.create_task(residency.acquire(checkpoint("b", 4096)))
    while mover.started != ["a", "b"]:
        await asyncio.sleep(0.001)
    eviction = asyncio.create_task(residency.evict("a"))
    await asyncio.sleep(0.02)
    assert not eviction.done()
    if how == "cancelled":
        second.cancel()
    else:
        mover.error = CorruptCheckpoint("block 3")
        mover.gate.set()
    with pytest.raises((asyncio.CancelledError, CorruptCheckpoint)):
        await second
    await eviction
    assert residency.host.pool.used_bytes == 0
    await residency.stop()
    residency.close()


@given(
    st.lists(st.binary(min_size=1, max_size=1), max_size=12),
    st.lists(st.lists(st.binary(min_size=1, max_size=1), max_size=12), max_size=3),
    st.integers(1, 4),
)
def test_a_plan_gives_every_byte_its_place_once(wanted: list[bytes], others: list[list[bytes]], last: int) -> None:
    """Blocks of four bytes, all alike, so that equal ones are frequent; the last may be short."""
    block = 4

    def region(blocks: list[bytes]) -> bytes:
        return b"".join(b * block for b in blocks[:-1]) + (blocks[-1] * last if blocks else b"")

    def digests(data: bytes) -> Digests:
        return Digests(block, b"".join(blake3(data[at : at + block]) for at in range(0, len(data), block)))

    data, residents = region(wanted), [region(blocks) for blocks in others]
    runs = find_shared(digests(data), len(data), [digests(resident) for resident in residents])
    built, end = b"", 0
    for run in runs:
        assert run.offset == end and run.length > 0
        source = data if run.source is None else residents[run.source]
        built += source[run.source_offset : run.source_offset + run.length]
        end += run.length
    assert built == data
    known = {r[at : at + block] for r in residents for at in range(0, len(r), block)}
    for run in runs:
        for at in range(run.offset, run.offset + run.length, block):
            assert (run.source is not None) == (data[at : at + block] in known)


def test_digests_of_another_block_size_tell_nothing() -> None:
    (run,) = find_shared(Digests(4, bytes(32)), 4, [Digests(8, bytes(32))])
    assert run.source is None
