# SPDX-License-Identifier: Apache-2.0
"""Fallbacks: where the fast path is refused, the bytes arrive by another, and the result says which and why.

The refusals are real: each test runs in its own process, which the kernel denies something.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from native.contents import some_bytes

from flashd.units import MiB

LOAD = """
import dataclasses, json, mmap, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from native.contents import Memory
from flashd.io.streamer import Backend, OpenFile, Options, Read, load, write

path, backend = Path(sys.argv[2]), Backend(sys.argv[3])
def transfers():
    size = path.stat().st_size
    into = Memory(size)
    with path.open("r+b") as file:
        opened = OpenFile(file.fileno(), str(path))
        options = Options(block_bytes=1 << 20, backend=backend, page_cache=False)
        loaded = load([opened], [Read(0, 0, 0, size)], address=into.address, size_bytes=size, options=options).wait()
        assert into[:size] == path.read_bytes()
        written = write(opened, address=into.address, size_bytes=size, options=options).wait()
        assert into[:size] == path.read_bytes()
    into.mapping.close()
    print(json.dumps([dataclasses.asdict(result) | {"digests": ""} for result in (loaded, written)]))
"""

# seccomp(2): io_uring_setup (425 on every architecture) answers EPERM, as container runtimes have it.
WITHOUT_IO_URING = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
filters = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in [
        (LOAD, 0, 0, 0), (JUMP_IF_EQUAL, 0, 1, 425), (RETURN, 0, 0, 0x00050001), (RETURN, 0, 0, 0x7FFF0000)
    ]
)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(4, filters))) == 0
"""

# capabilities(7): without CAP_IPC_LOCK, registered buffers count against RLIMIT_MEMLOCK.
WITHOUT_LOCKED_MEMORY = """
import ctypes, resource, struct
libc = ctypes.CDLL(None, use_errno=True)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
assert libc.syscall(126 if os.uname().machine == "x86_64" else 91, struct.pack("II", 0x20080522, 0), bytes(24)) == 0
"""


def transfers(
    path: Path, *, setup: str = "", backend: str = "auto", ok: bool = True
) -> tuple[list[dict[str, object]], str]:
    tests = str(Path(__file__).parents[1])
    code = LOAD + setup + "\ntransfers()\n"
    done = subprocess.run(
        [sys.executable, "-c", code, tests, str(path), backend], capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == ok, done.stderr
    return (json.loads(done.stdout) if ok else []), done.stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(some_bytes(6 * MiB + 321))
    return path


def test_the_fast_way(file: Path) -> None:
    for result in transfers(file)[0]:
        assert (result["backend"], result["direct"], result["fallback"]) == ("io_uring", True, "")
        assert result["fixed_files"]


def test_io_uring_refused_by_seccomp(file: Path) -> None:
    for result in transfers(file, setup=WITHOUT_IO_URING)[0]:
        assert (result["backend"], result["direct"]) == ("threads", True)
        assert result["fallback"] == "io_uring refused: Operation not permitted"


def test_io_uring_refused_but_demanded(file: Path) -> None:
    _, errors = transfers(file, setup=WITHOUT_IO_URING, backend="io_uring", ok=False)
    assert "TransferFailed: io_uring_setup io_uring: Operation not permitted [EPERM]" in errors


def test_threads_by_choice_are_no_fallback(file: Path) -> None:
    for result in transfers(file, backend="threads")[0]:
        assert (result["backend"], result["direct"], result["fallback"]) == ("threads", True, "")


def test_buffers_are_registered_where_the_limits_allow(file: Path) -> None:
    free, _ = transfers(file)[0]
    tight, _ = transfers(file, setup=WITHOUT_LOCKED_MEMORY)[0]
    assert not tight["fixed_buffers"]
    assert tight["backend"] == "io_uring"
    assert free["fixed_buffers"] == (os.geteuid() == 0 or free["fixed_buffers"])


@pytest.mark.parametrize("backend", ["io_uring", "threads"])
def test_a_file_system_in_memory(backend: str) -> None:
    """tmpfs takes O_DIRECT since Linux 6.6; before, the result says that it does not."""
    path = Path(f"/dev/shm/flashd-test-{os.getpid()}-{backend}")
    path.write_bytes(some_bytes(3 * MiB + 5))
    try:
        for result in transfers(path, backend=backend)[0]:
            assert result["backend"] == backend
            assert result["direct"] == (result["fallback"] == "")
            if not result["direct"]:
                assert result["fallback"] == "O_DIRECT refused: Invalid argument"
    finally:
        path.unlink()
