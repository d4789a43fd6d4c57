# SPDX-License-Identifier: Apache-2.0
"""Writes tensors in memory as a checkpoint, through two buffers: one is filled while the other is written.

The memory of the tensors, of whatever kind, is never duplicated as a whole; `Content` provides them piece by piece. The
folder is made beside its destination and replaces it in one step, so that a crash, a full disk or a concurrent reader
never leaves or sees half of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import mmap
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from flashd.checkpoint.convert import compose
from flashd.checkpoint.files import DIGESTS, MANIFEST, WEIGHTS
from flashd.checkpoint.header import Header, serialise
from flashd.checkpoint.layout import Shape
from flashd.checkpoint.manifest import Manifest
from flashd.checkpoint.writing import DIGEST_BLOCK_BYTES, describe
from flashd.durable import exchange, sync_directory, write_new, writing
from flashd.errors import AlreadyExists, InvalidArgument, StoreFull
from flashd.io.streamer import ALIGNMENT, OpenFile, Transfer, blake3, write
from flashd.units import format_bytes

# Fills memory with the bytes of a tensor, starting at an offset within the tensor.
Content = Callable[[int, memoryview], None]

_BUFFER_BYTES = 16 * DIGEST_BLOCK_BYTES


def save(
    shapes: Iterable[Shape],
    content: Callable[[str], Content],
    destination: Path,
    *,
    aliases: Mapping[str, str],
    metadata: Mapping[str, str],
) -> Manifest:
    """Makes the checkpoint folder `destination`, which may replace a checkpoint, and fsyncs everything.

    `content` is called once for each tensor, in their order in the file. Raises AlreadyExists if the destination exists
    and is not a checkpoint, InvalidArgument if it cannot be created, StoreFull or TransferFailed, without any change.
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
    """Provides a folder beside the destination while we fill it. Folders left by killed processes are removed."""
    with contextlib.ExitStack() as held:
        with _locked(destination.parent, fcntl.LOCK_EX):  # so that no process takes a folder in use for a leftover
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
        raise InvalidArgument(f"{destination} is not the name of a folder")
    if not os.path.lexists(destination) or (destination / MANIFEST).is_file():
        return
    if destination.is_dir() and not any(destination.iterdir()):
        return
    raise AlreadyExists(f"{destination} exists and is not a checkpoint", hint="name another folder, or remove it")


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
        what = f"{directory.parent} has only {format_bytes(free_bytes)} free, but {format_bytes(need_bytes)} are needed"
        raise StoreFull(what, hint="free some space, or save elsewhere")


def _write_data(target: OpenFile, data_offset: int, header: Header, content: Callable[[str], Content]) -> bytes:
    """Writes the data region and returns the digests of its blocks."""
    # A mapping begins and ends at page boundaries, as O_DIRECT requires.
    size_bytes = min(_BUFFER_BYTES, -(-header.data_bytes // ALIGNMENT) * ALIGNMENT) or ALIGNMENT
    buffers = [mmap.mmap(-1, size_bytes) for _ in range(2)]
    digests = bytearray()
    offset = data_offset
    with contextlib.ExitStack() as under_way:  # ends the transfer before the buffers are freed
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
    """Fills the buffers in turn with the data region. Yields the number of bytes in each buffer when it is full."""
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
    """Replaces the old folder with the new one in one step. `partial` is then the old folder, if there was one."""
    if not os.path.lexists(destination):
        partial.rename(destination)
        return
    if exchange(partial, destination):
        return
    old = partial.with_suffix(".old")
    destination.rename(old)
    partial.rename(destination)
    shutil.rmtree(old, ignore_errors=True)
