# SPDX-License-Identifier: Apache-2.0
"""`flash doctor`: what does this machine give, what does it lack, and what can be done about it?"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import typer

import flashd
from flashd import config, cuda, streamer
from flashd.cli import installation, output
from flashd.cli.findings import Finding, Verdict
from flashd.cli.session import Json, session
from flashd.errors import FlashdError
from flashd.memory.arena import HugePages, probe_huge_pages
from flashd.memory.device import memory_fields, total_memory_bytes
from flashd.streamer import Backend, OpenFile, Options
from flashd.units import GiB, MiB, format_bytes

_PROBE_BYTES, _SMALL_PROBE_BYTES = 256 * MiB, 8 * MiB
_EXPECTED_GB_PER_S = 1.0
_NVIDIA = "0x10de"
_PROC = Path("/proc")
_DISPLAYS = ("0x0300", "0x0302")  # PCI classes: VGA, 3D
# Of memory that a GPU shares, what files take is lost to it: its driver does not ask the kernel for that back.
_MOST_CACHED = 0.25


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Machine")(doctor)


def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Looks at everything flashd depends on. Exit status 1 if something will not work."""
    findings = list(examine(session(context).bus))
    if as_json:
        output.print_json(findings)
    else:
        colours = {Verdict.GOOD: "green", Verdict.SLOW: "yellow", Verdict.BAD: "red"}
        to = output.console()
        for finding in findings:
            to.print(f"[{colours[finding.verdict]}]{finding.verdict:>4}[/] {finding.subject}: {finding.found}")
            if finding.remedy:
                to.print(f"       {finding.remedy}")
    if any(finding.verdict is Verdict.BAD for finding in findings):
        raise typer.Exit(1)


def examine(bus: str | None) -> Iterator[Finding]:
    daemon, store, toml = _daemon(bus)
    yield daemon
    yield from installation.examine(toml)
    yield _kernel()
    yield from _disk(store)
    yield _huge_pages()
    yield _memory_lock()
    yield _memory()
    yield from _gpus()
    yield _programs()


def _daemon(bus: str | None) -> tuple[Finding, Path, str]:
    """And where its store is, and its configuration."""
    default = config.default_paths(config.Scope.USER).state
    try:
        with flashd.connect(bus) as client:
            status = client.status()
            found = f"version {status.version}, {len(client.models())} models"
            return Finding("daemon", Verdict.GOOD, found), Path(status.store_path), client.config()
    except FlashdError as error:
        return Finding("daemon", Verdict.BAD, error.message, error.hint), default, ""


def _kernel() -> Finding:
    release = platform.release()
    with suppress(ValueError):
        major, minor = (int(part) for part in release.split(".")[:2])
        if (major, minor) < (5, 14):
            remedy = "Linux 5.14 or newer populates memory ahead of reads (MADV_POPULATE_WRITE)"
            return Finding("kernel", Verdict.SLOW, release, remedy)
    return Finding("kernel", Verdict.GOOD, release)


def _disk(store: Path) -> Iterator[Finding]:
    """Writes and reads where the store is, exactly as conversions and loads do."""
    folder = store
    while not folder.exists():
        folder = folder.parent
    yield _room(folder)
    if not os.access(folder, os.W_OK):
        # The machine's daemon keeps its store to itself.
        yield Finding("disk", Verdict.SLOW, f"you may not write to {folder}", "sudo flash doctor tries the disk")
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
        remedy = "put the store on ext4, xfs or btrfs: reads then pass the page cache by"
        yield Finding("O_DIRECT", Verdict.SLOW, f"refused in {folder}", remedy)
    if result.backend is Backend.IO_URING:
        yield Finding("io_uring", Verdict.GOOD, "works")
    else:
        remedy = "sysctl kernel.io_uring_disabled=0, or a container that allows it; threads are used meanwhile"
        yield Finding("io_uring", Verdict.SLOW, result.fallback, remedy)
    yield _speed(result, is_rotating=_is_rotating(folder))


def _room(folder: Path) -> Finding:
    free_bytes = shutil.disk_usage(folder).free
    found = f"{format_bytes(free_bytes)} free in {folder}"
    if free_bytes < 10 * GiB:
        return Finding("store", Verdict.SLOW, found, "remove models (flash rm), or set store.path to a larger disk")
    return Finding("store", Verdict.GOOD, found)


def _speed(result: streamer.TransferResult, *, is_rotating: bool) -> Finding:
    """Against what an NVMe disk of the slower kind reads; a model of 16 GB then takes 16 s from cold."""
    found = f"reads {result.gb_per_s:.2f} GB/s"
    if result.gb_per_s >= _EXPECTED_GB_PER_S:
        return Finding("disk speed", Verdict.GOOD, found)
    why = (
        "it turns, or says so: set store.path to another"
        if is_rotating
        else "is it busy, encrypted, remote, or too hot?"
    )
    return Finding("disk speed", Verdict.SLOW, found, f"NVMe disks read {_EXPECTED_GB_PER_S} GB/s and more; {why}")


def _is_rotating(folder: Path) -> bool:
    """By what the kernel says of the disk below (sysfs-block, queue/rotational); of a partition, its parent knows."""
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
        options = Options(page_cache=False)  # it was written just now
        with streamer.load([file], [read], address=address, size_bytes=size_bytes, options=options) as transfer:
            return transfer.wait()


def _huge_pages() -> Finding:
    mode = probe_huge_pages()
    if mode is HugePages.NONE:
        remedy = (
            "as root: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled: loads then read larger requests"
        )
        return Finding("huge pages", Verdict.SLOW, "arenas get none", remedy)
    return Finding("huge pages", Verdict.GOOD, f"arenas get them ({mode})")


def _memory_lock() -> Finding:
    """Of the machine's daemon where one runs and lets us look: units do not always get what they ask for. Else ours."""
    pid = installation.unit_properties().get("MainPID", "0")
    is_ours = not (_PROC / pid / "limits").exists()
    limits = (_PROC / ("self" if is_ours else pid) / "limits").read_text()
    soft = limits.partition("Max locked memory")[2].split()[0]  # proc(5)
    if soft == "unlimited" or (is_ours and os.geteuid() == 0):
        return Finding("locked memory", Verdict.GOOD, "not limited")
    found = f"limited to {format_bytes(int(soft))}"
    return Finding(
        "locked memory", Verdict.SLOW, found, "raise LimitMEMLOCK: buffers can then be registered with io_uring"
    )


def _memory() -> Finding:
    total_bytes = total_memory_bytes()
    found = format_bytes(total_bytes)
    if total_bytes < 8 * GiB:
        return Finding("memory", Verdict.SLOW, found, "small models only; set memory.host_budget to what can be spared")
    return Finding("memory", Verdict.GOOD, found)


def _gpus() -> Iterator[Finding]:
    if (reason := cuda.why_none()) and _has_nvidia():
        remedy = "install NVIDIA's driver, and see that /dev/nvidia* is there: nvidia-smi"
        yield Finding("GPU", Verdict.BAD, f"there is one, and it cannot be used: {reason}", remedy)
    elif reason:
        yield Finding("GPU", Verdict.SLOW, f"none: {reason}", "models run on the processor, from the host tier")
    for gpu in cuda.gpus():
        what = f"{gpu.name}, {gpu.model}, {format_bytes(gpu.total_bytes)}"
        if not (gpu.maps_memory and gpu.exports_memory):
            remedy = "its memory cannot be handed to other processes: another kind of virtual machine may allow it"
            yield Finding("GPU", Verdict.SLOW, what, remedy)
        elif not (gpu.registers_memory or gpu.is_unified):
            remedy = "host memory cannot be registered with it: copies from the host tier take a detour"
            yield Finding("GPU", Verdict.SLOW, what, remedy)
        else:
            yield Finding("GPU", Verdict.GOOD, what + (", one memory with the host" if gpu.is_unified else ""))
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
    found = f"{format_bytes(cached_bytes)} of {format_bytes(total_bytes)} hold files"
    if cached_bytes > _MOST_CACHED * total_bytes:
        remedy = "the GPU does not get them back: give models to flashd, not to programs that map their files"
        return Finding("page cache", Verdict.SLOW, found, remedy)
    return Finding("page cache", Verdict.GOOD, found)


def _programs() -> Finding:
    if shutil.which("dbus-daemon") is None:
        return Finding(
            "dbus-daemon",
            Verdict.SLOW,
            "not installed",
            "needed where there is no session bus: apt install dbus-daemon",
        )
    return Finding("dbus-daemon", Verdict.GOOD, "installed")
