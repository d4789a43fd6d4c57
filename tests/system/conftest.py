# SPDX-License-Identifier: Apache-2.0
"""Machines with a real systemd, and in them the real package. They need root and what tests/system/run installs."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import kept
import leash
import parallel
import pytest
from leash import Leashed

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
MACHINE, LENT = HERE / "machine", HERE / "lent.py"
ROOTS = Path("/var/cache/flashd-tests")  # outside the checkout, which may be on an overlay
PACKAGES = ROOTS / "packages"  # shared by all checkouts, because their names are digests of their sources
KEPT_DAYS = 3
# The sources of a package, which is rebuilt only if some of them have changed.
SOURCES = ("flashd", "tray", "native", "packaging", "systemd", "pyproject.toml", "README.md", "LICENSE")
TOOLS = {"mmdebstrap": "mmdebstrap", "systemd-nspawn": "systemd-container", "dh": "debhelper", "nsenter": "util-linux"}
NEWER = "later"  # the end of the version of a package that replaces ours
_TIMEOUT_S = 1500  # the first test of all builds the package, beside tests in other processes
_names = itertools.count(1)
# Modules whose machines take minutes to make, in the order of making; each has a function `prepare`. If it fails, the
# tests make their machines themselves, and report the error.
MADE_AHEAD = {"test_desktop_rights": 1, "test_ubuntu": 2, "test_arm64": 3}
_MAKE_AHEAD = "import importlib, sys; [importlib.import_module(name).prepare() for name in sys.argv[1:]]"
_MAKER = pytest.StashKey[Leashed]()
_AS_HERE = {**os.environ, "PYTHONPATH": str(HERE.parent)}  # for leash.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those whose machines take long to make come last of all."""
    for item in items:
        if item.path.is_relative_to(HERE) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_TIMEOUT_S))
    items.sort(key=lambda item: MADE_AHEAD.get(item.path.stem, 0))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins to make those machines, with what the other tests leave of the processors.

    Of several processes that run tests each makes what its own tests need.
    """
    if parallel.is_one_of_several(session.config):
        return
    modules = {item.path.stem for item in session.items}
    wanted = sorted(modules & MADE_AHEAD.keys(), key=MADE_AHEAD.__getitem__)
    if wanted and len(modules) > 1 and not session.config.option.collectonly and not _missing():
        command = ["nice", "-n", "19", sys.executable, "-c", _MAKE_AHEAD, *wanted]
        session.config.stash[_MAKER] = Leashed(
            command, cwd=HERE, env=_AS_HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    maker = session.config.stash.get(_MAKER, None)
    if maker is not None:
        maker.end()


@dataclass(frozen=True, slots=True)
class Result:
    """What a program in a machine said."""

    status: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Machine:
    """A running machine."""

    name: str
    root: Path

    def run(self, *command: str | Path, check: bool = True, env: tuple[str, ...] = ()) -> Result:
        """As root."""
        done = subprocess.run(
            [MACHINE, "run", self.name, "env", *env, *command], capture_output=True, text=True, check=False, cwd="/"
        )
        result = Result(done.returncode, done.stdout, done.stderr)
        assert not check or result.status == 0, f"{command}: {result}\n{self.journal()}"
        return result

    def run_as(self, user: str, *command: str | Path, check: bool = True) -> Result:
        """As a user without a seat, as over ssh."""
        uid = self.run("id", "-u", user).out.strip()
        runtime = f"XDG_RUNTIME_DIR=/run/user/{uid}"
        return self.run("runuser", "-u", user, "--", "env", runtime, *command, check=check)

    def run_at_seat(self, user: str, *command: str | Path, check: bool = True) -> Result:
        """As a user who sits at the machine's screen."""
        session = ("-E", "XDG_SEAT=seat0", "-E", "XDG_SESSION_TYPE=x11", "-E", "XDG_SESSION_CLASS=user")
        options = ("-q", "--wait", "--pipe", "-p", f"User={user}", "-p", "PAMName=login", *session)
        return self.run("systemd-run", *options, *command, check=check)

    def show(self, unit: str, property_: str) -> str:
        return self.run("systemctl", "show", "--value", "-p", property_, unit).out.strip()

    def journal(self) -> str:
        command = [MACHINE, "run", self.name, "journalctl", "--no-pager", "-n", "60"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    def models(self) -> dict[str, str]:
        """Every model's tier."""
        listed = json.loads(self.run("flash", "list", "--json").out)
        return {model["name"]: model["residency"] for model in listed if "residency" in model}

    def until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"it did not come to pass\n{self.journal()}"
            time.sleep(0.1)

    def make_source(self, folder: str, *, seed: int = 1, owner: str = "root") -> None:
        """A source in the machine, as its owner made it."""
        target = self.root / folder.lstrip("/")
        made = target.with_name(f".{target.name}.new")
        made.mkdir(parents=True)
        header = json.dumps({"w": {"dtype": "F32", "shape": [300_000], "data_offsets": [0, 1_200_000]}}).encode()
        data = bytes([seed]) * 1_200_000
        (made / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
        (made / "config.json").write_text(json.dumps({"architectures": ["Tiny"], "model_type": "tiny"}))
        self.run("chown", "-R", f"{owner}:", Path("/") / made.relative_to(self.root))
        made.rename(target)


def _build() -> str:
    """The name of a package of what is in the working tree now."""
    listed = ["git", "ls-files", "-z", "-co", "--exclude-standard", "--", *SOURCES]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    digest = hashlib.sha256()
    for file in sorted(filter(None, files)):
        if (ROOT / file).is_file():
            digest.update(f"{file}\0{(ROOT / file).stat().st_mode}\0".encode() + (ROOT / file).read_bytes())
    return digest.hexdigest()[:16]


def _missing() -> str:
    """What there must be before a machine can be; empty if it is there."""
    if os.geteuid() != 0:
        return "root, to boot machines"
    missing = [package for program, package in TOOLS.items() if shutil.which(program) is None]
    return f"{', '.join(missing)}: tests/system/run installs what is needed" if missing else ""


@pytest.fixture(scope="session")
def tools() -> None:
    if missing := _missing():
        pytest.skip(f"needs {missing}")


def built(suite: str = "", root: Path | None = None, **environment: str) -> Path:
    """The folder of what packaging/build-deb makes, for this machine's release or for that of another root."""
    folder = PACKAGES / f"{suite or 'own'}-{_build()}"
    with kept.alone(folder):
        if not folder.exists():
            made = folder.with_suffix(".partial")
            shutil.rmtree(made, ignore_errors=True)
            where = ("--root", root) if root else ()
            command = [ROOT / "packaging" / "build-deb", *where, made]
            # These packages need not be small, and compressing takes minutes under emulation.
            quick = {"DPKG_DEB_COMPRESSOR_TYPE": "gzip", "DPKG_DEB_COMPRESSOR_LEVEL": "1"}
            done = leash.run(command, env={**os.environ, **quick, **environment})
            assert done.returncode == 0, done.stderr
            made.rename(folder)
        os.utime(folder)  # still in use
    kept.forget_old(PACKAGES, KEPT_DAYS)
    return folder


def daemon_of(packages: Path) -> Path:
    (found,) = packages.glob("flashd_*.deb")
    return found


@pytest.fixture(scope="session")
def packages(tools: None) -> Path:
    return built()


@pytest.fixture(scope="session")
def package(packages: Path) -> Path:
    return daemon_of(packages)


@pytest.fixture(scope="session")
def newer(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of a later version, which has nothing else that is new."""
    folder = tmp_path_factory.mktemp("newer")
    tree, made = folder / "tree", folder / "newer.deb"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN" / "control"
    control.write_text(re.sub(r"(?m)^Version: .*$", rf"\g<0>+{NEWER}", control.read_text()))
    subprocess.run(["dpkg-deb", "--build", "-Zgzip", "-z1", tree, made], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    return made


def rooted(*packages: str, suite: str = "bookworm", architecture: str = "") -> Path:
    """A root folder for machines that have these packages, made once."""
    recipe = MACHINE.read_bytes() + (LENT.read_bytes() if architecture else b"")
    key = hashlib.sha256(recipe + f"{suite} {architecture} {packages}".encode()).hexdigest()[:12]
    folder = ROOTS / f"base-{suite}{architecture and '-' + architecture}-{key}"
    with kept.alone(folder):
        if not folder.exists():
            made = folder.with_suffix(".partial")
            _remove_unfinished(made)
            told = {**os.environ, "MACHINE_SUITE": suite, "MACHINE_ARCHITECTURE": architecture}
            command = [MACHINE, "base", made, *packages]
            done = leash.run(command, env=told)
            assert done.returncode == 0, done.stderr
            made.rename(folder)
    return folder


def _remove_unfinished(root: Path) -> None:
    """Removes a root whose builder was killed. It may have the machine's own /dev and /proc mounted in it."""
    inside = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in sorted((at for at in inside if Path(at).is_relative_to(root)), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=True)
    if root.exists():
        subprocess.run(["rm", "--recursive", "--force", "--one-file-system", root], check=True)


@pytest.fixture(scope="session")
def base(tools: None) -> Path:
    """The root folder that most machines begin with."""
    return rooted("libglib2.0-bin")


@contextlib.contextmanager
def booted(base: Path, *, bind: str = "") -> Iterator[Machine]:
    """A machine; `bind` shows a folder of this one in it."""
    name = f"test-{os.getpid()}-{next(_names)}"
    environment = {**os.environ, "MACHINE_BIND": bind}
    done = subprocess.run([MACHINE, "boot", base, name], env=environment, capture_output=True, text=True, check=False)
    try:
        assert done.returncode == 0, done.stderr
        root = subprocess.run([MACHINE, "root", name], capture_output=True, text=True, check=True).stdout.strip()
        yield Machine(name, Path(root))
    finally:
        subprocess.run([MACHINE, "stop", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def bare_machine(base: Path, package: Path) -> Iterator[Machine]:
    """With the package in /root/flashd.deb, and not installed."""
    with booted(base) as machine:
        shutil.copy(package, machine.root / "root" / "flashd.deb")
        yield machine


@pytest.fixture(scope="module")
def machine(bare_machine: Machine) -> Machine:
    """With the package installed."""
    bare_machine.run("dpkg", "-i", "/root/flashd.deb")
    return bare_machine
