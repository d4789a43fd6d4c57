# SPDX-License-Identifier: Apache-2.0
"""`flash doctor`: what does this machine give, what does it lack, and what can be done about it?"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import typer

import flashd
from flashd import config, cuda, streamer
from flashd.cli import output
from flashd.cli.session import Json, session
from flashd.errors import FlashdError
from flashd.memory.arena import HugePages, probe_huge_pages
from flashd.memory.device import total_memory_bytes
from flashd.streamer import Backend, OpenFile, Options
from flashd.units import GiB, MiB, format_bytes

_PROBE_BYTES = 8 * MiB


class Verdict(StrEnum):
    GOOD = "good"
    SLOW = "slow"  # works, and could be faster
    BAD = "bad"  # something will fail


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: what was found, and, unless it is good, what to do."""

    subject: str
    verdict: Verdict
    found: str
    remedy: str = ""


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
    daemon, store = _daemon(bus)
    yield daemon
    yield _kernel()
    yield from _disk(store)
    yield _huge_pages()
    yield _memory_lock()
    yield _memory()
    yield from _gpus()
    yield _torch()
    yield _programs()


def _daemon(bus: str | None) -> tuple[Finding, Path]:
    default = config.default_paths(config.Scope.USER).state
    try:
        with flashd.connect(bus) as client:
            status = client.status()
            found = f"version {status.version}, {len(client.models())} models"
            return Finding("daemon", Verdict.GOOD, found), Path(status.store_path)
    except FlashdError as error:
        return Finding("daemon", Verdict.BAD, error.message, error.hint), default


def _kernel() -> Finding:
    release = platform.release()
    with suppress(ValueError):
        major, minor = (int(part) for part in release.split(".")[:2])
        if (major, minor) < (5, 14):
            remedy = "Linux 5.14 or newer populates memory ahead of reads (MADV_POPULATE_WRITE)"
            return Finding("kernel", Verdict.SLOW, release, remedy)
    return Finding("kernel", Verdict.GOOD, release)


def _disk(store: Path) -> Iterator[Finding]:
    """Writes and reads a few MiB where the store is, exactly as conversions and loads do."""
    folder = store
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
            result = _read_back(OpenFile(file.fileno(), str(folder)))
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
    free_bytes = shutil.disk_usage(folder).free
    found = f"{format_bytes(free_bytes)} free in {folder}"
    if free_bytes < 10 * GiB:
        yield Finding("store", Verdict.SLOW, found, "remove models (flash rm), or set store.path to a larger disk")
    else:
        yield Finding("store", Verdict.GOOD, found)


def _read_back(file: OpenFile) -> streamer.TransferResult:
    with mmap.mmap(-1, _PROBE_BYTES) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        read = streamer.Read(0, 0, 0, _PROBE_BYTES)
        options = Options(page_cache=False)  # it was written just now
        with streamer.load([file], [read], address=address, size_bytes=_PROBE_BYTES, options=options) as transfer:
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
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or os.geteuid() == 0:
        return Finding("locked memory", Verdict.GOOD, "not limited")
    found = f"limited to {format_bytes(soft)}"
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
    if reason := cuda.why_none():
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


def _torch() -> Finding:
    """Found, not imported: importing takes seconds and says no more."""
    missing = [name for name in ("torch", "transformers", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        remedy = "pip install 'flashd[torch]', or set engines.torch.python to an interpreter that has them"
        return Finding("torch engine", Verdict.BAD, f"{', '.join(missing)} not installed beside flashd", remedy)
    return Finding("torch engine", Verdict.GOOD, "torch and transformers are installed")


def _programs() -> Finding:
    if shutil.which("dbus-daemon") is None:
        return Finding(
            "dbus-daemon",
            Verdict.SLOW,
            "not installed",
            "needed where there is no session bus: apt install dbus-daemon",
        )
    return Finding("dbus-daemon", Verdict.GOOD, "installed")
