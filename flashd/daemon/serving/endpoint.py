# SPDX-License-Identifier: Apache-2.0
"""The folder of sockets, and the fixed address of the active model.

    RUNTIME/openai.sock     a symbolic link to the active engine's socket, absent while no model is active
    RUNTIME/wake-proxy.sock where it leads while a model rests (flashd/daemon/serving/wake_proxy.py)
    RUNTIME/resting         which one that is, and in which kind of engine, for a daemon after us
    RUNTIME/engines/        the engines' own sockets, N.sock, and for each that serves beside the active one N.beside
    RUNTIME/scratch/        private folders of engines that are our children
    RUNTIME/lock            held by the one daemon that owns this folder

connect(2) follows the link, so replacing it by rename(2) directs all new connections to the new engine at once.

Only we may open an engine's socket until its model answers, and always if the model is private. Users who may use it,
but not open the socket or enter RUNTIME, get a connection from us (`connected`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import socket
import stat
from pathlib import Path
from typing import TextIO

from flashd.closing import Closing
from flashd.daemon.events import Events
from flashd.errors import Busy, InvalidArgument, NotAuthorized, Unavailable
from flashd.swap.weights import Target

_OURS_ALONE = 0o600
_BESIDE = ".beside"
_CONNECT_S = 5.0
_WAKE_PROXY_BEFORE = "doorman.sock"  # its name in 0.1.0, which may have left a model at rest there
MAX_SOCKET_PATH = 107  # sun_path, without its terminating null (unix(7))


class RuntimeFolder(Closing):
    """The folder of sockets, ours alone until `close`. What an earlier daemon left there is removed, unless engines of
    its answer there still (`has_engines`). It goes when we do, unless it `is_left` for the next daemon.

    Leftovers of an earlier daemon are removed, unless its engines still answer there (`has_engines`). With `for_group`,
    the group of this process may connect to the active engine too, if it may enter `path`.
    """

    def __init__(self, path: Path, *, for_group: bool = False, has_engines: bool = False) -> None:
        self.path = path
        longest = self.engines / "999999.sock"
        if len(os.fsencode(longest)) > MAX_SOCKET_PATH:
            hint = "choose a shorter one with --runtime-dir"
            raise InvalidArgument(f"the path {path} is too long for Unix sockets", hint=hint)
        make_private(path)
        self._lock = _locked(path)
        self.has_engines = has_engines
        self.is_left = False
        self._clean()
        self.engines.mkdir(mode=0o750 if for_group else 0o700, exist_ok=True)
        self.shared_mode = 0o660 if for_group else _OURS_ALONE

    @property
    def engines(self) -> Path:
        return self.path / "engines"

    @property
    def endpoint(self) -> Path:
        return self.path / "openai.sock"

    @property
    def wake_proxy(self) -> Path:
        return self.path / "wake-proxy.sock"

    def close(self) -> None:
        self._clean()
        if not self.is_left:
            for name in (self.wake_proxy.name, _WAKE_PROXY_BEFORE):
                (self.path / name).unlink(missing_ok=True)
            (self.path / "lock").unlink(missing_ok=True)
            remove_empty(self.path)
        self._lock.close()

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    @property
    def active(self) -> Path | None:
        """Returns the socket to which the endpoint leads."""
        with contextlib.suppress(OSError):
            return self.endpoint.readlink()
        return None

    @property
    def beside(self) -> frozenset[Path]:
        """The sockets of engines that served beside the active one, for a daemon after us."""
        return frozenset(mark.with_suffix(".sock") for mark in self.engines.glob("*" + _BESIDE))

    def note_resting(self, model_name: str, engine_kind: str) -> None:
        """Records the resting model. Call it before the endpoint leads to the wake proxy."""
        (self.path / "resting").write_text(f"{engine_kind}\n{model_name}")

    @property
    def resting(self) -> tuple[str, str] | None:
        """Returns the model that an earlier daemon let rest, and its kind of engine."""
        if self.active not in {self.wake_proxy, self.path / _WAKE_PROXY_BEFORE}:
            return None
        with contextlib.suppress(OSError, ValueError):
            engine_kind, model_name = (self.path / "resting").read_text().split("\n")
            return model_name, engine_kind
        return None

    def _clean(self) -> None:
        if self.has_engines:
            return
        self.endpoint.unlink(missing_ok=True)
        (self.path / "resting").unlink(missing_ok=True)
        for folder in (self.engines, self.scratch):
            shutil.rmtree(folder, ignore_errors=True)


def remove_empty(path: Path) -> None:
    """Removes a folder, unless it has other contents or belongs to the service manager."""
    with contextlib.suppress(OSError):
        path.rmdir()


def _locked(folder: Path) -> TextIO:
    """Opens and locks the lock file of a folder. Raises Busy if another daemon holds it."""
    while True:
        lock = (folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            hint = "see flash status, or give this daemon another --runtime-dir"
            raise Busy(f"another flashd uses {folder}", hint=hint) from None
        if os.fstat(lock.fileno()).st_nlink:
            return lock
        lock.close()  # its holder has just removed it and ended


class EndpointLink:
    """The one address of the active model, and the engines' own; `shared_mode` says who may connect to an engine that
    others may ask."""

    def __init__(self, path: Path, shared_mode: int = _OURS_ALONE) -> None:
        self._path = path
        self._shared_mode = shared_mode

    def point_to(self, socket_path: Path | None, *, is_private: bool = False) -> None:
        if socket_path is None:
            self._path.unlink(missing_ok=True)
            return
        self._share(socket_path, is_private=is_private)
        partial = self._path.with_name(self._path.name + ".partial")
        partial.unlink(missing_ok=True)
        partial.symlink_to(socket_path)
        partial.rename(self._path)

    def open(self, socket_path: Path, *, is_private: bool) -> None:
        """Lets clients connect to an engine that serves beside the active one, now and when a daemon after us runs."""
        self._share(socket_path, is_private=is_private)
        socket_path.with_suffix(_BESIDE).touch()

    def shut(self, socket_path: Path) -> None:
        """Notes that it does not serve beside the active one any more. Raises nothing."""
        with contextlib.suppress(OSError):
            socket_path.with_suffix(_BESIDE).unlink(missing_ok=True)

    def _share(self, socket_path: Path, *, is_private: bool) -> None:
        if not is_private and self._shared_mode != _OURS_ALONE:
            socket_path.chmod(self._shared_mode)


class RestingEndpoint:
    """Directs the endpoint to the wake proxy while a model rests."""

    def __init__(self, runtime: RuntimeFolder, link: EndpointLink, events: Events) -> None:
        self._runtime = runtime
        self._link = link
        events.rest_began.subscribe(self._begin)
        events.rest_ended.subscribe(lambda: link.point_to(None))

    def _begin(self, target: Target) -> None:
        self._runtime.note_resting(target.model_name, target.engine_kind)
        self._link.point_to(self._runtime.wake_proxy)


async def connected(endpoint: Path) -> socket.socket:
    """Opens a connection to the active engine, to pass it on. Raises Unavailable if no engine listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        await asyncio.wait_for(asyncio.get_running_loop().sock_connect(connection, str(endpoint)), _CONNECT_S)
    except OSError as error:  # includes TimeoutError
        connection.close()
        hint = "no model is active: flash swap MODEL"
        raise Unavailable(f"nothing answers at {endpoint}: {error.strerror or error}", hint=hint) from None
    connection.setblocking(True)  # the flag belongs to the open file, and so is passed on
    return connection


def make_private(path: Path) -> None:
    """Creates a private folder, or checks that it is ours, because in /tmp another user may have created it first."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        hint = "remove it, or choose another one with --runtime-dir"
        raise NotAuthorized(f"{path} is not a folder of user {os.getuid()}", hint=hint)
