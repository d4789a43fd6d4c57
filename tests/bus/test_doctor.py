# SPDX-License-Identifier: Apache-2.0
"""`flash doctor` finds what is wrong with a machine: each test breaks one thing."""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import errno
import grp
import os
import platform
import shutil
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf_files
import pytest
from running import Daemon

import flashd
from flashd.cli import doctor, installation
from flashd.cli.installation import Finding, Verdict
from flashd.client.client import Client
from flashd.client.results import Problem, Status, WatchedFolder
from flashd.config.settings import Config, EnginesConfig, VllmConfig
from flashd.daemon.serving.default_engine import default_engine, why_no_vllm
from flashd.dbus.private_bus import PrivateBus
from flashd.io import cuda
from flashd.memory.arena import probe_huge_pages
from flashd.units import GiB, MiB

pytestmark = pytest.mark.usefixtures("own_python")
GPU = cuda.Gpu(
    ordinal=0, model="GB10", uuid="GPU-1", total_bytes=128 * GiB, is_integrated=True, reads_host_pages=True,
    maps_memory=True, exports_memory=True, registers_memory=True,
)  # fmt: skip
APART = {"is_integrated": False, "reads_host_pages": False}
FIELDS = {"MemTotal": 128 * GiB, "Cached": 9 * GiB, "Shmem": 8 * GiB}
UNIT = {"LoadState": "loaded", "ActiveState": "active", "SubState": "running", "NRestarts": "0", "MainPID": "42"}


@dataclasses.dataclass
class Machine:
    """One that has all that flashd wants, until a test breaks it."""

    folder: Path
    bus: str
    monkeypatch: pytest.MonkeyPatch
    in_thread: Callable[[], None] = lambda: None
    settings: Config = dataclasses.field(default_factory=Config)  # of a daemon with a GPU

    def replace(self, where: object, name: str, value: Any) -> None:
        self.monkeypatch.setattr(where, name, value)

    def program(self, name: str, *lines: str) -> None:
        """One that says these lines."""
        made = self.folder / "bin" / name
        made.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
        made.chmod(0o755)

    def unit(self, **changed: str) -> None:
        self.program("systemctl", *(f"{name}={value}" for name, value in {**UNIT, **changed}.items()))

    def limit(self, locked: str) -> None:
        (self.folder / "42").mkdir(exist_ok=True)
        (self.folder / "42" / "limits").write_text(f"Max locked memory         {locked}       {locked}      bytes\n")

    def gpu(self, **changed: Any) -> None:
        self.replace(cuda, "gpus", lambda: [dataclasses.replace(GPU, **changed)])

    def huge_pages(self, mode: str) -> None:
        reserved, shmem = self.folder / "hugepages", self.folder / "shmem_enabled"
        reserved.mkdir(exist_ok=True)
        (reserved / "free_hugepages").write_text("0\n")
        shmem.write_text(" ".join(f"[{m}]" if m == mode else m for m in ("always", "advise", "never")))
        self.replace(doctor, "probe_huge_pages", partial(probe_huge_pages, reserved, shmem))

    def examine(self) -> list[Finding]:
        """In a thread of its own, which the kernel may deny something."""
        found: list[Finding] = []

        def run() -> None:
            self.in_thread()
            found.extend(doctor.examine(self.bus))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert found, "it did not come to an end"
        return found


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a bus with a daemon, which nothing here changes."""
    with tempfile.TemporaryDirectory(prefix="fd-") as name, PrivateBus(Path(name)) as bus:
        daemon = Daemon(bus.address, Path(name), Path(name))
        daemon.start()
        yield bus.address
        assert daemon.stop() == 0


@pytest.fixture
def machine(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path, address, monkeypatch)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    made.unit()
    made.program("pkaction", *installation.ACTIONS)
    made.program("dbus-daemon")
    made.replace(platform, "release", lambda: "6.8.0-1014-nvidia")
    made.replace(grp, "getgrnam", lambda name: grp.struct_group((name, "x", os.getgid(), [])))
    made.replace(doctor, "total_memory_bytes", lambda: 128 * GiB)
    made.replace(doctor, "memory_fields", lambda: FIELDS)
    made.replace(doctor, "_PROC", tmp_path)
    made.limit("unlimited")
    made.huge_pages("advise")
    made.replace(cuda, "why_none", lambda: "")
    made.gpu()
    # This disk's speed and free space are not tested.
    made.replace(doctor, "_EXPECTED_GB_PER_S", 0.01)
    made.replace(doctor, "_PROBE_BYTES", 8 * MiB)
    made.replace(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(900 * GiB, 0, 900 * GiB))  # type: ignore[attr-defined]
    return made


def refused_by_seccomp(number: int, error: int, argument: int = 0, bits: int = 0) -> None:
    """The kernel denies this thread, and those that it starts, a system call (seccomp(2)); with `bits`, only where
    `argument` has one of them."""
    load, jump_if_equal, jump_if_set, give = 0x20, 0x15, 0x45, 0x06
    allow, refuse = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x00050000 | error)
    test = [(load, 0, 0, 16 + 8 * argument), (jump_if_set, 0, 1, bits)] if bits else []
    program = [(load, 0, 0, 0), (jump_if_equal, 0, len(test) + 1, number), *test, refuse, allow]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
    assert libc.prctl(22, 2, ctypes.byref(Program(len(program), code))) == 0, "PR_SET_SECCOMP"


def nobody(machine: Machine, members: list[str]) -> None:
    """Who asks is not root, and not of the group's."""
    asker = SimpleNamespace(getuid=lambda: 65534, getgid=os.getgid, getgroups=os.getgroups)
    machine.replace(installation, "os", asker)
    machine.replace(grp, "getgrnam", lambda name: grp.struct_group((name, "x", 4_000_000, members)))


def no_group(machine: Machine) -> None:
    def unknown(name: str) -> None:
        raise KeyError(name)

    machine.replace(grp, "getgrnam", unknown)


def io_uring_forbidden(machine: Machine) -> None:
    machine.in_thread = lambda: refused_by_seccomp(425, errno.EPERM)  # io_uring_setup, on every architecture


def o_direct_refused(machine: Machine) -> None:
    openat = {"x86_64": 257, "aarch64": 56}[os.uname().machine]
    machine.in_thread = lambda: refused_by_seccomp(openat, errno.EINVAL, argument=2, bits=os.O_DIRECT)


def slow_disk(machine: Machine) -> None:
    quick = doctor._read_back

    def slow(*arguments: Any) -> Any:
        result = quick(*arguments)
        return dataclasses.replace(result, seconds=1000 * result.seconds)

    machine.replace(doctor, "_read_back", slow)
    machine.replace(doctor, "_is_rotating", lambda folder: False)


def turning_disk(machine: Machine) -> None:
    slow_disk(machine)
    machine.replace(doctor, "_is_rotating", lambda folder: True)


def full_disk(machine: Machine) -> None:
    machine.replace(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(900 * GiB, 899 * GiB, GiB))  # type: ignore[attr-defined]


def read_only_disk(machine: Machine) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    machine.replace(tempfile, "TemporaryFile", refuse)


def anothers_store(machine: Machine) -> None:
    machine.replace(os, "access", lambda path, mode, access=os.access: mode != os.W_OK and access(path, mode))


def driver_missing(machine: Machine) -> None:
    device = machine.folder / "devices" / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "class").write_text("0x030200\n")
    (device / "vendor").write_text("0x10de\n")
    machine.replace(doctor, "_has_nvidia", partial(doctor._has_nvidia, device.parent))
    machine.replace(cuda, "why_none", lambda: "there is no NVIDIA driver (libcuda.so.1)")
    machine.replace(cuda, "gpus", list)


def no_gpu(machine: Machine) -> None:
    driver_missing(machine)
    shutil.rmtree(machine.folder / "devices")


def damaged_state(machine: Machine) -> None:
    real = Client.status
    problems = (Problem("x.damaged was damaged and is not used", "repair the file, or remove it"),)
    machine.replace(Client, "status", lambda client: dataclasses.replace(real(client), problems=problems))


def without_inotify(machine: Machine) -> None:
    real = Client.status
    why = "other programs use all inotify watches: raise fs.inotify.max_user_watches (sysctl)"
    watched = (WatchedFolder("/models", "every 30 s", why, 0.0),)
    machine.replace(Client, "status", lambda client: dataclasses.replace(real(client), inbox_watched=watched))


def page_cache_full(machine: Machine) -> None:
    machine.replace(doctor, "memory_fields", lambda: {**FIELDS, "Cached": 60 * GiB})


def engine_lacks(machine: Machine) -> None:
    machine.program("python", "transformers uvicorn")
    machine.replace(sys, "executable", str(machine.folder / "bin" / "python"))


def without_vllm(machine: Machine) -> None:
    """On a machine with a GPU, of which the daemon of these tests knows nothing."""
    ask = doctor._daemon

    def told(bus: str | None) -> Any:
        *found, status = ask(bus)
        assert isinstance(status, Status)
        why = default_engine("auto", has_gpu=True, without_vllm=why_no_vllm(machine.settings, "")).why
        return *found, dataclasses.replace(status, default_engine_reason=why)

    machine.replace(doctor, "_daemon", told)


def wrong_vllm(machine: Machine) -> None:
    python = machine.folder / "bin" / "pyhton"
    machine.settings = Config(engines=EnginesConfig(vllm=VllmConfig(python=str(python))))
    without_vllm(machine)


def wrong_llama(machine: Machine) -> None:
    *found, _, status = doctor._daemon(machine.bus)
    machine.replace(doctor, "_daemon", lambda bus: (*found, "engines.llama.server = '/nowhere/llama'", status))
    machine.replace(doctor, "_gguf", lambda bus: (1, True))


def remove(name: str) -> Callable[[Machine], None]:
    return lambda machine: (machine.folder / "bin" / name).unlink()


# The broken part, the subject and verdict of the finding, and a word of its hint.
BROKEN: list[tuple[Callable[[Machine], Any], str, Verdict, str]] = [
    (lambda m: setattr(m, "bus", "unix:path=/nowhere"), "daemon", Verdict.BAD, ""),
    (lambda m: m.unit(ActiveState="failed", Result="watchdog"), "service", Verdict.BAD, "journalctl"),
    (lambda m: m.unit(NRestarts="3"), "service", Verdict.SLOW, "journalctl"),
    (remove("pkaction"), "polkit", Verdict.BAD, "apt install polkitd"),
    (lambda m: m.program("pkaction", "org.flashd1.use"), "polkit", Verdict.BAD, "--reinstall"),
    (no_group, "group", Verdict.BAD, "sysusers"),
    (partial(nobody, members=[]), "group", Verdict.SLOW, "adduser nobody flashd"),
    (partial(nobody, members=["nobody"]), "group", Verdict.SLOW, "log out"),
    (lambda m: m.replace(sys, "executable", "/nowhere/python"), "torch engine", Verdict.BAD, "engines.torch.python"),
    (engine_lacks, "torch engine", Verdict.BAD, "engines.torch.python"),
    (lambda m: m.replace(platform, "release", lambda: "5.10.0-32-amd64"), "kernel", Verdict.SLOW, "5.14"),
    (full_disk, "store", Verdict.SLOW, "flash rm"),
    (read_only_disk, "store", Verdict.BAD, "store.path"),
    (anothers_store, "disk", Verdict.SLOW, "sudo"),
    (o_direct_refused, "O_DIRECT", Verdict.SLOW, "ext4"),
    (io_uring_forbidden, "io_uring", Verdict.SLOW, "io_uring_disabled"),
    (slow_disk, "disk speed", Verdict.SLOW, "busy"),
    (turning_disk, "disk speed", Verdict.SLOW, "rotating"),
    (lambda m: m.huge_pages("never"), "huge pages", Verdict.SLOW, "shmem_enabled"),
    (lambda m: m.limit("8388608"), "locked memory", Verdict.SLOW, "LimitMEMLOCK"),
    (lambda m: m.replace(doctor, "total_memory_bytes", lambda: 4 * GiB), "memory", Verdict.SLOW, "host_budget"),
    (driver_missing, "GPU", Verdict.BAD, "nvidia-smi"),
    (no_gpu, "GPU", Verdict.SLOW, "on the CPU"),
    (lambda m: m.gpu(exports_memory=False), "GPU", Verdict.SLOW, "virtual machine"),
    (lambda m: m.gpu(registers_memory=False, **APART), "GPU", Verdict.SLOW, "copies"),
    (damaged_state, "state", Verdict.BAD, "repair the file"),
    (without_inotify, "inbox", Verdict.SLOW, "raise fs.inotify.max_user_watches"),
    (without_vllm, "default engine", Verdict.SLOW, "flash engine install vllm"),
    (wrong_vllm, "default engine", Verdict.SLOW, "an interpreter that has vLLM"),
    (lambda m: m.replace(doctor, "_gguf", lambda bus: (2, False)), "llama.cpp", Verdict.BAD, "flash engine install"),
    (wrong_llama, "llama.cpp", Verdict.BAD, "engines.llama.server"),
    (page_cache_full, "page cache", Verdict.SLOW, "map their files"),
    (remove("dbus-daemon"), "dbus-daemon", Verdict.SLOW, "apt install"),
]  # fmt: skip


def test_a_machine_that_has_everything_is_good(machine: Machine) -> None:
    assert [finding for finding in machine.examine() if finding.verdict is not Verdict.GOOD or finding.remedy] == []


@pytest.mark.parametrize(
    ("break_", "subject", "verdict", "remedy"), BROKEN, ids=[f"{n}-{b[1]}" for n, b in enumerate(BROKEN)]
)
def test_what_is_broken_is_found_with_a_remedy_and_nothing_else(
    machine: Machine, break_: Callable[[Machine], Any], subject: str, verdict: Verdict, remedy: str
) -> None:
    break_(machine)
    (found,) = (finding for finding in machine.examine() if finding.verdict is not Verdict.GOOD)
    assert (found.subject, found.verdict) == (subject, verdict)
    assert found.found
    assert found.remedy and remedy in found.remedy


def test_every_check_has_its_broken_machine() -> None:
    subjects = set()
    for module in (doctor, installation):
        assert module.__file__ is not None
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            is_finding = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding"
            if is_finding and isinstance(node.args[0], ast.Constant):
                subjects.add(node.args[0].value)
    assert subjects | {"torch engine"} == {subject for _, subject, _, _ in BROKEN}


def test_who_runs_a_daemon_of_their_own_has_their_own_limits(machine: Machine) -> None:
    """Where there is no unit, nothing is said of units, polkit and groups."""
    (machine.folder / "bin" / "systemctl").unlink()
    (machine.folder / "self").mkdir()
    (machine.folder / "self" / "limits").write_text("Max locked memory         65536    65536    bytes\n")
    machine.replace(os, "geteuid", lambda: 1000)
    found = {finding.subject: finding for finding in machine.examine()}
    assert not {"service", "polkit", "group"} & set(found)
    assert "65" in found["locked memory"].found
    assert flashd.__version__ in found["daemon"].found


def test_gguf_models_need_a_program(machine: Machine, address: str, tmp_path: Path) -> None:
    def found() -> list[Finding]:
        return [finding for finding in machine.examine() if finding.subject == "llama.cpp"]

    assert found() == []
    with flashd.connect(address) as client:
        client.import_(gguf_files.llama(1).write(tmp_path / "tiny.gguf"), "tiny")
        try:
            (missing,) = found()
            assert missing.verdict is Verdict.BAD and missing.found == "1 GGUF models, but no llama-server"
            machine.program("llama-server")
            (there,) = found()
            assert there.verdict is Verdict.GOOD and there.found == "1 GGUF models, with llama-server"
        finally:
            client.remove("tiny")
