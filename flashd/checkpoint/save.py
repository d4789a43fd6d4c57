# SPDX-License-Identifier: Apache-2.0
"""How do tensors in memory become a checkpoint? Through two buffers: one is filled while the other is written.

Whatever memory the tensors are in, theirs is never doubled; `Content` brings them piece by piece. The folder is made
beside its destination and takes its place in one step, so that a crash, a full disk or a reader never sees half of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import mmap
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from flashd.checkpoint.convert import DIGEST_BLOCK_BYTES, compose, describe
from flashd.checkpoint.files import DIGESTS, MANIFEST, WEIGHTS, sync_directory, write_new, writing
from flashd.checkpoint.header import Header, serialise
from flashd.checkpoint.layout import Shape
from flashd.checkpoint.manifest import Manifest
from flashd.errors import AlreadyExists, InvalidArgument, StoreFull
from flashd.streamer import ALIGNMENT, OpenFile, Transfer, blake3, write
from flashd.units import format_bytes

# Fills memory with the bytes of a tensor, from an offset within it on.
Content = Callable[[int, memoryview], None]

_BUFFER_BYTES = 16 * DIGEST_BLOCK_BYTES
_RENAME_EXCHANGE = 2  # renameat2(2)
_AT_FDCWD = -100


def save(
    shapes: Iterable[Shape],
    content: Callable[[str], Content],
    destination: Path,
    *,
    aliases: Mapping[str, str],
    metadata: Mapping[str, str],
) -> Manifest:
    """Makes the checkpoint folder `destination`, in place of a checkpoint that is there. All of it is fsynced.

    `content` is asked once for each tensor, in the order in which they lie in the file. Raises AlreadyExists if
    something is there that is no checkpoint, InvalidArgument if it cannot be made there, StoreFull or TransferFailed;
    what was there before is then as it was.
    """
    _check_replaceable(destination)
    header = compose(shapes, aliases, metadata)
    with writing(destination.parent):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _partial(destination) as partial:
            manifest = _fill(partial, header, content)
            _publish(partial, destination)
        sync_directory(destination.parent)
    return manifest


@contextlib.contextmanager
def _partial(destination: Path) -> Iterator[Path]:
    """A folder beside it, for as long as we fill it. Those that killed processes have left there are removed."""
    with contextlib.ExitStack() as held:
        with _locked(destination.parent, fcntl.LOCK_EX):  # nobody takes one for left that is being made
            for path in destination.parent.glob(f".{glob.escape(destination.name)}.*.partial"):
                with contextlib.suppress(OSError), _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(path)
            partial = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.partial")
            partial.mkdir()
            held.callback(shutil.rmtree, partial, ignore_errors=True)
            held.enter_context(_locked(partial, fcntl.LOCK_EX))
        yield partial


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)


def _check_replaceable(destination: Path) -> None:
    if destination.name in {"", ".."}:
        raise InvalidArgument(f"{destination} names no folder to make")
    if not os.path.lexists(destination) or (destination / MANIFEST).is_file():
        return
    if destination.is_dir() and not any(destination.iterdir()):
        return
    raise AlreadyExists(f"{destination} is there, and is no checkpoint", hint="name another folder, or remove it")


def _fill(directory: Path, header: Header, content: Callable[[str], Content]) -> Manifest:
    header_bytes = serialise(header)
    _check_room(directory, len(header_bytes) + header.data_bytes)
    path = directory / WEIGHTS
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(fd, header_bytes, 0)
        digests = _write_data(OpenFile(fd, str(path)), len(header_bytes), header, content)
        os.fsync(fd)
    finally:
        os.close(fd)
    write_new(directory / DIGESTS, digests)
    manifest = describe(header, header_bytes, digests, {}, {}, "")
    write_new(directory / MANIFEST, manifest.to_toml().encode())
    sync_directory(directory)
    return manifest


def _check_room(directory: Path, need_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if need_bytes > free_bytes:
        what = f"{directory.parent} has {format_bytes(free_bytes)} free, and {format_bytes(need_bytes)} are to be saved"
        raise StoreFull(what, hint="free some space, or save elsewhere")


def _write_data(target: OpenFile, data_offset: int, header: Header, content: Callable[[str], Content]) -> bytes:
    """Returns the digests of the blocks."""
    # A mapping begins on a page and ends on one, as O_DIRECT wants it.
    size_bytes = min(_BUFFER_BYTES, -(-header.data_bytes // ALIGNMENT) * ALIGNMENT) or ALIGNMENT
    buffers = [mmap.mmap(-1, size_bytes) for _ in range(2)]
    digests = bytearray()
    offset = data_offset
    with contextlib.ExitStack() as under_way:  # ends the transfer before the buffers go
        transfer: Transfer | None = None
        for number, length in enumerate(_filled(header, content, buffers)):
            filled = memoryview(buffers[number % 2])[:length]
            for start in range(0, length, DIGEST_BLOCK_BYTES):
                digests += blake3(filled[start : start + DIGEST_BLOCK_BYTES])
            if transfer is not None:
                transfer.wait()
            transfer = under_way.enter_context(
                write(target, address=_address(filled), size_bytes=length, target_offset=offset)
            )
            offset += length
        if transfer is not None:
            transfer.wait()
    return bytes(digests)


def _filled(header: Header, content: Callable[[str], Content], buffers: list[mmap.mmap]) -> Iterator[int]:
    """Fills the buffers in turn with the data region; yields how much is in one each time it is full, or the last."""
    turn, used = 0, 0
    for tensor in header.tensors:
        fill = content(tensor.name)
        done = 0
        while done < tensor.extent.length:
            length = min(tensor.extent.length - done, len(buffers[0]) - used)
            fill(done, memoryview(buffers[turn])[used : used + length])
            done, used = done + length, used + length
            if used == len(buffers[0]):
                yield used
                turn, used = 1 - turn, 0
    if used:
        yield used


def _address(region: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(region))


def _publish(partial: Path, destination: Path) -> None:
    """The new folder takes the old one's place in one step; `partial` is then the old one, if there was one."""
    if not os.path.lexists(destination):
        partial.rename(destination)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(partial), os.fsencode(destination)
    if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number not in {errno.EINVAL, errno.ENOSYS}:  # file systems that cannot exchange need two steps
        raise OSError(number, os.strerror(number), str(destination))
    old = partial.with_suffix(".old")
    destination.rename(old)
    partial.rename(destination)
    shutil.rmtree(old, ignore_errors=True)
