# SPDX-License-Identifier: Apache-2.0
"""`flash doctor`: checks of everything on this machine that flashd depends on, with remedies."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from flashd.cli import installation, output
from flashd.cli.installation import Finding, Verdict
from flashd.cli.parameters import Context
from flashd.cli.session import Json, session
from flashd.client.client import connect
from flashd.client.results import Status, WatchedFolder, strays_of
from flashd.config.paths import Scope, default_paths
from flashd.errors import FlashdError
from flashd.io import cuda, streamer
from flashd.io.streamer import Backend, OpenFile, Options
from flashd.memory.arena import HugePages, probe_huge_pages
from flashd.memory.device import memory_fields, total_memory_bytes
from flashd.units import GiB, MiB, format_bytes

_PROBE_BYTES, _SMALL_PROBE_BYTES = 256 * MiB, 8 * MiB
_EXPECTED_GB_PER_S = 1.0
_NVIDIA = "0x10de"
_PROC = Path("/proc")
_DISPLAYS = ("0x0300", "0x0302")  # PCI classes: VGA, 3D
# The page cache takes memory from a GPU that shares the host's: its driver does not ask the kernel to reclaim it.
_MOST_CACHED = 0.25


def doctor(context: Context, as_json: Json = False) -> None:
    """Checks everything that flashd depends on. The exit status is 1 if something will not work."""
    findings = list(examine(session(context).bus))
    if as_json:
        output.print_json(findings)
    else:
        colours = {Verdict.GOOD: "green", Verdict.SLOW: "yellow", Verdict.BAD: "red"}
        for finding in findings:
            said, colour = f"{finding.subject}: {finding.found}", colours[finding.verdict]
            output.print_labelled(said, label=f"{finding.verdict:>4}", style=colour)
            if finding.remedy:
                output.print_labelled(f"       {finding.remedy}")
    if any(finding.verdict is Verdict.BAD for finding in findings):
        sys.exit(1)


def examine(bus: str | None) -> Iterator[Finding]:
    daemon, store, toml, status = _daemon(bus)
    yield daemon
    if status is not None:
        yield from (Finding("state", Verdict.BAD, problem.what, problem.remedy) for problem in status.problems)
        # A folder that does not exist is a problem of the state already.
        named = [problem.what for problem in status.problems]
        watched = [
            each for each in status.inbox_watched if not any(what.startswith(f"{each.folder}:") for what in named)
        ]
        yield from map(_inbox, watched)
        if strays := strays_of(status):
            yield Finding("inbox", Verdict.GOOD, f"ignored, because they are no models: {strays}")
        if status.default_engine:  # else the daemon is older
            yield _default_engine(status)
        yield from _llama(bus, toml)
    yield from installation.examine(toml)
    yield _kernel()
    yield from _disk(store)
    yield _huge_pages()
    yield _memory_lock()
    yield _memory()
    yield from _gpus()
    yield _programs()


def _default_engine(status: Status) -> Finding:
    why, _, remedy = status.default_engine_reason.partition(": ")
    verdict = Verdict.SLOW if remedy else Verdict.GOOD
    return Finding("default engine", verdict, f"{status.default_engine}: {why}", remedy)


def _llama(bus: str | None, toml: str) -> Iterator[Finding]:
    """Checks that there is a llama-server if there are models that need it."""
    count, is_installed = _gguf(bus)
    if not count:
        return
    server = tomllib.loads(toml).get("engines", {}).get("llama", {}).get("server", "")
    found = f"{count} GGUF models"
    if server and not os.access(server, os.X_OK):
        remedy = 'select another one: flash config engines.llama.server PATH, or ""'
        yield Finding("llama.cpp", Verdict.BAD, f"{found}, but {server} cannot be run", remedy)
    elif server or is_installed or shutil.which("llama-server"):
        yield Finding("llama.cpp", Verdict.GOOD, f"{found}, with {server or 'llama-server'}")
    else:
        remedy = "flash engine install llama.cpp, or set engines.llama.server to the path of llama-server"
        yield Finding("llama.cpp", Verdict.BAD, f"{found}, but no llama-server", remedy)


def _gguf(bus: str | None) -> tuple[int, bool]:
    """Returns the number of GGUF models, and whether flashd has installed the program for them."""
    try:
        with connect(bus) as client:
            made = [made for made in client.environments() if made.current and made.fits]
            count = sum(model.format == "gguf" for model in client.models())
            return count, any(environment.kind == "llama.cpp" for environment in made)
    except FlashdError:
        return 0, False  # it has ended since it answered first


def _daemon(bus: str | None) -> tuple[Finding, Path, str, Status | None]:
    """Asks the daemon. Returns a finding, the folder of its store, its configuration and its status."""
    default = default_paths(Scope.USER).state
    try:
        with connect(bus) as client:
            status = client.status()
            found = f"version {status.version}, {len(client.models())} models"
            return Finding("daemon", Verdict.GOOD, found), Path(status.store_path), client.config(), status
    except FlashdError as error:
        return Finding("daemon", Verdict.BAD, error.message, error.hint), default, "", None


def _inbox(watched: WatchedFolder) -> Finding:
    ago = f"{max(0, time.time() - watched.looked_at):.0f} s ago" if watched.looked_at else "none yet"
    if not watched.why_not:
        return Finding("inbox", Verdict.GOOD, f"{watched.folder} is watched by {watched.how}; last scan: {ago}")
    why, _, remedy = watched.why_not.partition(": ")
    found = f"{watched.folder} is only scanned {watched.how}; last scan: {ago}. {why}"
    return Finding("inbox", Verdict.SLOW, found, remedy or "repair the folder, or set inbox.folders to another")


def _kernel() -> Finding:
    release = platform.release()
    with suppress(ValueError):
        major, minor = (int(part) for part in release.split(".")[:2])
        if (major, minor) < (5, 14):
            remedy = "upgrade to Linux 5.14 or newer, which can populate memory ahead of reads (MADV_POPULATE_WRITE)"
            return Finding("kernel", Verdict.SLOW, release, remedy)
    return Finding("kernel", Verdict.GOOD, release)


def _disk(store: Path) -> Iterator[Finding]:
    """Writes and reads a file in the folder of the store, in the same way as conversions and loads."""
    folder = store
    while not folder.exists():
        folder = folder.parent
    yield _room(folder)
    if not os.access(folder, os.W_OK):
        # Only the machine's daemon may write to its store.
        yield Finding("disk", Verdict.SLOW, f"you may not write to {folder}", "sudo flash doctor can test the disk")
        return
    free_bytes = shutil.disk_usage(folder).free
    probe_bytes = _PROBE_BYTES if free_bytes > 4 * _PROBE_BYTES else _SMALL_PROBE_BYTES
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            block = os.urandom(MiB)
            for _ in range(probe_bytes // MiB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            result = _read_back(OpenFile(file.fileno(), str(folder)), probe_bytes)
    except (OSError, FlashdError) as error:
        yield Finding("store", Verdict.BAD, f"{folder}: {error}", "make the folder writable, or set store.path")
        return
    if result.direct:
        yield Finding("O_DIRECT", Verdict.GOOD, f"works in {folder}")
    else:
        remedy = "put the store on ext4, xfs or btrfs, where reads can bypass the page cache"
        yield Finding("O_DIRECT", Verdict.SLOW, f"not supported in {folder}", remedy)
    if result.backend is Backend.IO_URING:
        yield Finding("io_uring", Verdict.GOOD, "works")
    else:
        remedy = (
            "set sysctl kernel.io_uring_disabled=0, or allow it in the container; until then flashd reads with threads"
        )
        yield Finding("io_uring", Verdict.SLOW, result.fallback, remedy)
    yield _speed(result, is_rotating=_is_rotating(folder))


def _room(folder: Path) -> Finding:
    free_bytes = shutil.disk_usage(folder).free
    found = f"{format_bytes(free_bytes)} free in {folder}"
    if free_bytes < 10 * GiB:
        return Finding("store", Verdict.SLOW, found, "remove models (flash rm), or set store.path to a larger disk")
    return Finding("store", Verdict.GOOD, found)


def _speed(result: streamer.TransferResult, *, is_rotating: bool) -> Finding:
    """Compares the disk with a slow NVMe disk, which needs 16 s for a cold model of 16 GB."""
    found = f"reads {result.gb_per_s:.2f} GB/s"
    if result.gb_per_s >= _EXPECTED_GB_PER_S:
        return Finding("disk speed", Verdict.GOOD, found)
    why = (
        "the kernel reports a rotating disk; set store.path to another disk"
        if is_rotating
        else "check whether it is busy, encrypted, remote or too hot"
    )
    return Finding("disk speed", Verdict.SLOW, found, f"NVMe disks read {_EXPECTED_GB_PER_S} GB/s and more; {why}")


def _is_rotating(folder: Path) -> bool:
    """Asks the kernel about the folder's disk (sysfs-block, queue/rotational), or the parent of its partition."""
    device = folder.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for place in (block, block.parent):
        with suppress(OSError):
            return (place / "queue" / "rotational").read_text().strip() == "1"
    return False


def _read_back(file: OpenFile, size_bytes: int) -> streamer.TransferResult:
    with mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_POPULATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        read = streamer.Read(0, 0, 0, size_bytes)
        options = Options(page_cache=False)  # a file just written is still in it
        with streamer.load([file], [read], address=address, size_bytes=size_bytes, options=options) as transfer:
            return transfer.wait()


def _huge_pages() -> Finding:
    mode = probe_huge_pages()
    if mode is HugePages.NONE:
        remedy = (
            "as root: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled; loads then issue larger reads"
        )
        return Finding("huge pages", Verdict.SLOW, "not available for arenas", remedy)
    return Finding("huge pages", Verdict.GOOD, f"used for arenas ({mode})")


def _memory_lock() -> Finding:
    """Checks the limit of the machine's daemon if it is readable, else ours.

    The unit file does not tell, because a service may get a lower limit than its unit asks for.
    """
    pid = installation.unit_properties().get("MainPID", "0")
    is_ours = not (_PROC / pid / "limits").exists()
    limits = (_PROC / ("self" if is_ours else pid) / "limits").read_text()
    soft = limits.partition("Max locked memory")[2].split()[0]  # proc(5)
    if soft == "unlimited" or (is_ours and os.geteuid() == 0):
        return Finding("locked memory", Verdict.GOOD, "not limited")
    found = f"limited to {format_bytes(int(soft))}"
    return Finding(
        "locked memory", Verdict.SLOW, found, "raise LimitMEMLOCK, so that buffers can be registered with io_uring"
    )


def _memory() -> Finding:
    total_bytes = total_memory_bytes()
    found = format_bytes(total_bytes)
    if total_bytes < 8 * GiB:
        return Finding(
            "memory",
            Verdict.SLOW,
            found,
            "only small models fit; set memory.host_budget to the memory that flashd may use",
        )
    return Finding("memory", Verdict.GOOD, found)


def _gpus() -> Iterator[Finding]:
    if (reason := cuda.why_none()) and _has_nvidia():
        remedy = "install NVIDIA's driver, and check with nvidia-smi that /dev/nvidia* exists"
        yield Finding("GPU", Verdict.BAD, f"present, but unusable: {reason}", remedy)
    elif reason:
        yield Finding("GPU", Verdict.SLOW, f"none: {reason}", "models run on the CPU, from the host tier")
    for gpu in cuda.gpus():
        what = f"{gpu.name}, {gpu.model}, {format_bytes(gpu.total_bytes)}"
        if not (gpu.maps_memory and gpu.exports_memory):
            remedy = "its memory cannot be shared with other processes; another kind of virtual machine may allow that"
            yield Finding("GPU", Verdict.SLOW, what, remedy)
        elif not (gpu.registers_memory or gpu.is_unified):
            remedy = (
                "host memory cannot be registered with it, so copies from the host tier go through a staging buffer"
            )
            yield Finding("GPU", Verdict.SLOW, what, remedy)
        else:
            yield Finding("GPU", Verdict.GOOD, what + (", sharing the host's memory" if gpu.is_unified else ""))
        if gpu.is_unified:
            yield _page_cache(memory_fields())


def _has_nvidia(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    with suppress(OSError):
        for device in devices.iterdir():
            with suppress(OSError):
                is_display = (device / "class").read_text().startswith(_DISPLAYS)
                if is_display and (device / "vendor").read_text().strip() == _NVIDIA:
                    return True
    return False


def _page_cache(fields: Mapping[str, int]) -> Finding:
    cached_bytes, total_bytes = fields["Cached"] - fields.get("Shmem", 0), fields["MemTotal"]
    found = f"files take {format_bytes(cached_bytes)} of {format_bytes(total_bytes)}"
    if cached_bytes > _MOST_CACHED * total_bytes:
        remedy = "the GPU cannot reclaim this memory; load models with flashd, not with programs that map their files"
        return Finding("page cache", Verdict.SLOW, found, remedy)
    return Finding("page cache", Verdict.GOOD, found)


def _programs() -> Finding:
    if shutil.which("dbus-daemon") is None:
        return Finding(
            "dbus-daemon",
            Verdict.SLOW,
            "not installed",
            "needed on machines without a session bus: apt install dbus-daemon",
        )
    return Finding("dbus-daemon", Verdict.GOOD, "installed")
