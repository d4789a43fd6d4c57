# SPDX-License-Identifier: Apache-2.0
"""Loads: every byte in its place, at any size, and compared with its digest on request."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from native.contents import BACKENDS, Memory, digests_of, open_descriptors, some_bytes

from flashd.errors import Cancelled, CorruptCheckpoint, InvalidArgument, OutOfMemory, TransferFailed
from flashd.io.streamer import Backend, Digests, OpenFile, Options, Read, load
from flashd.units import GiB, MiB

Opened = Callable[..., OpenFile]
Make = Callable[[int], Memory]
OFFSET = 4096


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, MiB, 3 * MiB + 513, 20 * MiB + 9])
def test_bytes_arrive_and_none_beside_them(opened: Opened, memory: Make, backend: Backend, length: int) -> None:
    contents = some_bytes(OFFSET + length)
    into = memory(length + 8192)
    options = Options(block_bytes=MiB, depth=4, backend=backend)
    reads = [Read(0, OFFSET, 0, length)]
    result = load([opened(contents)], reads, address=into.address, size_bytes=length, options=options).wait()
    assert into[:length] == contents[OFFSET:]
    assert into[length:] == b"\xaa" * 8192
    assert (result.size_bytes, result.backend, result.direct, result.fallback) == (length, backend, True, "")
    assert result.fixed_files == (backend is Backend.IO_URING)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_files_share_one_queue(opened: Opened, memory: Make, backend: Backend) -> None:
    contents = [some_bytes(37_000 + 4099 * number, number) for number in range(60)]
    whole = b"".join(contents)
    ends = [sum(map(len, contents[: number + 1])) for number in range(60)]
    reads = [Read(i, 0, end - len(part), len(part)) for i, (end, part) in enumerate(zip(ends, contents, strict=True))]
    into = memory(len(whole))
    options = Options(block_bytes=64 << 10, depth=16, backend=backend)
    files = [opened(part) for part in contents]
    digests = digests_of(whole, MiB)  # blocks that span files
    before = open_descriptors()
    result = load(files, reads, address=into.address, size_bytes=len(whole), options=options, digests=digests).wait()
    assert into[: len(whole)] == whole
    assert not result.direct
    assert "not aligned alike" in result.fallback
    assert open_descriptors() == before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("digest_block", [64 << 10, MiB, 8 * MiB])
def test_digests_are_compared_on_the_way(opened: Opened, memory: Make, backend: Backend, digest_block: int) -> None:
    contents = bytearray(some_bytes(OFFSET + 5 * MiB + 77))
    digests = digests_of(bytes(contents[OFFSET:]), digest_block)
    into = memory(6 * MiB)
    options = Options(block_bytes=MiB, depth=4, backend=backend)

    def attempt() -> None:
        transfer = load(
            [opened(contents, path=None)],
            [Read(0, OFFSET, 0, len(contents) - OFFSET)],
            address=into.address,
            size_bytes=6 * MiB,
            options=options,
            digests=digests,
        )
        result = transfer.wait()
        assert result.digest_cpu_seconds > 0

    attempt()
    flipped = OFFSET + 3 * MiB + 12345
    contents[flipped] ^= 1
    block = OFFSET + (flipped - OFFSET) // digest_block * digest_block
    with pytest.raises(CorruptCheckpoint, match=rf"offset {block} of .*file-"):
        attempt()


def test_a_digest_table_of_the_wrong_length_is_refused(opened: Opened, memory: Make) -> None:
    contents = some_bytes(MiB)
    digests = Digests(MiB // 2, digests_of(contents, MiB).table)
    with pytest.raises(CorruptCheckpoint, match="1 digests for 2 blocks"):
        load([opened(contents)], [Read(0, 0, 0, MiB)], address=memory(MiB).address, size_bytes=MiB, digests=digests)


def test_fresh_memory_is_populated_by_helpers(opened: Opened) -> None:
    contents = some_bytes(40 * MiB)
    with mmap.mmap(-1, len(contents)) as fresh:
        address = Memory.address_of(fresh)
        result = load(
            [opened(contents)],
            [Read(0, 0, 0, len(contents))],
            address=address,
            size_bytes=len(contents),
            options=Options(populate_threads=2, page_cache=False),
            populate=True,
        ).wait()
        assert fresh[:] == contents
    assert result.populate_cpu_seconds > 0
    assert result.fixed_buffers or os.geteuid()


def test_memory_that_the_kernel_does_not_have(opened: Opened) -> None:
    fd = os.memfd_create("arena")
    try:
        os.ftruncate(fd, 4 * MiB)
        with mmap.mmap(fd, 4 * MiB) as arena:
            os.ftruncate(fd, 0)  # the pages behind the mapping are gone, as when the pool of huge pages runs dry
            transfer = load(
                [opened(bytes(4 * MiB))],
                [Read(0, 0, 0, 4 * MiB)],
                address=Memory.address_of(arena),
                size_bytes=4 * MiB,
                populate=True,
            )
            with pytest.raises(OutOfMemory, match="populate: Bad address"):
                transfer.wait()
    finally:
        os.close(fd)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("end", [3 * MiB, 3 * MiB + 700])
def test_a_truncated_file_is_named_with_the_offset_of_its_end(
    opened: Opened, memory: Make, backend: Backend, end: int
) -> None:
    file = opened(some_bytes(end))
    into = memory(8 * MiB)
    options = Options(block_bytes=2 * MiB, depth=2, backend=backend)
    transfer = load([file], [Read(0, 0, 0, 8 * MiB)], address=into.address, size_bytes=8 * MiB, options=options)
    with pytest.raises(TransferFailed, match=rf"{file.path} ends at offset {end}") as failure:
        transfer.wait()
    assert "truncated" in failure.value.hint


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failing_read_names_file_offset_and_errno(opened: Opened, memory: Make, backend: Backend) -> None:
    """Our own memory as a file: where nothing is mapped any more, the kernel answers EIO."""
    into = memory(8192)
    with mmap.mmap(-1, 16384) as source:
        source[:8192] = some_bytes(8192)
        address = Memory.address_of(source)
        itself = opened(path=Path("/proc/self/mem"), flags=os.O_RDONLY)
        options = Options(backend=backend)
        read = [Read(0, address, 0, 8192)]
        result = load([itself], read, address=into.address, size_bytes=8192, options=options).wait()
        assert into[:8192] == source[:8192]
        assert not result.direct
        assert "O_DIRECT refused" in result.fallback
    with pytest.raises(TransferFailed, match=rf"read /proc/self/mem at offset {address}: .*\[EIO\]") as failure:
        load([itself], read, address=into.address, size_bytes=8192, options=options).wait()
    assert "dmesg" in failure.value.hint


def test_a_descriptor_that_cannot_be_read(opened: Opened, memory: Make, tmp_path: Path) -> None:
    folder = opened(path=tmp_path, flags=os.O_RDONLY)
    with pytest.raises(TransferFailed, match="EISDIR"):
        load([folder], [Read(0, 0, 0, 4096)], address=memory(4096).address, size_bytes=4096).wait()


def test_progress_ends_at_the_total(opened: Opened, memory: Make) -> None:
    contents = some_bytes(16 * MiB)
    into = memory(len(contents))
    seen = [0]
    options = Options(block_bytes=64 << 10, depth=1)
    with load(
        [opened(contents)], [Read(0, 0, 0, 16 * MiB)], address=into.address, size_bytes=16 * MiB, options=options
    ) as transfer:
        while not transfer.finished:
            seen.append(transfer.done_bytes)
        assert transfer.wait(0).size_bytes == transfer.done_bytes == transfer.total_bytes == 16 * MiB
    assert seen == sorted(seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cancel_takes_less_than_100_ms(opened: Opened, tmp_path: Path, backend: Backend) -> None:
    sparse = tmp_path / "sparse"
    sparse.touch()
    os.truncate(sparse, 2 * GiB)
    file = opened(path=sparse)
    waits_s = []
    for _ in range(3):
        with mmap.mmap(-1, 2 * GiB) as into:
            transfer = load(
                [file],
                [Read(0, 0, 0, 2 * GiB)],
                address=Memory.address_of(into),
                size_bytes=2 * GiB,
                options=Options(backend=backend),
                populate=True,
            )
            with pytest.raises(TimeoutError):
                transfer.wait(0.02)
            started = time.monotonic()
            transfer.cancel()
            with pytest.raises(Cancelled):
                transfer.wait()
            waits_s.append(time.monotonic() - started)
            assert transfer.finished
            assert transfer.done_bytes < 2 * GiB
    assert min(waits_s) < 0.1, "a busy machine only adds to some of them"


def test_leaving_the_context_ends_the_transfer(opened: Opened, tmp_path: Path, memory: Make) -> None:
    sparse = tmp_path / "sparse"
    sparse.touch()
    os.truncate(sparse, 64 * MiB)
    into = memory(64 * MiB)
    options = Options(block_bytes=4096, depth=1)
    with load(
        [opened(path=sparse)], [Read(0, 0, 0, 64 * MiB)], address=into.address, size_bytes=64 * MiB, options=options
    ) as transfer:
        pass
    with pytest.raises(Cancelled):
        transfer.wait(0)


@pytest.mark.parametrize(
    "options",
    [
        Options(block_bytes=5000),
        Options(block_bytes=0),
        Options(block_bytes=2 * GiB),
        Options(depth=0),
        Options(depth=1 << 20),
        Options(digest_threads=0),
    ],
)
def test_options_that_make_no_sense(opened: Opened, memory: Make, options: Options) -> None:
    with pytest.raises(InvalidArgument):
        load([opened(b"x")], [Read(0, 0, 0, 1)], address=memory(1).address, size_bytes=1, options=options)


def test_reads_that_make_no_sense(opened: Opened, memory: Make) -> None:
    file, into = opened(bytes(8192)), memory(4096)
    with pytest.raises(InvalidArgument, match="outside the memory"):
        load([file], [Read(0, 0, 1, 4096)], address=into.address, size_bytes=4096)
    with pytest.raises(InvalidArgument, match="file 1 of 1"):
        load([file], [Read(1, 0, 0, 4096)], address=into.address, size_bytes=4096)
    with pytest.raises(InvalidArgument, match="hole"):
        digests = digests_of(bytes(4096), 4096)
        load([file], [Read(0, 0, 8, 4000)], address=into.address, size_bytes=4096, digests=digests)
