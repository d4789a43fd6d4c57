# SPDX-License-Identifier: Apache-2.0
"""GPU memory as descriptors: allocated, passed on, mapped for reading, and freed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from machine import check_freed, used_bytes
from native.contents import digests_of

from flashd import tensors
from flashd.checkpoint import header
from flashd.errors import CorruptCheckpoint, DeviceFailed, InvalidArgument, OutOfMemory
from flashd.io import cuda
from flashd.io.streamer import Digests, Extent, OpenFile, Options, Staging, download, load_device, upload, write_device
from flashd.memory.arena import CudaArena, HostArena, HugePages
from flashd.units import GiB, MiB

pytestmark = pytest.mark.usefixtures("nothing_leaks")
SIZE = 40 * MiB + 12345
MAPPED = 42 * MiB


@pytest.fixture(scope="module")
def staging() -> Staging:
    return Staging("cuda", cuda.context(0), size_bytes=256 * MiB)


def test_a_gpu_is_described() -> None:
    gpu = cuda.gpus()[0]
    assert gpu.name == "cuda:0" and gpu.maps_memory and gpu.exports_memory
    assert gpu.uuid == str(torch.cuda.get_device_properties(0).uuid)
    assert gpu.total_bytes == torch.cuda.get_device_properties(0).total_memory
    assert cuda.granularity(0) == 2 * MiB, "what CudaDevice.rounded supposes"
    assert 0 < cuda.used_bytes(gpu) < gpu.total_bytes


def filled(staging: Staging, contents: bytes) -> CudaArena:
    arena = CudaArena.allocate(0, len(contents), MAPPED)
    with HostArena(len(contents), "x", HugePages.NONE) as host:
        ctypes.memmove(host.address, contents, len(contents))
        with upload(
            address=host.address, size_bytes=len(contents), target=arena.address, is_registered=False, staging=staging
        ) as transfer:
            transfer.wait()
    arena.seal()
    return arena


def test_what_is_exported_is_mapped_whole_or_not_at_all(staging: Staging) -> None:
    contents = os.urandom(SIZE)
    arena = filled(staging, contents)
    fd = arena.open_read_only()
    arena.close()
    with cuda.Mapping(0, fd, MAPPED, is_writable=False) as mapping:
        assert cuda.read(0, mapping.address, SIZE) == contents
    for wrong in (MAPPED // 2, 2 * MAPPED):
        with pytest.raises(DeviceFailed):
            cuda.Mapping(0, fd, wrong, is_writable=False)
    with pytest.raises(InvalidArgument):
        CudaArena.adopt(0, os.dup(fd), 3 * MAPPED, 3 * MAPPED)
    CudaArena.adopt(0, os.dup(fd), SIZE, MAPPED).close()
    os.close(fd)
    null = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(InvalidArgument):
        CudaArena.adopt(0, null, SIZE, MAPPED)


def test_a_write_through_a_mapping_for_reading_is_refused() -> None:
    """In a process of its own: the driver takes the whole context away from whoever tries."""
    code = """
import sys
from cuda.bindings import driver
from flashd.io import cuda
cuda.enter(0)
fd = cuda.allocate(0, 2 << 20)
mapping = cuda.Mapping(0, fd, 2 << 20, is_writable=False)
(status,) = driver.cuMemsetD8(mapping.address, 1, 16)
status = status or driver.cuCtxSynchronize()[0]
print(status.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "CUDA_ERROR" in done.stdout, done.stdout + done.stderr


def test_more_than_there_is_is_refused_with_numbers() -> None:
    with pytest.raises(OutOfMemory, match="are free, according to its driver"):
        cuda.allocate(0, 2000 * GiB)


def test_tensors_of_every_dtype_over_a_mapped_arena(staging: Staging, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    expected = {
        str(dtype): torch.randn(17, 5).to(dtype) if dtype.is_floating_point else torch.ones(17, 5).to(dtype)
        for dtype in (
            torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32,
            torch.uint32, torch.float32, torch.int64, torch.uint64, torch.float64, torch.float8_e4m3fn,
            torch.float8_e5m2,
        )
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    save_file(expected, path)
    with path.open("rb") as file:
        found = header.read(file.fileno(), str(path))
        arena = CudaArena.allocate(0, found.data_bytes, 2 * MiB)
        extent = Extent(found.data_offset, found.data_bytes)
        with load_device(OpenFile(file.fileno(), str(path)), extent, target=arena.address, staging=staging) as transfer:
            transfer.wait()
    arena.seal()
    fd = arena.open_read_only()
    arena.close()
    base = tensors.mapped(fd, found.data_bytes, 2 * MiB, memory="cuda", gpu_uuid=cuda.gpus()[0].uuid)
    os.close(fd)
    on_device = tensors.torch_tensors(base, found)
    del base
    assert set(on_device) == set(expected)
    for name, tensor in expected.items():
        assert on_device[name].device == torch.device("cuda:0") and on_device[name].dtype == tensor.dtype
        assert torch.equal(on_device[name].cpu().view(torch.uint8), tensor.view(torch.uint8)), name
    del on_device, tensor


@pytest.mark.parametrize("registers_read_only", [True, False])
def test_transfers_are_exact_in_every_direction(staging: Staging, tmp_path: Path, registers_read_only: bool) -> None:
    contents = os.urandom(SIZE)
    (tmp_path / "x").write_bytes(contents)
    digests = digests_of(contents, 8 * MiB)
    arena = CudaArena.allocate(0, SIZE, MAPPED)
    for options in (Options(page_cache=False), Options(), Options(direct=False, page_cache=False)):
        with (tmp_path / "x").open("rb") as file:
            source = OpenFile(file.fileno(), "x")
            with load_device(
                source, Extent(0, SIZE), target=arena.address, staging=staging, options=options, digests=digests
            ) as transfer:
                assert transfer.wait().staging_bytes <= 256 * MiB
    with HostArena(SIZE, "x", HugePages.NONE, registers_read_only=registers_read_only) as host:
        with download(
            source=arena.address, address=host.address, size_bytes=SIZE, is_registered=False, staging=staging
        ) as transfer:
            transfer.wait()
        assert ctypes.string_at(host.address, SIZE) == contents
        host.seal()
        host.register(0)
        with host.viewed() as view:
            assert view.is_registered
            other = CudaArena.allocate(0, SIZE, MAPPED)
            with upload(
                address=view.address, size_bytes=SIZE, target=other.address, is_registered=True, staging=staging
            ) as transfer:
                assert not transfer.wait().fallback
            assert cuda.read(0, other.address, SIZE) == contents
            other.close()
    with (tmp_path / "y").open("w+b") as file:
        target = OpenFile(file.fileno(), "y")
        with write_device(target, source=arena.address, size_bytes=SIZE, staging=staging) as transfer:
            transfer.wait()
    assert (tmp_path / "y").read_bytes() == contents
    arena.close()


_MOVER = """
import sys
from pathlib import Path
from flashd.io import cuda
from flashd.memory.arena import CudaArena, HostArena, HugePages
from flashd.io.streamer import Extent, OpenFile, Options, Staging, download, load_device, upload, write_device
from flashd.units import MiB

size_bytes = 512 * MiB
kind, path = sys.argv[1:]
file = Path(path).open("r+b")
source = OpenFile(file.fileno(), path)
staging = Staging("cuda", cuda.context(0), size_bytes=256 * MiB)
arena = CudaArena.allocate(0, size_bytes, size_bytes)
host = HostArena(size_bytes, "x", HugePages.NONE)
between = dict(size_bytes=size_bytes, staging=staging)


def begin():
    match kind:
        case "nvme to device" | "page cache to device":
            options = Options(page_cache=kind.startswith("page cache"))
            return load_device(source, Extent(0, size_bytes), target=arena.address, staging=staging, options=options)
        case "device to nvme":
            return write_device(source, source=arena.address, **between)
        case "host to device":
            return upload(address=host.address, target=arena.address, is_registered=False, **between)
        case "registered host to device":
            with host.viewed() as view:
                return upload(address=view.address, target=arena.address, is_registered=True, **between)
        case "device to host":
            return download(source=arena.address, address=host.address, is_registered=False, **between)


if kind == "registered host to device":
    host.seal()
    host.register(0)
while True:
    with begin() as transfer:
        while not (transfer.done_bytes or transfer.finished):
            pass
        print("moving", flush=True)
        transfer.wait()
"""


@pytest.mark.parametrize(
    "kind",
    [
        "nvme to device",
        "page cache to device",
        "device to nvme",
        "host to device",
        "registered host to device",
        "device to host",
    ],
)
def test_whoever_is_killed_during_a_transfer_leaves_nothing_on_the_card(kind: str, tmp_path: Path) -> None:
    """The streamer by itself; test_gpu_daemon has the daemon."""
    path = tmp_path / "x"
    with path.open("wb") as file:
        for _ in range(512):
            file.write(bytes(MiB))
    before = used_bytes()
    command = [sys.executable, "-c", _MOVER, kind, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as mover:
        assert mover.stdout is not None
        assert [mover.stdout.readline() for _ in range(2)] == ["moving\n"] * 2
        assert used_bytes() >= before + 512 * MiB
        mover.kill()
    check_freed(before)


def test_whatever_ends_a_transfer_nothing_is_left_of_it(staging: Staging, tmp_path: Path) -> None:
    contents = bytearray(os.urandom(400 * MiB))
    digests = digests_of(bytes(contents), 8 * MiB)
    contents[200 * MiB] ^= 1
    (tmp_path / "x").write_bytes(contents)
    arena = CudaArena.allocate(0, len(contents), len(contents))
    before = len(list(Path("/proc/self/task").iterdir()))
    with (tmp_path / "x").open("rb") as file:
        source, whole = OpenFile(file.fileno(), "x"), Extent(0, len(contents))

        def run(extent: Extent, found: Digests | None = None, cancel: bool = False) -> None:
            with load_device(source, extent, target=arena.address, staging=staging, digests=found) as transfer:
                if cancel:
                    transfer.cancel()
                transfer.wait(60)

        for _ in range(3):
            with pytest.raises(CorruptCheckpoint, match=f"offset {200 * MiB}"):
                run(whole, digests)
            with pytest.raises(Exception, match="cancelled"):
                run(whole, cancel=True)
            with pytest.raises(Exception, match="ends at"):
                run(Extent(MiB, len(contents)))
        run(whole)
    assert cuda.read(0, arena.address, MiB) == contents[:MiB]
    arena.close()
    assert len(list(Path("/proc/self/task").iterdir())) == before
