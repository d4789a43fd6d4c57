# SPDX-License-Identifier: Apache-2.0
"""Copies, writes and verification: bytes and digests in any arrangement, with nothing left behind."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native.contents import BACKENDS, Memory, digests_of, open_descriptors, some_bytes

from flashd.errors import Cancelled, CorruptCheckpoint, InvalidArgument, StoreFull, TransferFailed
from flashd.io.streamer import Backend, Extent, OpenFile, Options, Piece, copy, verify, write
from flashd.units import GiB, MiB

Opened = Callable[..., OpenFile]
Make = Callable[[int], Memory]
REGION = 8192


@contextmanager
def no_file_larger_than(size_bytes: int) -> Iterator[None]:
    """A full disk, as far as writes can tell (setrlimit(2)); Python ignores SIGXFSZ."""
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def cached_bytes(path: str) -> int:
    """How much of a file is in the page cache (mincore(2))."""
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapping:
        pages = -(-len(mapping) // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(Memory.address_of(mapping))
        assert libc.mincore(address, ctypes.c_size_t(len(mapping)), resident) == 0, ctypes.get_errno()
        return sum(page & 1 for page in resident) * mmap.PAGESIZE


class TestCopy:
    @given(
        lengths=st.lists(st.integers(0, 300_000), max_size=12),
        block_pages=st.sampled_from([1, 3, 16]),
        direct=st.booleans(),
        data=st.data(),
    )
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_arrangement(
        self, opened: Opened, lengths: list[int], block_pages: int, direct: bool, data: st.DataObject
    ) -> None:
        contents = [some_bytes(400_000, 1), some_bytes(310_001, 2)]
        pieces, expected = [], b""
        for length in lengths:
            file = data.draw(st.integers(0, 1))
            source = data.draw(st.integers(0, len(contents[file]) - length))
            pieces.append(Piece(file, source, len(expected), length))
            expected += contents[file][source : source + length]
        target = opened(b"\x55" * (REGION + 900_000))
        block_bytes = block_pages * 4096
        result = copy(
            [opened(part) for part in contents],
            pieces,
            target,
            region_offset=REGION,
            digest_block_bytes=block_bytes,
            options=Options(depth=3, direct=direct),
        ).wait()
        assert Path(target.path).read_bytes() == b"\x55" * REGION + expected
        assert result.digests == digests_of(expected, block_bytes).table
        assert result.size_bytes == len(expected)

    def test_a_file_is_filled_by_several_copies_in_any_order(self, opened: Opened) -> None:
        contents = some_bytes(3 * 4096 + 5)
        source, target = opened(contents), opened(b"\x55" * REGION)
        for offset, length in ((8192, 4101), (0, 4096), (4096, 4096)):
            result = copy(
                [source],
                [Piece(0, offset, 0, length)],
                target,
                region_offset=REGION + offset,
                digest_block_bytes=4096,
                file_bytes=REGION + len(contents),
            ).wait()
            assert result.digests == digests_of(contents[offset : offset + length], 4096).table
            assert Path(target.path).stat().st_size == REGION + len(contents)
        assert Path(target.path).read_bytes() == b"\x55" * REGION + contents

    def test_the_page_cache_is_left_as_it_was(self, opened: Opened) -> None:
        contents = some_bytes(64 * MiB + 5)
        source, target = opened(contents), opened(b"")
        os.fsync(source.fd)
        os.posix_fadvise(source.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        pieces = [Piece(0, 5, 0, 64 * MiB)]
        copy([source], pieces, target, region_offset=0, digest_block_bytes=8 * MiB).wait()
        assert cached_bytes(source.path) < MiB
        assert cached_bytes(target.path) < MiB
        assert Path(target.path).read_bytes() == contents[5:]

    def test_no_space_is_told_apart_and_names_the_file(self, opened: Opened) -> None:
        source, target = opened(some_bytes(3 * MiB)), opened(b"")
        with no_file_larger_than(MiB):
            transfer = copy([source], [Piece(0, 0, 0, 3 * MiB)], target, region_offset=0, digest_block_bytes=MiB)
            with pytest.raises(StoreFull, match=target.path):
                transfer.wait()

    def test_a_short_source_names_it_and_its_end(self, opened: Opened) -> None:
        source, target = opened(some_bytes(3 * MiB + 17)), opened(b"")
        pieces = [Piece(0, 100, 0, 4 * MiB)]
        with pytest.raises(TransferFailed, match=f"{source.path} ends at offset {3 * MiB + 17}"):
            copy([source], pieces, target, region_offset=0, digest_block_bytes=MiB).wait()

    def test_plans_that_make_no_sense(self, opened: Opened) -> None:
        source, target = opened(bytes(8192)), opened(b"")
        for pieces, block_bytes, region in [
            ([Piece(0, 0, 1, 10)], 4096, 0),
            ([Piece(1, 0, 0, 10)], 4096, 0),
            ([Piece(0, 0, 0, 10)], 5000, 0),
            ([Piece(0, 0, 0, 10)], 4096, 100),
        ]:
            with pytest.raises(InvalidArgument):
                copy([source], pieces, target, region_offset=region, digest_block_bytes=block_bytes)
        assert Path(target.path).read_bytes() == b""


class TestWrite:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("length", [0, 1, 4096, MiB + 4095, 9 * MiB + 1])
    @pytest.mark.parametrize("offset", [0, 4096])
    def test_memory_comes_back_from_the_file(
        self, opened: Opened, memory: Make, backend: Backend, length: int, offset: int
    ) -> None:
        contents, source = some_bytes(length), memory(length)
        source.mapping[:length] = contents
        target = opened(b"\x55" * 11 * MiB)  # larger than the result: no old bytes may remain
        before = open_descriptors()
        options = Options(block_bytes=MiB, depth=3, backend=backend)
        result = write(target, address=source.address, size_bytes=length, target_offset=offset, options=options).wait()
        assert Path(target.path).read_bytes() == b"\x55" * offset + contents
        assert (result.backend, result.direct, result.size_bytes) == (backend, True, length)
        assert open_descriptors() == before

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_no_space(self, opened: Opened, memory: Make, backend: Backend) -> None:
        target, source = opened(b""), memory(4 * MiB)
        with no_file_larger_than(MiB):
            options = Options(backend=backend)
            transfer = write(target, address=source.address, size_bytes=4 * MiB, options=options)
            with pytest.raises(StoreFull, match=target.path) as failure:
                transfer.wait()
        assert "free some space" in failure.value.hint

    def test_a_target_that_is_not_open_for_writing(self, opened: Opened, memory: Make) -> None:
        target = opened(b"abc", flags=os.O_RDONLY)
        with pytest.raises(TransferFailed, match="EBADF"):
            write(target, address=memory(4096).address, size_bytes=4096).wait()
        assert Path(target.path).read_bytes() == b"abc"


class TestVerify:
    def test_what_is_as_it_was_passes(self, opened: Opened) -> None:
        contents = some_bytes(5 * MiB + 31)
        digests = digests_of(contents[4096:], MiB)
        file = opened(contents)
        with verify(file, Extent(4096, len(contents) - 4096), digests) as transfer:
            result = transfer.wait()
        assert result.size_bytes == transfer.done_bytes == len(contents) - 4096
        assert result.direct

    @pytest.mark.parametrize("flipped", [4096, 4096 + 2 * MiB - 1, 4096 + 5 * MiB + 30])
    def test_a_changed_byte_is_found_in_its_block(self, opened: Opened, flipped: int) -> None:
        contents = bytearray(some_bytes(4096 + 5 * MiB + 31))
        digests = digests_of(bytes(contents[4096:]), MiB)
        contents[flipped] ^= 0x80
        file = opened(contents)
        block = 4096 + (flipped - 4096) // MiB * MiB
        with pytest.raises(CorruptCheckpoint, match=f"offset {block} of {file.path}"):
            verify(file, Extent(4096, len(contents) - 4096), digests).wait()

    def test_a_truncated_file(self, opened: Opened) -> None:
        contents = some_bytes(3 * MiB)
        file = opened(contents[: 2 * MiB])
        with pytest.raises(TransferFailed, match=f"ends at offset {2 * MiB}"):
            verify(file, Extent(0, 3 * MiB), digests_of(contents, MiB)).wait()

    def test_a_table_of_the_wrong_length(self, opened: Opened) -> None:
        contents = some_bytes(3 * MiB)
        with pytest.raises(CorruptCheckpoint, match="3 digests for 2 blocks"):
            verify(opened(contents), Extent(0, 2 * MiB), digests_of(contents, MiB))

    def test_cancel_takes_less_than_100_ms(self, opened: Opened, tmp_path: Path) -> None:
        sparse = tmp_path / "sparse"
        sparse.touch()
        os.truncate(sparse, 32 * GiB)
        digests = digests_of(bytes(8 * MiB), 8 * MiB)
        digests = type(digests)(8 * MiB, digests.table * (32 * GiB // (8 * MiB)))
        waits_s = []
        for _ in range(3):
            transfer = verify(opened(path=sparse), Extent(0, 32 * GiB), digests)
            with pytest.raises(TimeoutError):
                transfer.wait(0.05)
            started = time.monotonic()
            transfer.cancel()
            with pytest.raises(Cancelled):
                transfer.wait()
            waits_s.append(time.monotonic() - started)
        assert min(waits_s) < 0.1, "a busy machine only adds to some of them"
