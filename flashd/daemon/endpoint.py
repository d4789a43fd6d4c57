# SPDX-License-Identifier: Apache-2.0
"""Where do sockets lie, and how does one address always lead to the active model?

    RUNTIME/openai.sock     a symbolic link to the active engine's socket, absent while no model is active
    RUNTIME/doorman.sock    where it leads while a model rests (flashd/daemon/doorman.py)
    RUNTIME/resting         which one that is, and in which kind of engine, for a daemon after us
    RUNTIME/engines/        the engines' own sockets
    RUNTIME/scratch/        private folders of engines that are our children
    RUNTIME/lock            held by the one daemon that owns this folder

connect(2) follows the link, so moving it by rename(2) sends every new connection to the new engine at once.

An engine's socket is ours alone until its model answers, and stays so if that is private: whoever may ask it gets a
connection from us (`connected`), as does who may not enter RUNTIME.
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
from types import TracebackType
from typing import Self

from flashd.errors import Busy, InvalidArgument, NotAuthorized, Unavailable

_OURS_ALONE = 0o600
_CONNECT_S = 5.0
MAX_SOCKET_PATH = 107  # sun_path, without its terminating null (unix(7))


class RuntimeFolder:
    """The folder of sockets, ours alone until `close`. What an earlier daemon left there is removed, unless engines of
    its answer there still (`has_engines`).

    With `for_group` the group of the process may connect to the active one too, if it may enter `path`.
    """

    def __init__(self, path: Path, *, for_group: bool = False, has_engines: bool = False) -> None:
        self.path = path
        longest = self.engines / "999999.sock"
        if len(os.fsencode(longest)) > MAX_SOCKET_PATH:
            hint = "give a shorter one with --runtime-dir"
            raise InvalidArgument(f"{path} is too long a folder for Unix sockets", hint=hint)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(path)
        self._lock = (path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            hint = "flash status shows it; give this one another --runtime-dir"
            raise Busy(f"another flashd uses {path}", hint=hint) from None
        self.has_engines = has_engines
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
    def doorman(self) -> Path:
        return self.path / "doorman.sock"

    def close(self) -> None:
        self._clean()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    @property
    def active(self) -> Path | None:
        """The socket that the endpoint leads to."""
        with contextlib.suppress(OSError):
            return self.endpoint.readlink()
        return None

    def note_resting(self, model_name: str, engine_kind: str) -> None:
        """To be called before the endpoint leads to the doorman."""
        (self.path / "resting").write_text(f"{engine_kind}\n{model_name}")

    @property
    def resting(self) -> tuple[str, str] | None:
        """The model that a daemon before us let rest, and its kind of engine."""
        if self.active != self.doorman:
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


class EndpointLink:
    """The one address of whichever model is active; those who may connect to shared ones are in `shared_mode`."""

    def __init__(self, path: Path, shared_mode: int = _OURS_ALONE) -> None:
        self._path = path
        self._shared_mode = shared_mode

    def point_to(self, socket_path: Path | None, *, is_private: bool = False) -> None:
        if socket_path is None:
            self._path.unlink(missing_ok=True)
            return
        if not is_private and self._shared_mode != _OURS_ALONE:
            socket_path.chmod(self._shared_mode)
        partial = self._path.with_name(self._path.name + ".partial")
        partial.unlink(missing_ok=True)
        partial.symlink_to(socket_path)
        partial.rename(self._path)


async def connected(endpoint: Path) -> socket.socket:
    """A connection to the active engine, to be handed on. Raises Unavailable if nobody listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        await asyncio.wait_for(asyncio.get_running_loop().sock_connect(connection, str(endpoint)), _CONNECT_S)
    except OSError as error:  # TimeoutError is one
        connection.close()
        hint = "no model is active: flash swap MODEL"
        raise Unavailable(f"nobody answers at {endpoint}: {error.strerror or error}", hint=hint) from None
    connection.setblocking(True)  # the flag goes with the descriptor
    return connection


def _check_private(path: Path) -> None:
    """In a folder like /tmp somebody else may have been there first."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        hint = "remove it, or give another one with --runtime-dir"
        raise NotAuthorized(f"{path} is not a folder of user {os.getuid()}", hint=hint)
