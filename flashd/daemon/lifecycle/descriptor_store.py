# SPDX-License-Identifier: Apache-2.0
"""The service manager's file descriptor store (sd_notify(3), systemd.service(5)).

Models in memory and engines outlive the daemon by descriptors in this store, two with one name for each: for an arena,
the arena itself and a small sealed description; for an engine, our end of its control channel and a record
(engines/inherited.py). The next daemon gets all of them, and verifies each before use. Stopping the service empties the
store, and so ends the engines.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flashd.checkpoint.files import Checkpoint
from flashd.config.environment import inherited_fds
from flashd.engines import inherited
from flashd.errors import InvalidArgument
from flashd.memory.arena import Arena
from flashd.service_manager import ServiceManager

log = logging.getLogger(__name__)

_VERSION = 1
_LARGEST_DESCRIPTION = 4096
_SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_PREFIX = "flashd-arena."
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class InheritedArena:
    """An arena that an earlier daemon left in the store. The receiver closes the descriptor."""

    name: str
    device: str
    checkpoint_id: str
    fd: int


class FdStore:
    """Descriptors kept for the next daemon.

    Create it before other descriptors are opened, because it takes over the inherited ones.
    """

    def __init__(self, manager: ServiceManager) -> None:
        self._manager = manager
        self._has_dropped = False
        self._handed: defaultdict[str, list[int]] = defaultdict(list)
        for fd, name in inherited_fds():
            self._handed[name].append(fd)

    def put(self, name: str, fds: Sequence[int]) -> bool:
        """Stores descriptors under a name. Returns False if they are not kept."""
        return self._manager.tell(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", fds)

    def drop(self, name: str) -> None:
        """Removes descriptors by name. They are closed when the store has `settled`."""
        self._has_dropped = True
        if not self._manager.tell(f"FDSTOREREMOVE=1\nFDNAME={name}"):
            log.warning("%s may still be kept, because the service manager did not respond", name)

    async def settled(self) -> None:
        """Waits until the service manager has closed all removed descriptors, or does not answer."""
        if self._has_dropped:
            self._has_dropped = False
            await self._manager.barrier()

    def taken(self, prefix: str, understood: Callable[[str, Sequence[int]], T]) -> Iterator[T]:
        """Yields inherited entries whose names begin with `prefix`. Entries that cannot be parsed are dropped."""
        for name in [name for name in self._handed if name.startswith(prefix)]:
            fds = self._handed.pop(name)
            try:
                yield understood(name, fds)
            except InvalidArgument as error:
                log.warning("the kept descriptors of %s are dropped: %s", name, error.message)
                for fd in fds:
                    os.close(fd)
                self.drop(name)


class EngineKeeper:
    """Keeps engines beyond this process (engines.inherited.Keeper)."""

    def __init__(self, store: FdStore) -> None:
        self._store = store

    def keep(self, name: str, fds: Sequence[int]) -> bool:
        return self._store.put(name, fds)

    def forget(self, name: str) -> None:
        self._store.drop(name)

    def left(self) -> list[inherited.InheritedProcess]:
        """Engines and zygotes that the previous daemon left."""
        return [found for prefix in inherited.PREFIXES for found in self._store.taken(prefix, inherited.understood)]


class ArenaKeeper:
    """Keeps arenas beyond this process (memory.device_cache.Keeper)."""

    def __init__(self, store: FdStore) -> None:
        self._store = store
        self._names: set[str] = set()

    def keep(self, device: str, checkpoint: Checkpoint, arena: Arena) -> None:
        name = _name(device, checkpoint.id)
        try:
            description = _described(device, checkpoint.id)
        except OSError as error:  # for example too many open files, which does not affect the loaded model
            log.warning("%s is not kept for the next daemon: %s", name, error)
            return
        try:
            if self._store.put(name, [arena.fd, description]):
                self._names.add(name)
        finally:
            os.close(description)

    async def forget(self, device: str, checkpoint_id: str) -> None:
        name = _name(device, checkpoint_id)
        if name in self._names:
            self._names.discard(name)
            self._store.drop(name)
            await self._store.settled()

    def took_over(self, arena: InheritedArena) -> None:
        """Notes that an arena taken over stays in the store."""
        self._names.add(arena.name)

    def let_go(self, arena: InheritedArena) -> None:
        """Removes an arena. Its memory is free when the store has `settled`."""
        self._store.drop(arena.name)

    def left(self) -> Iterator[InheritedArena]:
        """Engines that the previous daemon left."""
        return self._store.taken(_PREFIX, _understood)


def _name(device: str, checkpoint_id: str) -> str:
    """Returns the name of an arena in the store. Such names cannot contain colons."""
    return f"{_PREFIX}{device.replace(':', '-')}.{checkpoint_id}"


def _described(device: str, checkpoint_id: str) -> int:
    text = json.dumps({"version": _VERSION, "device": device, "checkpoint": checkpoint_id})
    fd = os.memfd_create("flashd:description", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, text.encode())
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALED)
    return fd


def _understood(name: str, fds: Sequence[int]) -> InheritedArena:
    """Parses the descriptors of an arena, and closes its description. Raises InvalidArgument, without closing any."""
    descriptions = [fd for fd in fds if _is_description(fd)]
    if len(fds) != 2 or len(descriptions) != 1:
        raise InvalidArgument("the descriptors are not an arena and its description")
    (description,) = descriptions
    (arena_fd,) = (fd for fd in fds if fd != description)
    try:
        text = json.loads(os.pread(description, _LARGEST_DESCRIPTION, 0))
        found = InheritedArena(name, str(text["device"]), str(text["checkpoint"]), arena_fd)
        if text["version"] != _VERSION or _name(found.device, found.checkpoint_id) != name:
            raise InvalidArgument("its description is of another kind")
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InvalidArgument("its description cannot be read") from None
    os.close(description)
    return found


def _is_description(fd: int) -> bool:
    """Tells whether a descriptor is sealed memory, as descriptions are, and so unchanged since it was written."""
    try:
        status = os.fstat(fd)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return seals & _SEALED == _SEALED and stat.S_ISREG(status.st_mode) and status.st_size <= _LARGEST_DESCRIPTION
