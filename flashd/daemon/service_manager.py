# SPDX-License-Identifier: Apache-2.0
"""What do we tell the service manager that started us, and what does it keep for us? (sd_notify(3), systemd.service(5))

Warm models and engines outlive the daemon in its file descriptor store: two descriptors of one name for each. Of an
arena these are itself and a small sealed description; of an engine, our end of its control channel and a record
(flashd/engines/kept.py). A daemon that starts again is handed all of them, and looks at each before it believes what it
is said to be. Whoever stops the service empties the store, and so ends the engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import socket
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flashd import config
from flashd.checkpoint.files import Checkpoint
from flashd.engines import kept
from flashd.errors import InvalidArgument
from flashd.memory.arena import Arena

log = logging.getLogger(__name__)

_VERSION = 1
_LARGEST_DESCRIPTION = 4096
_SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_BARRIER_S = 5.0
_TELL_S = 1.0  # a manager that hangs reads nothing, and its socket's queue is short (unix(7))
_PREFIX = "flashd-arena."
T = TypeVar("T")


class ServiceManager:
    """The other end of NOTIFY_SOCKET; of no effect where nobody listens."""

    def __init__(self, address: str | None) -> None:
        self._address = address

    def tell(self, state: str, fds: Sequence[int] = ()) -> bool:
        """False if nobody listens. One that has left, or hangs, is no reason to fail."""
        if self._address is None:
            return False
        address = self._address
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
        ):
            channel.settimeout(_TELL_S)
            channel.connect("\0" + address[1:] if address.startswith("@") else address)
            if fds:
                socket.send_fds(channel, [state.encode()], list(fds))
            else:
                channel.sendall(state.encode())
            return True
        return False

    async def barrier(self) -> None:
        """Returns when everything told before has been dealt with, or nobody seems to."""
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        loop, closed = asyncio.get_running_loop(), asyncio.Event()
        try:
            is_heard = self.tell("BARRIER=1", [writing])
        finally:
            os.close(writing)
        try:
            if is_heard:
                loop.add_reader(reading, closed.set)  # its end is closed by whoever receives it
                await asyncio.wait_for(closed.wait(), _BARRIER_S)
        except TimeoutError:
            log.warning("the service manager does not answer")
        finally:
            loop.remove_reader(reading)
            os.close(reading)


@dataclass(frozen=True, slots=True)
class KeptArena:
    """An arena that a daemon before us left with the service manager; the descriptor is the receiver's."""

    name: str
    device: str
    checkpoint_id: str
    fd: int


class FdStore:
    """What is kept beyond this process. To be made before anything else opens descriptors, for it takes over those that
    were handed to us."""

    def __init__(self, manager: ServiceManager) -> None:
        self._manager = manager
        self._has_dropped = False
        self._handed: defaultdict[str, list[int]] = defaultdict(list)
        for fd, name in config.inherited_fds():
            self._handed[name].append(fd)

    def put(self, name: str, fds: Sequence[int]) -> bool:
        """False if nobody keeps them."""
        return self._manager.tell(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", fds)

    def drop(self, name: str) -> None:
        """It is let go of when this has `settled`."""
        self._has_dropped = True
        if not self._manager.tell(f"FDSTOREREMOVE=1\nFDNAME={name}"):
            log.warning("%s may still be kept: the service manager did not listen", name)

    async def settled(self) -> None:
        """Returns when the service manager has let go of all that was dropped, or does not answer."""
        if self._has_dropped:
            self._has_dropped = False
            await self._manager.barrier()

    def taken(self, prefix: str, understood: Callable[[str, Sequence[int]], T]) -> Iterator[T]:
        """What was handed to us by names that begin so. What makes no sense is dropped, and what it holds with it."""
        for name in [name for name in self._handed if name.startswith(prefix)]:
            fds = self._handed.pop(name)
            try:
                yield understood(name, fds)
            except InvalidArgument as error:
                log.warning("what was kept as %s is dropped: %s", name, error.message)
                for fd in fds:
                    os.close(fd)
                self.drop(name)


class EngineKeeper:
    """Keeps engines beyond this process (engines.kept.Keeper)."""

    def __init__(self, store: FdStore) -> None:
        self._store = store

    def keep(self, name: str, fds: Sequence[int]) -> bool:
        return self._store.put(name, fds)

    def forget(self, name: str) -> None:
        self._store.drop(name)

    def left(self) -> list[kept.Kept]:
        """What a daemon before us left."""
        return [found for prefix in kept.PREFIXES for found in self._store.taken(prefix, kept.understood)]


class ArenaKeeper:
    """Keeps arenas beyond this process (memory.place.Keeper)."""

    def __init__(self, store: FdStore) -> None:
        self._store = store
        self._names: set[str] = set()

    def keep(self, device: str, checkpoint: Checkpoint, arena: Arena) -> None:
        name = _name(device, checkpoint.id)
        try:
            description = _described(device, checkpoint.id)
        except OSError as error:  # too many open files, say: the model is warm all the same
            log.warning("%s is not kept beyond us: %s", name, error)
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

    def took_over(self, arena: KeptArena) -> None:
        """It stays where it is kept."""
        self._names.add(arena.name)

    def let_go(self, arena: KeptArena) -> None:
        """Its memory is free when the store has `settled`."""
        self._store.drop(arena.name)

    def left(self) -> Iterator[KeptArena]:
        """What a daemon before us left."""
        return self._store.taken(_PREFIX, _understood)


def _name(device: str, checkpoint_id: str) -> str:
    """Names in the store may not have colons."""
    return f"{_PREFIX}{device.replace(':', '-')}.{checkpoint_id}"


def _described(device: str, checkpoint_id: str) -> int:
    text = json.dumps({"version": _VERSION, "device": device, "checkpoint": checkpoint_id})
    fd = os.memfd_create("flashd:description", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, text.encode())
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALED)
    return fd


def _understood(name: str, fds: Sequence[int]) -> KeptArena:
    """The arena of a group of descriptors; the description is closed. Raises InvalidArgument, and closes nothing."""
    descriptions = [fd for fd in fds if _is_description(fd)]
    if len(fds) != 2 or len(descriptions) != 1:
        raise InvalidArgument("that is not an arena and its description")
    (description,) = descriptions
    (arena_fd,) = (fd for fd in fds if fd != description)
    try:
        text = json.loads(os.pread(description, _LARGEST_DESCRIPTION, 0))
        found = KeptArena(name, str(text["device"]), str(text["checkpoint"]), arena_fd)
        if text["version"] != _VERSION or _name(found.device, found.checkpoint_id) != name:
            raise InvalidArgument("its description is of something else")
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InvalidArgument("its description cannot be read") from None
    os.close(description)
    return found


def _is_description(fd: int) -> bool:
    """Only what is sealed for good can be one: nobody has changed it since it was written."""
    try:
        status = os.fstat(fd)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return seals & _SEALED == _SEALED and stat.S_ISREG(status.st_mode) and status.st_size <= _LARGEST_DESCRIPTION
