# SPDX-License-Identifier: Apache-2.0
"""The package on arm64, the architecture of its main target: built, installed and tested in a Debian for arm64.

qemu-user-static runs its programs on this machine's kernel, without io_uring, so that loads use threads.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import kept
import pytest
from conftest import ROOT, built, daemon_of, rooted

BUILD = ("build-essential", "debhelper", "python3-dev", "python3-venv")
BINFMT, FORMAT = Path("/proc/sys/fs/binfmt_misc"), Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
PYTHON = "/usr/lib/flashd/bin/python3"
TESTS = "/opt/tests"  # pytest and its kind
TOOLS = ("pytest", "pytest-asyncio", "pytest-timeout", "hypothesis", "numpy", "safetensors")
# Tests of io_uring, which the emulator lacks, and of features that only a real kernel has.
LACKING = {
    "sanitize": "", "bench": "", "device": "", "fallbacks": "",
    "copy": "TestCopy::test_the_page_cache_is_left_as_it_was",
    "load": "test_fresh_memory_is_populated_by_helpers test_memory_that_the_kernel_does_not_have",
}  # fmt: skip
UNITS = ("memory", "memory_ends", "images")

pytestmark = pytest.mark.timeout(1800)


def emulate() -> None:
    """Has the kernel hand programs for arm64 to qemu, until the next boot, as binfmt-support would for good."""
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "none", BINFMT], check=True)
    if not (BINFMT / "qemu-aarch64").exists():
        (BINFMT / "register").write_text(FORMAT.read_text().strip())


def prepare() -> tuple[Path, Path]:
    """A root, and the package that was built in it."""
    emulate()
    base = rooted(*BUILD, suite="bookworm", architecture="arm64")
    wheels = fetch_wheels(base)
    return base, daemon_of(built("arm64", base, PIP_NO_INDEX="1", PIP_FIND_LINKS=f"/{wheels.relative_to(base)}"))


def fetch_wheels(root: Path) -> Path:
    """Fetches without emulation what the build of the package installs. Returns a folder in the root."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["cuda"], *extras["gateway"]]
    wanted += [*project["build-system"]["requires"], "cmake", "ninja"]  # scikit-build-core asks for the last two
    constraints = ROOT / "packaging" / "constraints.txt"
    folder = root / "opt" / f"wheels-{kept.digest(*wanted, constraints)}"
    with kept.alone(folder):
        if not folder.exists():
            made = folder.with_suffix(".partial")
            version = re.search(r"python(3\.\d+)", os.readlink(root / "usr/bin/python3"))
            assert version is not None
            pip_for_arm64(version[1], "download", f"--dest={made}", f"--constraint={constraints}", *wanted)
            made.rename(folder)
    return folder


def pip_for_arm64(version: str, command: str, *arguments: str | Path) -> None:
    """Has this machine's pip get packages for arm64 and this version of Python."""
    minors = range(36, 16, -1)  # of the C library: Debian 12 has 2.36 (https://peps.python.org/pep-0600)
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in minors] + ["--platform=manylinux2014_aarch64"]
    options = ["--quiet", "--only-binary=:all:", f"--python-version={version}", *platforms]
    subprocess.run([sys.executable, "-m", "pip", command, *options, *arguments], check=True)


@pytest.fixture(scope="module")
def root(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Debian for arm64 with the package installed, and with what the tests need."""
    if not FORMAT.exists() or shutil.which("arch-test") is None:
        pytest.skip("needs qemu-user-static, arch-test: tests/system/run installs them")
    base, package = prepare()
    layers = tmp_path_factory.mktemp("arm64")
    subprocess.run(["mount", "-t", "tmpfs", "flashd-arm64", layers], check=True)
    root = layers / "root"
    for name in ("root", "upper", "work"):
        (layers / name).mkdir()
    overlay = f"lowerdir={base},upperdir={layers}/upper,workdir={layers}/work"
    try:
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", overlay, root], check=True)
        for folder in ("/proc", "/dev"):
            subprocess.run(["mount", "--rbind", folder, root / folder[1:]], check=True)
            subprocess.run(["mount", "--make-rslave", root / folder[1:]], check=True)
        shutil.copy(package, root / "root" / "flashd.deb")
        inside(root, "dpkg", "-i", "/root/flashd.deb")
        _give_tests(root)
        yield root
    finally:
        subprocess.run(["umount", "--recursive", "--lazy", root], check=False)
        subprocess.run(["umount", layers], check=False)


def _give_tests(root: Path) -> None:
    """The tests of this checkout, and for arm64 what they need beside flashd: pip fetches it without emulation."""
    site = root / TESTS[1:] / "site"
    version = next((root / "usr/lib/flashd/lib").glob("python3*")).name.removeprefix("python")
    pip_for_arm64(version, "install", f"--target={site}", *TOOLS)
    for part in ("tests", "packaging/tour", "pyproject.toml"):
        source, target = ROOT / part, root / TESTS[1:] / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("results", "__pycache__"))
        else:
            shutil.copy(source, target)


def inside(root: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root", "PYTHONPATH": f"{TESTS}/site",
    }  # fmt: skip
    done = subprocess.run(["chroot", root, *command], env=environment, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done


def test_it_is_a_package_for_arm64(root: Path) -> None:
    assert inside(root, "dpkg-query", "-W", "-f", "${Architecture} ${Status}", "flashd").stdout == (
        "arm64 install ok installed"
    )
    assert inside(root, PYTHON, "-c", "import platform; print(platform.machine())").stdout.strip() == "aarch64"
    assert inside(root, "flash", "--version").stdout.startswith("flash ")
    # A real machine has these: features that the emulator lacks are no fault of the package.
    modules = list((root / "usr/lib/flashd").rglob("_native*.so"))
    assert [module.read_bytes()[18:20] for module in modules] == [b"\xb7\x00"], "EM_AARCH64, by elf(5)"


def test_what_loads_there_loads_by_threads_and_says_why(root: Path) -> None:
    code = (
        "import mmap, os, tempfile; from flashd.io.streamer import *; from native.contents import Memory; "
        "size = 3_000_001; raw = os.urandom(size); file = tempfile.TemporaryFile(dir='/opt'); file.write(raw); "
        "file.flush(); into = Memory(size); "
        "result = load([OpenFile(file.fileno(), 'x')], [Read(0, 0, 0, size)], address=into.address, size_bytes=size, "
        "options=Options(block_bytes=1 << 20)).wait(); assert into[:size] == raw; "
        "print(result.backend, '|', result.fallback)"
    )
    said = inside(root, "env", f"PYTHONPATH={TESTS}/site:{TESTS}/tests", PYTHON, "-c", code).stdout
    backend, _, fallback = said.partition("|")
    assert backend.strip().endswith("threads")
    assert "io_uring" in fallback


def test_the_tests_of_what_is_made_for_a_processor_pass_there(root: Path) -> None:
    """The streamer's, with threads, and those of the layers right above it. The rest is Python, which is the same."""
    options = ["-q", "-p", "no:cacheprovider", "--override-ini=timeout=600", f"--rootdir={TESTS}"]
    options += ["-k", "not io_uring and not less_than_100_ms"]  # how quick it is, an emulator does not show
    for module, tests in LACKING.items():
        path = f"tests/native/test_{module}.py"  # from the root directory, as pytest names its tests
        options += [f"--deselect={path}::{test}" for test in tests.split()] or [f"--ignore={TESTS}/{path}"]
    units = [f"{TESTS}/tests/unit/test_{module}.py" for module in UNITS]
    done = inside(root, PYTHON, "-P", "-m", "pytest", *options, f"{TESTS}/tests/native", *units, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
    assert os.fspath(ROOT) not in done.stdout
