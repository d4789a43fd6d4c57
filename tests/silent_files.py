# SPDX-License-Identifier: Apache-2.0
"""A file system whose server stops answering: a thread of the test speaks FUSE's protocol (linux/fuse.h).

It holds one folder of files. The operations that it leaves unanswered can be changed at any time; `answer` releases
those that wait. Closing it answers everything and unmounts. Tests that mount one are skipped without /dev/fuse or the
right to mount.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NoReturn, Self

import pytest

LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, INIT = 1, 2, 3, 14, 15, 18, 25, 26
OPENDIR, READDIR, RELEASEDIR, INTERRUPT, DESTROY, BATCH_FORGET = 27, 28, 29, 36, 38, 42
_UNANSWERED = {FORGET, INTERRUPT, BATCH_FORGET}  # by the protocol
_DIRECT_IO = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_DETACH = 2  # MNT_DETACH
_DEVICE = "/dev/fuse"
# Errors of opening or mounting where the machine, the container or the user may not use FUSE.
_NOT_HERE = {errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.EPERM, errno.EACCES}


def _cannot_be_mounted(error: OSError) -> NoReturn:
    """Skips the test if FUSE is not to be had here; any other error is the test's own."""
    if error.errno in _NOT_HERE:
        pytest.skip(f"needs {_DEVICE} and the right to mount: {error.strerror}")
    raise error


class SilentFiles:
    """Mounted on a folder. `silent` are the operations that get no answer, if they are those of the process `to`."""

    def __init__(self, folder: Path, files: Mapping[str, bytes]) -> None:
        self.folder = folder
        self._names = list(files)
        self._contents = list(files.values())
        self.silent: Collection[int] = ()
        self.to: int | None = None
        self._waiting: list[int] = []
        self.waits = threading.Event()  # set once a request was left unanswered
        self._lock = threading.Lock()
        folder.mkdir(exist_ok=True)
        try:
            self._device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            _cannot_be_mounted(error)
        options = f"fd={self._device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
        if _LIBC.mount(b"silent", os.fsencode(self.folder), b"fuse", 0, options.encode()) != 0:
            number = ctypes.get_errno()
            os.close(self._device)
            _cannot_be_mounted(OSError(number, os.strerror(number), _DEVICE))
        threading.Thread(target=self._serve, daemon=True).start()

    def answer(self) -> None:
        """Answers again, and fails what has waited."""
        with self._lock:
            self.silent = ()
            waiting, self._waiting = self._waiting, []
        for unique in waiting:
            self._reply(unique, number=errno.EIO)
        self.waits.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.answer()
        _LIBC.umount2(os.fsencode(self.folder), _DETACH)
        os.close(self._device)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._device, 1 << 20)
            except OSError:  # unmounted
                return
            _, operation, unique, node, _, _, thread = struct.unpack_from("<IIQQIII", request)
            is_meant = self.to is None or Path(f"/proc/{self.to}/task/{thread}").exists()
            with self._lock:
                is_silent = is_meant and operation in self.silent and operation not in _UNANSWERED
                if is_silent:
                    self._waiting.append(unique)
            if is_silent:
                self.waits.set()
            elif operation not in _UNANSWERED:
                self._act(operation, unique, node, request[40:])

    def _act(self, operation: int, unique: int, node: int, body: bytes) -> None:
        match operation:
            case 26:  # INIT
                self._reply(unique, struct.pack("<IIIIHHIIHHI28x", 7, 31, 65536, 0, 12, 10, 65536, 1, 0, 0, 0))
            case 1:  # LOOKUP
                name = body.rstrip(b"\0").decode()
                if name not in self._names:
                    self._reply(unique, number=errno.ENOENT)
                    return
                found = self._names.index(name) + 2
                self._reply(unique, struct.pack("<QQQQII", found, 0, 0, 0, 0, 0) + self._attributes(found))
            case 3:  # GETATTR
                self._reply(unique, struct.pack("<QII", 0, 0, 0) + self._attributes(node))
            case 14 | 27:  # OPEN, OPENDIR
                self._reply(unique, struct.pack("<QII", 1, _DIRECT_IO, 0))
            case 15:  # READ
                _, offset, size = struct.unpack_from("<QQI", body)
                self._reply(unique, self._contents[node - 2][offset : offset + size])
            case 28:  # READDIR
                _, offset, _ = struct.unpack_from("<QQI", body)
                self._reply(unique, b"".join(map(self._entry, range(offset, len(self._names)))))
            case 18 | 25 | 29:  # RELEASE, FLUSH, RELEASEDIR
                self._reply(unique)
            case _:
                self._reply(unique, number=errno.ENOSYS)

    def _entry(self, index: int) -> bytes:
        name = self._names[index].encode()
        entry = struct.pack("<QQII", index + 2, index + 1, len(name), 8) + name  # 8: DT_REG
        return entry + bytes(-len(entry) % 8)

    def _attributes(self, node: int) -> bytes:
        is_folder = node == 1
        size, mode = (0, 0o040755) if is_folder else (len(self._contents[node - 2]), 0o100644)
        times = (1, 1, 1, 0, 0, 0)
        return struct.pack("<QQQQQQIIIIIIIIII", node, size, -(-size // 512), *times, mode, 1, 0, 0, 0, 4096, 0)

    def _reply(self, unique: int, data: bytes = b"", *, number: int = 0) -> None:
        with contextlib.suppress(OSError):  # the caller is gone
            os.write(self._device, struct.pack("<IiQ", 16 + len(data), -number, unique) + data)
