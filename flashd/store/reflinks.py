# SPDX-License-Identifier: Apache-2.0
"""How do blocks that two checkpoints have in common come to lie on the disk once?

On file systems that can share extents between files (btrfs, XFS, bcachefs) the kernel is asked to: it compares the
bytes itself, under its own locks, and then makes both files use one extent (FIDEDUPERANGE, ioctl_fideduperange(2)).
Each file stays a whole one that any tool reads, changing one never changes the other, and removing one frees what no
other uses. Elsewhere, ext4 among them, nothing is shared but whole files, which the catalog hard-links.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import logging
import os
import struct
from collections.abc import Iterable, Sequence

from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.sharing import find_shared
from flashd.errors import CorruptCheckpoint
from flashd.streamer import ALIGNMENT, Digests, Extent
from flashd.units import MiB

log = logging.getLogger(__name__)

_FIDEDUPERANGE = 0xC0189436  # _IOWR(0x94, 54, struct file_dedupe_range)
# struct file_dedupe_range with one struct file_dedupe_range_info behind it (linux/fs.h).
_RANGE = struct.Struct("=QQHHIqQQiI")
_MOST_AT_ONCE = 16 * MiB  # btrfs takes no more of a request
_MOST_COMPARED = 32  # each costs a descriptor and its digests
_BTRFS = 0x9123683E  # its magic number in statfs(2)
_UNABLE = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOSYS}


def share_blocks(new: Checkpoint, others: Iterable[Checkpoint]) -> int:
    """Makes blocks of `new`, which nobody uses yet, the same on the disk as those of others; returns how many bytes.

    Raises nothing: what cannot be shared takes its own room.
    """
    tables, fds = [], []
    try:
        for other in itertools.islice(others, _MOST_COMPARED):
            try:
                tables.append(other.digests())
                fds.append((os.open(other.weights_path, os.O_RDONLY | os.O_CLOEXEC), other.extent.offset))
            except (CorruptCheckpoint, OSError) as error:
                log.info("nothing is shared with %s: %s", other.id[:12], error)
                tables[len(fds) :] = []
        return _share(new, tables, fds) if fds else 0
    except (CorruptCheckpoint, OSError) as error:
        log.info("blocks of %s are not shared any further: %s", new.id[:12], error)
        return 0
    finally:
        for fd, _ in fds:
            os.close(fd)


def _share(new: Checkpoint, tables: list[Digests], fds: list[tuple[int, int]]) -> int:
    runs = find_shared(new.digests(), new.extent.length, tables)
    shared: list[Extent] = []
    target = os.open(new.weights_path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for run in runs:
            if run.source is None:
                continue
            fd, start = fds[run.source]
            wanted = Extent(new.extent.offset + run.offset, run.length - run.length % ALIGNMENT)
            try:
                done_bytes = _deduplicate(fd, start + run.source_offset, target, wanted)
            except OSError as error:
                if error.errno in _UNABLE:  # nor would the next be
                    break
                raise
            shared.append(Extent(wanted.offset, done_bytes))
        if any(extent.length for extent in shared) and _frees_whole_extents_only(target):
            _write_again(target, shared)
    finally:
        os.close(target)
    return sum(extent.length for extent in shared)


def _frees_whole_extents_only(fd: int) -> bool:
    """btrfs keeps an extent for as long as one byte of it is in use, and a checkpoint is written as few large ones."""
    buffer = ctypes.create_string_buffer(256)
    failed = ctypes.CDLL(None).fstatfs(fd, buffer)
    return not failed and ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF == _BTRFS


def _write_again(fd: int, shared: Sequence[Extent]) -> None:
    """All but these extents, to extents of their own: such a file system never writes over what is there."""
    size_bytes, offset = os.fstat(fd).st_size, 0
    for extent in (*shared, Extent(size_bytes, 0)):
        while offset < extent.offset:
            part = os.pread(fd, min(_MOST_AT_ONCE, extent.offset - offset), offset)
            if not part:
                raise OSError(errno.EIO, "it is cut short")
            offset += os.pwrite(fd, part, offset)
        offset = extent.end
    os.fsync(fd)


def _deduplicate(source: int, source_offset: int, target: int, wanted: Extent) -> int:
    """How many bytes are shared now. Raises OSError where the file system cannot."""
    done = 0
    while done < wanted.length:
        count = min(_MOST_AT_ONCE, wanted.length - done)
        request = bytearray(_RANGE.pack(source_offset + done, count, 1, 0, 0, target, wanted.offset + done, 0, 0, 0))
        fcntl.ioctl(source, _FIDEDUPERANGE, request)
        *_, shared, status, _ = _RANGE.unpack(request)
        if status < 0:
            raise OSError(-status, os.strerror(-status))
        if status or not shared:  # the bytes differ after all: one of the two is spoiled
            break
        done += shared
    return done
