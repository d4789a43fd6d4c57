# SPDX-License-Identifier: Apache-2.0
"""Stores blocks that two checkpoints have in common only once.

On file systems that can share extents between files (btrfs, XFS, bcachefs), the kernel compares the bytes itself, under
its own locks, and then makes both files use one extent (FIDEDUPERANGE, ioctl_fideduperange(2)). Each remains a complete
file for all tools, a change to one never changes the other, and removing one frees the extents that no other file uses.
On other file systems, such as ext4, only whole files are shared, by the catalog's hard links.
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
from flashd.io.streamer import ALIGNMENT, Digests, Extent
from flashd.units import MiB

log = logging.getLogger(__name__)

_FIDEDUPERANGE = 0xC0189436  # _IOWR(0x94, 54, struct file_dedupe_range)
# struct file_dedupe_range followed by one struct file_dedupe_range_info (linux/fs.h).
_RANGE = struct.Struct("=QQHHIqQQiI")
_MOST_AT_ONCE = 16 * MiB  # btrfs handles no more in one request
_MOST_COMPARED = 32  # limit, because each costs a descriptor and memory for its digests
_BTRFS = 0x9123683E  # its magic number in statfs(2)
_UNABLE = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOSYS}


def share_blocks(new: Checkpoint, others: Iterable[Checkpoint]) -> int:
    """Shares blocks of `new`, which is not in use yet, with other checkpoints, and returns the number of bytes shared.

    Never raises: blocks that cannot be shared take their own space.
    """
    tables, fds = [], []
    try:
        for other in itertools.islice(others, _MOST_COMPARED):
            try:
                tables.append(other.digests())
                fd = os.open(other.weights_path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                fds.append((fd, other.extent.offset))
            except (CorruptCheckpoint, OSError) as error:
                log.info("nothing is shared with %s: %s", other.id[:12], error)
                tables[len(fds) :] = []
        return _share(new, tables, fds) if fds else 0
    except (CorruptCheckpoint, OSError) as error:
        log.info("no more blocks of %s are shared: %s", new.id[:12], error)
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
                if error.errno in _UNABLE:  # later requests would fail too
                    break
                raise
            shared.append(Extent(wanted.offset, done_bytes))
        if any(extent.length for extent in shared) and _frees_whole_extents_only(target):
            _write_again(target, shared)
    finally:
        os.close(target)
    return sum(extent.length for extent in shared)


def _frees_whole_extents_only(fd: int) -> bool:
    """Tells whether the file system is btrfs, which keeps a whole extent as long as one byte of it is in use.

    A checkpoint is written as few large extents.
    """
    buffer = ctypes.create_string_buffer(256)
    failed = ctypes.CDLL(None).fstatfs(fd, buffer)
    return not failed and ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF == _BTRFS


def _write_again(fd: int, shared: Sequence[Extent]) -> None:
    """Rewrites all except these extents, which moves the data to new extents, since btrfs never overwrites in place."""
    size_bytes, offset = os.fstat(fd).st_size, 0
    for extent in (*shared, Extent(size_bytes, 0)):
        while offset < extent.offset:
            part = os.pread(fd, min(_MOST_AT_ONCE, extent.offset - offset), offset)
            if not part:
                raise OSError(errno.EIO, "it is truncated")
            offset += os.pwrite(fd, part, offset)
        offset = extent.end
    os.fsync(fd)


def _deduplicate(source: int, source_offset: int, target: int, wanted: Extent) -> int:
    """Shares a range and returns the number of bytes shared. Raises OSError if the file system cannot."""
    done = 0
    while done < wanted.length:
        count = min(_MOST_AT_ONCE, wanted.length - done)
        request = bytearray(_RANGE.pack(source_offset + done, count, 1, 0, 0, target, wanted.offset + done, 0, 0, 0))
        fcntl.ioctl(source, _FIDEDUPERANGE, request)
        *_, shared, status, _ = _RANGE.unpack(request)
        if status < 0:
            raise OSError(-status, os.strerror(-status))
        if status or not shared:  # the bytes differ in spite of equal digests: one file is damaged
            break
        done += shared
    return done
