# SPDX-License-Identifier: Apache-2.0
"""Files and folders of state: bounded reads, durable changes.

A change is written to a new file beside the old one and synced; then it is renamed into place, and the folder is
synced. Until the rename, a failure leaves the old state. Afterwards only the last sync can fail: then every reader, and
a restarted daemon, sees the new state, but a power failure may bring the old state back. This error is `Unconfirmed`;
a copy of the state in memory should take the new state all the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import reprlib
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flashd import toml
from flashd.errors import StoreFull, TransferFailed
from flashd.units import MiB

MOST_STATE_BYTES = 16 * MiB  # limit of a state file's size, far above what flashd writes
_MOST_TEXT = 32_768  # characters: a path may have 4096 bytes, of which each may be escaped
_LAST_TIME = 253_402_300_799  # the end of the year 9999
_PARTIAL, _DAMAGED = ".partial", ".damaged"
_RENAME_EXCHANGE = 2  # renameat2(2)
_AT_FDCWD = -100
_ALL_OURS = 0o700


class Unconfirmed(OSError):
    """Raised after a change that the disk did not confirm: a power failure may bring the old state back."""


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading. Raises OSError, or ValueError unless it is a regular file, since a pipe would block."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{path.name} is not a regular file")
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_bytes(path: Path, most_bytes: int = MOST_STATE_BYTES) -> bytes:
    """Reads a regular file. Raises OSError, or ValueError if it is too large or not a regular file."""
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"{path.name} is larger than {most_bytes} bytes")
    return content


def read_toml(path: Path, most_bytes: int = MOST_STATE_BYTES) -> dict[str, Any]:
    """Reads a TOML file. Raises OSError if it cannot be read, ValueError if it is not TOML."""
    return toml.parse(read_bytes(path, most_bytes).decode())


def read_fingerprints(path: Path) -> dict[str, str]:
    """Reads a TOML table of strings; empty if there is no file. Raises OSError, or ValueError for other contents."""
    try:
        found = read_toml(path)
    except FileNotFoundError:
        return {}
    if not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"{path.name} contains values other than strings")
    return found


def as_text(value: object) -> str:
    """Checks that a value is a string short enough for the bus, and returns it. Raises ValueError."""
    if not isinstance(value, str) or len(value) > _MOST_TEXT or "\0" in value:
        raise ValueError(f"{reprlib.repr(value)} is not a text of {_MOST_TEXT} characters at most")
    return value


def as_count(value: object) -> int:
    """Checks that a value is a number or size of at most 63 bits, and returns it. Raises ValueError."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{type(value).__name__} in place of a count from 0 to 2**63 - 1")
    return value


def as_time(value: object) -> float:
    """Checks that a value is a date in seconds since the epoch, and returns it. Raises ValueError."""
    if type(value) not in {int, float} or not 0 <= value <= _LAST_TIME:  # type: ignore[operator]
        raise ValueError(f"{type(value).__name__} in place of a time")
    return float(value)  # type: ignore[arg-type]


def write_new(path: Path, content: bytes) -> None:
    """Writes a new file, and returns once it is on the disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Writes the names in a folder to the disk, which fsync(2) of a file does not do for the file's name."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def confirm(directory: Path) -> None:
    """Syncs a folder in which a change has been made. Raises Unconfirmed."""
    try:
        sync_directory(directory)
    except OSError as error:
        raise Unconfirmed(error.errno, error.strerror, str(directory)) from None


def replace_file(path: Path, content: bytes) -> None:
    """Creates or replaces a file. Raises OSError if nothing has changed, or Unconfirmed."""
    with _replacing(path) as partial:
        write_new(partial, content)


def replace_link(path: Path, target: str) -> None:
    """Creates or replaces a symbolic link. Raises OSError if nothing has changed, or Unconfirmed."""
    with _replacing(path) as partial:
        partial.symlink_to(target)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """The name beside `path` under which its replacement is made; it takes its place at the end of the block."""
    partial = path.with_name(path.name + _PARTIAL)
    discard(partial)
    try:
        yield partial
        partial.rename(path)
    except OSError:
        discard(partial)
        raise
    confirm(path.parent)


def remove_file(path: Path) -> None:
    """Removes a file, if there is one. Raises OSError if it is still there, or Unconfirmed."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        confirm(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names atomically. Returns False if the file system does not support that. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in {errno.EINVAL, errno.ENOSYS}:
        return False
    raise OSError(number, os.strerror(number), str(other))


def discard(path: Path) -> bool:
    """Removes a file, a folder with its contents, or a link without its target.

    Returns False if a part remains; try again later.
    """
    if _remove(path):
        return True
    if path.is_symlink():  # os.walk would follow a link at the top
        return False
    with contextlib.suppress(RecursionError):
        for folder, _, _ in os.walk(path):  # the contents of a folder without write permission cannot be removed
            with contextlib.suppress(OSError):
                Path(folder).chmod(_ALL_OURS)
    return _remove(path)


def _remove(path: Path) -> bool:
    with contextlib.suppress(OSError, RecursionError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    return not os.path.lexists(path)


def set_aside(path: Path) -> Path | None:
    """Renames a damaged file or folder, so that nothing is lost. Returns the new path; None if that fails."""
    for number in range(1, 1000):
        aside = path.with_suffix(_DAMAGED if number == 1 else f".{number}{_DAMAGED}")
        if not os.path.lexists(aside):
            with contextlib.suppress(OSError):
                return path.rename(aside)
            return None
    return None


def put_aside(folder: Path) -> list[Path]:
    """Lists the files and folders that have been set aside in a folder."""
    return sorted(folder.glob(f"*{_DAMAGED}"))


def leftovers(folder: Path) -> list[Path]:
    """Lists the remains of unfinished changes in a folder."""
    return sorted(folder.glob(f"*{_PARTIAL}"))


def clear(folder: Path) -> None:
    """Removes the remains of unfinished changes as far as possible."""
    for leftover in leftovers(folder):
        discard(leftover)


def abandon(path: Path) -> None:
    """Removes the temporary file of an interrupted replacement."""
    discard(path.with_name(path.name + _PARTIAL))


def total_bytes(path: Path) -> int:
    """Returns the apparent size of all files at and below a path. Files that vanish meanwhile do not count."""
    found = 0
    with contextlib.suppress(OSError, RecursionError):
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            return status.st_size
        for folder, _, names in os.walk(path):
            for name in names:
                with contextlib.suppress(OSError):
                    found += Path(folder, name).lstat().st_size
    return found


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns OSError while files are written into StoreFull or TransferFailed."""
    try:
        yield
    except Unconfirmed as error:
        what = f"{path} was changed, but the disk did not confirm it: {error.strerror}"
        hint = "a power failure may undo the change; look for disk errors in dmesg, then repeat the change"
        raise TransferFailed(what, hint=hint) from None
    except OSError as error:
        what = f"write {error.filename or path}: {error.strerror}"
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise StoreFull(what, hint="free some space, or remove a model") from None
        if error.errno == errno.EROFS:
            raise TransferFailed(what, hint="the file system is mounted read-only: remount it for writing") from None
        raise TransferFailed(what) from None
