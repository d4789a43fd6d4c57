# SPDX-License-Identifier: Apache-2.0
"""Finds the network addresses at which a process and its children listen, and ports at which nobody does."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

_ENDED = (FileNotFoundError, ProcessLookupError)  # the latter if it ends between opening and reading
_WAITING = {"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"}  # proc_net(5): listening; bound and not connected


def family(pid: int) -> Iterator[int]:
    """The process, its children, theirs, ..."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(*_ENDED):
            for child in children.read_text().split():
                yield from family(int(child))


def addresses(pid: int) -> set[str]:
    """Of all of them, by `ip:port`."""
    mine = {inode for member in family(pid) for inode in _sockets(member)}
    found = set()
    for table, waiting in _WAITING.items():
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[column] for column in (1, 3, 9))
            if state == waiting and inode in mine:
                ip, port = local.split(":")
                found.add(f"{_ip(ip)}:{int(port, 16)}")
    return found


def _sockets(pid: int) -> Iterator[str]:
    with contextlib.suppress(*_ENDED):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(*_ENDED):
                if (target := os.readlink(fd)).startswith("socket:["):
                    yield target.removeprefix("socket:[").removesuffix("]")


def _ip(written: str) -> str:
    """The kernel writes an address as 32-bit numbers of its own byte order."""
    raw = bytes.fromhex(written)
    words = [raw[start : start + 4] for start in range(0, len(raw), 4)]
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    return str(ipaddress.ip_address(socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)))


def free_port() -> int:
    """A port of this machine at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
