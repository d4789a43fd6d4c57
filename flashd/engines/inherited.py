# SPDX-License-Identifier: Apache-2.0
"""Records by which the next daemon finds engines that go on running.

The keeper of our descriptors (the service manager or flashd-keeper) gets two for each engine and each zygote: our end
of the control channel, and a record. As long as our end is open anywhere, the peer sees no hang-up and goes on; when
the keeper closes it, the peer ends. The record lists the bindings that an engine was ordered to take; which of them it
holds, the engine itself tells.
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
from typing import Protocol

from flashd.errors import InvalidArgument
from flashd.units import KiB

VERSION = 1  # of the records and of the messages on the channels
PREFIX = "flashd-engine."
ZYGOTE_PREFIX = "flashd-zygote."
PREFIXES = (ZYGOTE_PREFIX, PREFIX)
_HALF_BYTES = 128 * KiB
_START = struct.Struct("<II")  # offset of the content, and its length
_SIZE = 2 * _HALF_BYTES
_SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Keeper(Protocol):
    """Keeps descriptors open after the end of this process."""

    def keep(self, name: str, fds: Sequence[int]) -> bool:
        """Hands descriptors over under a name. Returns False if they are not kept."""

    def forget(self, name: str) -> None: ...


class NoKeeper:
    """A keeper that keeps nothing, so that engines end with this process."""

    def keep(self, name: str, fds: Sequence[int]) -> bool:  # noqa: ARG002 -- defined by the protocol
        return False

    def forget(self, name: str) -> None:
        pass


class Record:
    """A mapping in shared memory that the keeper holds. It is replaced atomically, even if we are killed meanwhile."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def new(cls, content: Mapping[str, object]) -> Record:
        record = cls(os.memfd_create("flashd:record", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.ftruncate(record.fd, _SIZE)
        fcntl.fcntl(record.fd, fcntl.F_ADD_SEALS, _SEALED)
        record.write(content)
        return record

    def write(self, content: Mapping[str, object]) -> None:
        raw = json.dumps({"version": VERSION, **content}).encode()
        if len(raw) > _HALF_BYTES - _START.size:
            raise InvalidArgument(f"{len(raw)} bytes are too many for a record")
        offset, _ = _START.unpack(os.pread(self.fd, _START.size, 0))
        other = _START.size if offset >= _HALF_BYTES else _HALF_BYTES
        os.pwrite(self.fd, raw, other)
        os.pwrite(self.fd, _START.pack(other, len(raw)), 0)

    def read(self) -> dict[str, object]:
        """Reads the record. Raises InvalidArgument if it is not one of ours."""
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
class InheritedProcess:
    """The kept descriptors of an engine or zygote of the previous daemon. The receiver closes them."""

    name: str
    channel: int
    record: Record
    content: Mapping[str, object]

    def close(self) -> None:
        os.close(self.channel)
        self.record.close()


def understood(name: str, fds: Sequence[int]) -> InheritedProcess:
    """Parses kept descriptors. Raises InvalidArgument, without closing any."""
    records = [fd for fd in fds if _is_record(fd)]
    channels = [fd for fd in fds if _is_channel(fd)]
    if len(fds) != 2 or len(records) != 1 or len(channels) != 1:
        raise InvalidArgument("the descriptors are not a control channel and its record")
    record = Record(records[0])
    content = record.read()
    if content.get("name") != name:
        raise InvalidArgument("its record is of another kind")
    return InheritedProcess(name, channels[0], record, content)


def _is_record(fd: int) -> bool:
    with contextlib.suppress(OSError):
        status = os.fstat(fd)
        is_sealed = stat.S_ISREG(status.st_mode) and fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALED == _SEALED
        return is_sealed and status.st_size == _SIZE
    return False


def _is_channel(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)
