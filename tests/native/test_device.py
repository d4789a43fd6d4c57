# SPDX-License-Identifier: Apache-2.0
"""The streamer's device side on the host driver, which copies as asynchronously as a GPU.

tests/gpu runs the same on a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import pytest
from native.contents import BACKENDS, Memory, digests_of, open_descriptors, some_bytes
from waiting import PATIENCE_S, until

from flashd.errors import Cancelled, CorruptCheckpoint, InvalidArgument, TransferFailed
from flashd.io.streamer import (
    Backend,
    Extent,
    OpenFile,
    Options,
    Staging,
    Transfer,
    download,
    load_device,
    upload,
    write_device,
)
from flashd.units import KiB

BLOCK = 64 * KiB
OFFSET = 4096
MakeMemory = Callable[[int], Memory]


@pytest.fixture
def staging() -> Iterator[Staging]:
    yield Staging("host", 0, size_bytes=4 * BLOCK, block_bytes=BLOCK)


@pytest.fixture(params=["direct", "page cache"])
def page_cache(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "page cache")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 4096, BLOCK, BLOCK + 1, 33 * BLOCK + 4097])
def test_a_load_is_exact(
    backend: Backend,
    length: int,
    page_cache: bool,
    staging: Staging,
    memory: MakeMemory,
    opened: Callable[..., OpenFile],
) -> None:
    contents = some_bytes(OFFSET + length)
    device = memory(length + 1)
    options = Options(backend=backend, depth=8, page_cache=page_cache, piece_bytes=12 * KiB, pieces=3)
    digests = digests_of(contents[OFFSET:], BLOCK)
    extent = Extent(OFFSET, length)
    with load_device(
        opened(contents), extent, target=device.address, staging=staging, options=options, digests=digests
    ) as transfer:
        result = transfer.wait()
    assert device[:length] == contents[OFFSET:] and device[length : length + 1] == b"\xaa"
    assert transfer.done_bytes == length
    assert 0 < result.staging_bytes <= staging.size_bytes


def test_an_empty_extent_is_loaded_at_once(
    staging: Staging, memory: MakeMemory, opened: Callable[..., OpenFile]
) -> None:
    with load_device(opened(b"x"), Extent(0, 0), target=memory(1).address, staging=staging) as transfer:
        assert transfer.wait().size_bytes == 0


def test_what_the_page_cache_has_is_taken_from_there(
    staging: Staging, memory: MakeMemory, opened: Callable[..., OpenFile]
) -> None:
    contents = some_bytes(8 * BLOCK)
    file = opened(contents)
    for page_cache in (True, False):
        with load_device(
            file, Extent(0, len(contents)), target=memory(len(contents)).address, staging=staging,
            options=Options(page_cache=page_cache),
        ) as transfer:  # fmt: skip
            result = transfer.wait()
        assert result.direct is not page_cache
        assert ("page cache" in result.fallback) is page_cache


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changed_byte_is_found_on_the_way_and_the_staging_memory_is_whole_again(
    backend: Backend, staging: Staging, memory: MakeMemory, opened: Callable[..., OpenFile]
) -> None:
    contents = bytearray(some_bytes(20 * BLOCK))
    digests = digests_of(contents, BLOCK)
    contents[7 * BLOCK + 5] ^= 1
    device = memory(len(contents))
    file, extent = opened(bytes(contents)), Extent(0, len(contents))
    for _ in range(3):
        with (
            load_device(
                file, extent, target=device.address, staging=staging, digests=digests, options=Options(backend=backend)
            ) as transfer,
            pytest.raises(CorruptCheckpoint, match=f"offset {7 * BLOCK}"),
        ):
            transfer.wait()
    with load_device(file, extent, target=device.address, staging=staging) as transfer:
        transfer.wait(PATIENCE_S)


def test_where_all_blocks_fail_those_threads_end_too_that_wait_for_staging_memory(
    staging: Staging, memory: MakeMemory, opened: Callable[..., OpenFile]
) -> None:
    contents = some_bytes(64 * BLOCK)
    device = memory(len(contents))
    file, options = opened(contents), Options(copy_threads=16)
    digests = digests_of(bytes(len(contents)), BLOCK)
    for _ in range(20):
        with (
            load_device(
                file, Extent(0, len(contents)), target=device.address, staging=staging, digests=digests, options=options
            ) as transfer,
            pytest.raises(CorruptCheckpoint),
        ):
            transfer.wait(PATIENCE_S)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_truncated_file_and_a_cancel_leave_the_staging_memory_whole(
    backend: Backend, staging: Staging, memory: MakeMemory, opened: Callable[..., OpenFile]
) -> None:
    contents = some_bytes(16 * BLOCK)
    file, device = opened(contents), memory(64 * BLOCK)
    options = Options(backend=backend, depth=8)
    before = open_descriptors()
    for _ in range(3):
        with (
            load_device(
                file, Extent(0, 64 * BLOCK), target=device.address, staging=staging, options=options
            ) as transfer,
            pytest.raises(TransferFailed, match="truncated"),
        ):
            transfer.wait(PATIENCE_S)
        with load_device(
            file, Extent(0, len(contents)), target=device.address, staging=staging, options=options
        ) as transfer:
            transfer.cancel()
            with contextlib.suppress(Cancelled):
                transfer.wait(PATIENCE_S)
    with load_device(file, Extent(0, len(contents)), target=device.address, staging=staging) as transfer:
        transfer.wait(PATIENCE_S)
    del transfer
    assert device[: len(contents)] == contents
    assert open_descriptors() == before


@pytest.mark.parametrize(("piece_bytes", "pieces"), [(4 * KiB, 1), (4 * KiB, 16), (20 * KiB, 2), (1024 * KiB, 9)])
@pytest.mark.parametrize("copy_threads", [1, 7])
def test_pieces_of_any_size_arrive(
    piece_bytes: int,
    pieces: int,
    copy_threads: int,
    staging: Staging,
    memory: MakeMemory,
    opened: Callable[..., OpenFile],
) -> None:
    """More threads than blocks, more pieces than fit into one, pieces larger than one."""
    contents = some_bytes(13 * BLOCK + 4321)
    size_bytes = len(contents)
    options = Options(copy_threads=copy_threads, piece_bytes=piece_bytes, pieces=pieces)
    loaded, uploaded = memory(size_bytes), memory(size_bytes)
    with load_device(
        opened(contents), Extent(0, size_bytes), target=loaded.address, staging=staging, options=options,
        digests=digests_of(contents, BLOCK),
    ) as transfer:  # fmt: skip
        assert "page cache" in transfer.wait(60).fallback
    assert loaded[:] == contents and transfer.done_bytes == size_bytes
    with upload(
        address=loaded.address, size_bytes=size_bytes, target=uploaded.address, is_registered=False, staging=staging,
        options=options,
    ) as transfer:  # fmt: skip
        transfer.wait(60)
    assert uploaded[:] == contents and transfer.done_bytes == size_bytes


@pytest.mark.parametrize("wrong", [{"piece_bytes": 0}, {"piece_bytes": 4095}, {"pieces": 0}])
def test_pieces_that_cannot_be_are_refused(wrong: dict[str, int], staging: Staging, memory: MakeMemory) -> None:
    with pytest.raises(InvalidArgument, match="on their way"):
        upload(
            address=memory(1).address, size_bytes=1, target=memory(1).address, is_registered=False, staging=staging,
            options=Options(**wrong),  # type: ignore[arg-type]
        )  # fmt: skip


def test_a_disk_is_read_at_the_depth_asked_for_as_far_as_staging_memory_goes(
    staging: Staging, memory: MakeMemory, opened: Callable[..., OpenFile]
) -> None:
    contents = some_bytes(8 * BLOCK)
    for depth, found in ((1, 1), (2, 2), (12, 3)):
        with load_device(
            opened(contents), Extent(0, len(contents)), target=memory(len(contents)).address, staging=staging,
            options=Options(depth=depth, page_cache=False),
        ) as transfer:  # fmt: skip
            assert transfer.wait(60).depth == found, "a block is left for what is on its way to the device"


@pytest.mark.parametrize("number_of", [2, 9])
def test_loads_from_the_page_cache_hand_blocks_to_each_other(
    number_of: int, staging: Staging, memory: MakeMemory, opened: Callable[..., OpenFile]
) -> None:
    """Each thread keeps its block until others want it; here there are more transfers than blocks."""
    contents = some_bytes(60 * BLOCK)
    file = opened(contents)
    devices = [memory(len(contents)) for _ in range(number_of)]
    transfers = [
        load_device(
            file, Extent(0, len(contents)), target=device.address, staging=staging,
            options=Options(copy_threads=4, piece_bytes=16 * KiB),
        )
        for device in devices
    ]  # fmt: skip
    for transfer in transfers:
        with transfer:
            transfer.wait(60)
    assert all(device[:] == contents for device in devices)
    assert staging.peak_bytes <= staging.size_bytes


def test_many_transfers_share_the_staging_memory_and_none_starves(
    staging: Staging, memory: MakeMemory, opened: Callable[..., OpenFile]
) -> None:
    """More transfers, each with more reads in flight, than there are blocks."""
    contents = some_bytes(40 * BLOCK)
    file = opened(contents)
    devices = [memory(len(contents)) for _ in range(9)]
    transfers = [
        load_device(
            file, Extent(0, len(contents)), target=device.address, staging=staging,
            options=Options(backend=BACKENDS[number % 2], depth=8, page_cache=False),
            digests=digests_of(contents, BLOCK),
        )
        for number, device in enumerate(devices)
    ]  # fmt: skip
    for transfer in transfers:
        with transfer:
            transfer.wait(60)
    assert all(device[:] == contents for device in devices)
    assert staging.peak_bytes == staging.size_bytes


def test_two_loads_at_once_go_forward_side_by_side(
    staging: Staging, memory: MakeMemory, opened: Callable[..., OpenFile]
) -> None:
    contents = some_bytes(600 * BLOCK)
    file = opened(contents)
    extent = Extent(0, len(contents))

    devices = [memory(len(contents)) for _ in range(2)]

    def start(device: Memory) -> Transfer:
        return load_device(file, extent, target=device.address, staging=staging, options=Options(page_cache=False))

    shares = []
    for _ in range(5):
        with start(devices[0]) as one, start(devices[1]) as other:
            one.wait(60)
            shares.append(other.done_bytes / one.total_bytes)
            other.wait(60)
    assert median(shares) > 0.3, "the other one waited for it"


def test_digests_of_another_block_size_are_refused(
    staging: Staging, memory: MakeMemory, opened: Callable[..., OpenFile]
) -> None:
    contents = some_bytes(BLOCK)
    with pytest.raises(InvalidArgument, match="cannot be compared"):
        load_device(
            opened(contents), Extent(0, BLOCK), target=memory(BLOCK).address, staging=staging,
            digests=digests_of(contents, 4096),
        )  # fmt: skip


@pytest.mark.parametrize("is_registered", [True, False])
@pytest.mark.parametrize("length", [1, 5 * BLOCK + 3, 129 << 20])
def test_host_memory_goes_to_the_device_and_back(
    is_registered: bool, length: int, staging: Staging, memory: MakeMemory
) -> None:
    host, device, back = memory(length), memory(length), memory(length + 1)
    host.mapping[:length] = (
        os.urandom(min(length, 1 << 20)) * (length >> 20) if length >= 1 << 20 else some_bytes(length)
    )
    with upload(
        address=host.address, size_bytes=length, target=device.address, is_registered=is_registered, staging=staging
    ) as transfer:
        assert transfer.wait(60).size_bytes == transfer.done_bytes == length
    with download(
        source=device.address, address=back.address, size_bytes=length, is_registered=is_registered, staging=staging
    ) as transfer:
        result = transfer.wait(60)
    assert back[:length] == host[:length] and back[length : length + 1] == b"\xaa"
    assert ("not registered" in result.fallback) is not is_registered


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 4096, 30 * BLOCK + 77])
def test_device_memory_goes_to_a_file(
    backend: Backend, length: int, staging: Staging, memory: MakeMemory, opened: Callable[..., OpenFile]
) -> None:
    device = memory(length)
    device.mapping[:length] = some_bytes(length)
    target = opened(b"h" * OFFSET + b"old" * BLOCK)
    with write_device(
        target, source=device.address, size_bytes=length, target_offset=OFFSET, staging=staging,
        options=Options(backend=backend),
    ) as transfer:  # fmt: skip
        digests = transfer.wait(60).digests
    assert Path(target.path).read_bytes() == b"h" * OFFSET + device[:]
    assert digests == digests_of(device[:], BLOCK).table


def test_too_little_staging_memory_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="not enough staging memory"):
        Staging("host", 0, size_bytes=1000)


def test_no_thread_outlives_its_transfer(staging: Staging, memory: MakeMemory, opened: Callable[..., OpenFile]) -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = threads()
    contents = some_bytes(4 * BLOCK)
    with load_device(
        opened(contents), Extent(0, len(contents)), target=memory(len(contents)).address, staging=staging,
        digests=digests_of(contents, BLOCK),
    ) as transfer:  # fmt: skip
        transfer.wait()
    until(lambda: threads() == before)  # a thread that was joined is listed for a moment more
