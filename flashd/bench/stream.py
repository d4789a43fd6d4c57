# SPDX-License-Identifier: Apache-2.0
"""Benchmark of loads from the disk, compared with raw reads.

Every round does, in random order: a raw O_DIRECT read of the file into populated memory, with the two best combinations
of block size and depth from a small sweep; a load into populated memory, without and with digests; a load into new
memory, as in the daemon; and a load by the safetensors library with an empty page cache. The limit is the better of the
two raw reads. Memory is touched once before the first round, because a virtual machine gets it from its host only then,
which shall not be measured. CPU time is that of the whole process, including kernel helpers.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from flashd.bench.copying import STAGING_BYTES, Link
from flashd.bench.report import Report, Row, cost_row, rate_row, report
from flashd.checkpoint import header
from flashd.checkpoint.files import MANIFEST, WEIGHTS, Checkpoint
from flashd.errors import InvalidArgument
from flashd.io import cuda
from flashd.io.streamer import (
    ALIGNMENT,
    Digests,
    Extent,
    OpenFile,
    Options,
    Read,
    TransferResult,
    load,
    load_device,
    raw_read,
)
from flashd.memory.arena import HostArena, HugePages, probe_huge_pages
from flashd.memory.device import Device
from flashd.units import MiB

SWEEP = [(block * MiB, depth) for block, depth in ((1, 32), (4, 16), (8, 8), (8, 16), (16, 8), (32, 4))]
CPU_S_PER_GB = 0.03
_HUGE_PAGE = 2 * MiB
# Short measurements are repeated several times in a row, because idle processors take time to wake up.
_SHORT_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Subject:
    """The file, and the extent of it that an arena would hold."""

    path: Path
    extent: Extent
    digests: Digests | None

    @property
    def aligned(self) -> Extent:
        """The extent for a raw O_DIRECT read: all except an unaligned tail."""
        return Extent(self.extent.offset, self.extent.length // ALIGNMENT * ALIGNMENT)


def run(
    path: Path,
    *,
    runs: int,
    device: Device | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Measures loads, with a device also loads to it, from the disk and from a copy in memory.

    Raises InvalidArgument for files that are too small to measure, or whose data is not aligned.
    """
    subject = subject_of(path)
    figures: defaultdict[str, list[float]] = defaultdict(list)
    peer = _peer(subject)
    with ExitStack() as stack:
        file = stack.enter_context(_opened(subject.path))
        ready = stack.enter_context(Ready(subject.extent.length, device))
        link = stack.enter_context(Link(device, subject.extent.length)) if device else None
        ram_file = stack.enter_context(in_memory(subject)) if device else None
        finalists = _sweep(subject, ready)
        device_steps = _device_steps(file, ram_file, subject, link, ready, figures) if link else []

        def raw() -> None:
            for choice in finalists:
                figures[f"raw {choice}"].append(_raw(subject, ready, choice))

        def ready_load() -> None:
            before_s = time.process_time()
            result = _load(file, subject, ready.address, ready.size_bytes)
            figures["load"].append(result.gb_per_s)
            figures["cpu"].append((time.process_time() - before_s) / result.size_bytes * 1e9)

        def verified() -> None:
            if subject.digests:
                result = _load(file, subject, ready.address, ready.size_bytes, digests=subject.digests)
                figures["digests"].append(result.gb_per_s)

        def fresh() -> None:
            with HostArena(subject.extent.length, "bench", probe_huge_pages()) as arena:
                result = _load(file, subject, arena.address, arena.mapped_bytes, populate=True)
            figures["fresh"].append(result.gb_per_s)
            figures["populate"].append(result.populate_cpu_seconds / result.size_bytes * 1e9)

        def safetensors() -> None:
            if peer:
                figures["safetensors"].append(subject.extent.length / peer() / 1e9)

        fresh()  # the first touch of memory depends on the host of a virtual machine
        figures.clear()
        for done in range(runs):
            on_progress(done, runs)
            steps = [raw, ready_load, verified, fresh, safetensors]
            steps += device_steps
            random.shuffle(steps)
            for step in steps:
                step()
        on_progress(runs, runs)
    limit = max((figures[f"raw {choice}"] for choice in finalists), key=median)
    rows = _rows(figures, limit, _peak_bytes(path), subject.extent.length)
    rows += _device_rows(figures, limit) if device else []
    driver, gpu = (device.kind.value, device.gpu) if device else ("host", None)
    command = f"flash bench stream {path.name} --runs {runs}"
    return report("stream", f"{command} ({subject.extent.length / 1e9:.1f} GB)", rows, driver=driver, gpu=gpu)


def _rows(figures: defaultdict[str, list[float]], raw: list[float], peak_bytes: int, model_bytes: int) -> list[Row]:
    rows = [
        rate_row("nvme_to_host", figures["load"], "GB/s", raw),
        rate_row("nvme_to_host.fresh_memory", figures["fresh"], "GB/s", raw),
        cost_row("cpu_s_per_gb", figures["cpu"], "s/GB", CPU_S_PER_GB),
        cost_row("populate_cpu_s_per_gb", figures["populate"], "s/GB"),
        cost_row("peak_bytes", [float(peak_bytes)], "B", float(model_bytes)),
    ]
    if figures["digests"]:
        rows.insert(1, rate_row("nvme_to_host.verified", figures["digests"], "GB/s", raw))
    if figures["safetensors"]:
        rows.append(rate_row("peer.safetensors.cold", figures["safetensors"], "GB/s", raw))
    return rows


def _device_steps(
    file: OpenFile,
    ram_file: OpenFile | None,
    subject: Subject,
    link: Link,
    ready: Ready,
    figures: defaultdict[str, list[float]],
) -> list[Callable[[], None]]:
    def timed(source: OpenFile, name: str, *, page_cache: bool) -> TransferResult:
        before_s = time.process_time()
        result = _load_device(source, subject, link, page_cache=page_cache)
        figures[name].append(result.gb_per_s)
        figures[f"{name} cpu"].append((time.process_time() - before_s) / result.size_bytes * 1e9)
        return result

    def from_disk() -> None:
        figures["staging"].append(float(timed(file, "device", page_cache=False).staging_bytes))

    def from_disk_verified() -> None:
        if subject.digests:
            figures["device digests"].append(_load_device(file, subject, link, digests=subject.digests).gb_per_s)

    def from_memory() -> None:
        if ram_file:
            for _ in range(_SHORT_REPEATS):
                timed(ram_file, "ram", page_cache=True)

    def plain_copy() -> None:
        for _ in range(_SHORT_REPEATS):
            figures["copy"].append(subject.extent.length / link.copy(ready.address, subject.extent.length) / 1e9)

    return [from_disk, from_disk_verified, from_memory, plain_copy]


def _device_rows(figures: defaultdict[str, list[float]], raw: list[float]) -> list[Row]:
    rows = [
        rate_row("nvme_to_device", figures["device"], "GB/s", raw),
        cost_row("cpu_s_per_gb.device", figures["device cpu"], "s/GB"),
        cost_row("staging_bytes", figures["staging"], "B", float(STAGING_BYTES)),
    ]
    if figures["ram"]:
        rows.append(rate_row("ram_file_to_device", figures["ram"], "GB/s", figures["copy"]))
        rows.append(cost_row("cpu_s_per_gb.ram_file", figures["ram cpu"], "s/GB"))
    if figures["device digests"]:
        rows.append(rate_row("nvme_to_device.verified", figures["device digests"], "GB/s", raw))
    return rows


class Ready:
    """Memory with huge pages, if available, populated and registered with the device before the measurements."""

    def __init__(self, size_bytes: int, device: Device | None = None) -> None:
        self._gpu = device.gpu if device else None
        self.size_bytes = -(-size_bytes // ALIGNMENT) * ALIGNMENT
        # Shared memory, the module's default, would not get huge pages on most machines.
        self._mapping = mmap.mmap(-1, self.size_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._mapping.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self.address = -(-start // _HUGE_PAGE) * _HUGE_PAGE

    def __enter__(self) -> Ready:
        ctypes.memset(self.address, 1, self.size_bytes)
        if self._gpu:
            cuda.register(self._gpu.ordinal, self.address, self.size_bytes)
        return self

    def __exit__(self, *_: object) -> None:
        if self._gpu:
            cuda.unregister(self._gpu.ordinal, self.address)
        self._mapping.close()


@contextmanager
def in_memory(subject: Subject) -> Iterator[OpenFile | None]:
    """Provides a copy of the file in a memory file system; None if there is no space for it."""
    free_bytes = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    if free_bytes < 2 * subject.extent.end:
        yield None
        return
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as copy:
        with subject.path.open("rb") as source:
            shutil.copyfileobj(source, copy, 16 * MiB)
        copy.flush()
        with subject.path.open("rb") as source:  # reads without O_DIRECT shall not come from the cache
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield OpenFile(copy.fileno(), copy.name)


def _load_device(
    file: OpenFile, subject: Subject, link: Link, *, digests: Digests | None = None, page_cache: bool = False
) -> TransferResult:
    with load_device(
        file,
        subject.extent,
        target=link.arena.address,
        staging=link.staging,
        options=Options(page_cache=page_cache),
        digests=digests,
    ) as transfer:
        return transfer.wait()


@contextmanager
def _opened(path: Path) -> Iterator[OpenFile]:
    with path.open("rb") as file:
        yield OpenFile(file.fileno(), str(path))


def subject_of(path: Path) -> Subject:
    if path.is_dir():
        if not (path / MANIFEST).exists():
            hint = "make one with flash convert, or find one in the store with flash show"
            raise InvalidArgument(f"{path} is not the folder of a checkpoint", hint=hint)
        checkpoint = Checkpoint.open(path)
        subject = Subject(path / WEIGHTS, checkpoint.extent, checkpoint.digests())
    else:
        with path.open("rb") as file:
            found = header.read(file.fileno(), str(path))
        subject = Subject(path, Extent(found.data_offset, found.data_bytes), None)
    if subject.extent.offset % ALIGNMENT:
        raise InvalidArgument(f"the data of {path} is not aligned", hint="make a checkpoint of it with flash convert")
    if subject.extent.length < 64 * MiB:
        raise InvalidArgument(f"{path} is too small to measure a disk with", hint="use a model of a GB or more")
    return subject


def _sweep(subject: Subject, ready: Ready) -> list[tuple[int, int]]:
    """Finds the two best combinations of block size and depth for raw reads, on a part of the file."""
    part = Subject(subject.path, Extent(subject.extent.offset, min(subject.aligned.length, 1024 * MiB)), None)
    rates = {choice: median(_raw(part, ready, choice) for _ in range(3)) for choice in SWEEP}
    return sorted(SWEEP, key=lambda choice: rates[choice])[-2:]


def _raw(subject: Subject, ready: Ready, choice: tuple[int, int]) -> float:
    block_bytes, depth = choice
    extent = subject.aligned
    seconds = raw_read(
        str(subject.path),
        offset=extent.offset,
        address=ready.address,
        size_bytes=extent.length,
        block_bytes=block_bytes,
        depth=depth,
    )
    return extent.length / seconds / 1e9


def _load(
    file: OpenFile,
    subject: Subject,
    address: int,
    size_bytes: int,
    *,
    digests: Digests | None = None,
    populate: bool = False,
) -> TransferResult:
    read = Read(0, subject.extent.offset, 0, subject.extent.length)
    with load(
        [file],
        [read],
        address=address,
        size_bytes=size_bytes,
        options=Options(page_cache=False),
        digests=digests,
        populate=populate,
    ) as transfer:
        return transfer.wait()


def peak_of_one_load(path: Path) -> int:
    """Returns the peak memory of this process after a load into an arena, as in the daemon."""
    subject = subject_of(path)
    with _opened(subject.path) as file, HostArena(subject.extent.length, "bench", probe_huge_pages()) as arena:
        _load(file, subject, arena.address, arena.mapped_bytes, digests=subject.digests, populate=True)
        status = Path("/proc/self/status").read_text(encoding="ascii")
        # It does not include pages of hugetlbfs (proc_pid_status(5)).
        apart_bytes = arena.mapped_bytes if arena.huge_pages is HugePages.HUGETLB else 0
    high_water = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(high_water.split()[1]) * 1024 + apart_bytes


def _peak_bytes(path: Path) -> int:
    code = "import sys; from pathlib import Path; from flashd.bench import stream; "
    code += "print(stream.peak_of_one_load(Path(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout)


_PEER = """
import os, sys, time
import torch  # importing it is not what is measured
from safetensors import safe_open
path = sys.argv[1]
fd = os.open(path, os.O_RDONLY)
os.fsync(fd)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
started = time.perf_counter()
with safe_open(path, framework="pt") as file:
    for name in file.keys():
        file.get_tensor(name).clone()
print(time.perf_counter() - started)
"""


def _peer(subject: Subject) -> Callable[[], float] | None:
    """Returns a measurement of the safetensors library with an empty page cache, in a separate process; None without
    it.
    """

    def measure() -> float:
        done = subprocess.run(
            [sys.executable, "-c", _PEER, str(subject.path)], capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    try:
        measure()
    except (subprocess.CalledProcessError, OSError):
        return None
    return measure
