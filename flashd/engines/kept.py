# SPDX-License-Identifier: Apache-2.0
"""What must a daemon that comes after us know of engines that run on?

Whoever keeps descriptors beyond this process gets two for each engine and each zygote: our end of its control channel,
and a record. While that end is open somewhere the peer sees no hang-up, and goes on; when its keeper lets go, it ends.
Of an engine the record says what it was ordered to hold; which of that it does hold, it says itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flashd.errors import InvalidArgument
from flashd.units import KiB

VERSION = 1  # of the records, and of what is said on the channels
PREFIX = "flashd-engine."
ZYGOTE_PREFIX = "flashd-zygote."
PREFIXES = (ZYGOTE_PREFIX, PREFIX)
_HALF_BYTES = 128 * KiB
_START = struct.Struct("<II")  # where the content is, and its length
_SIZE = 2 * _HALF_BYTES
_SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Keeper(Protocol):
    """Whoever keeps descriptors beyond this process."""

    def keep(self, name: str, fds: Sequence[int]) -> bool:
        """False if nobody does."""

    def forget(self, name: str) -> None: ...


class NoKeeper:
    """Engines end with this process."""

    def keep(self, name: str, fds: Sequence[int]) -> bool:  # noqa: ARG002 -- the protocol's
        return False

    def forget(self, name: str) -> None:
        pass


class Record:
    """A mapping that can be replaced at any time, in memory that others may keep; whole, whoever is killed then."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def new(cls, content: Mapping[str, Any]) -> Record:
        record = cls(os.memfd_create("flashd:record", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.ftruncate(record.fd, _SIZE)
        fcntl.fcntl(record.fd, fcntl.F_ADD_SEALS, _SEALED)
        record.write(content)
        return record

    def write(self, content: Mapping[str, Any]) -> None:
        raw = json.dumps({"version": VERSION, **content}).encode()
        if len(raw) > _HALF_BYTES - _START.size:
            raise InvalidArgument(f"{len(raw)} bytes are too many to be recorded")
        offset, _ = _START.unpack(os.pread(self.fd, _START.size, 0))
        other = _START.size if offset >= _HALF_BYTES else _HALF_BYTES
        os.pwrite(self.fd, raw, other)
        os.pwrite(self.fd, _START.pack(other, len(raw)), 0)

    def read(self) -> dict[str, Any]:
        """Raises InvalidArgument if there is nothing of ours."""
        offset, length = _START.unpack(os.pread(self.fd, _START.size, 0))
        try:
            content = json.loads(os.pread(self.fd, length, offset))
            if isinstance(content, dict) and content["version"] == VERSION:
                return content
        except (ValueError, KeyError, RecursionError):
            pass
        raise InvalidArgument("its record cannot be read")

    def close(self) -> None:
        os.close(self.fd)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a daemon before us left of an engine or a zygote; the descriptors are the receiver's."""

    name: str
    channel: int
    record: Record
    content: Mapping[str, Any]

    def close(self) -> None:
        os.close(self.channel)
        self.record.close()


def understood(name: str, fds: Sequence[int]) -> Kept:
    """Raises InvalidArgument, and closes nothing."""
    records = [fd for fd in fds if _is_record(fd)]
    channels = [fd for fd in fds if _is_channel(fd)]
    if len(fds) != 2 or len(records) != 1 or len(channels) != 1:
        raise InvalidArgument("that is not a control channel and its record")
    record = Record(records[0])
    content = record.read()
    if content.get("name") != name:
        raise InvalidArgument("its record is of something else")
    return Kept(name, channels[0], record, content)


def _is_record(fd: int) -> bool:
    with contextlib.suppress(OSError):
        status = os.fstat(fd)
        is_sealed = stat.S_ISREG(status.st_mode) and fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALED == _SEALED
        return is_sealed and status.st_size == _SIZE
    return False


def _is_channel(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)
