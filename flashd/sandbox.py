# SPDX-License-Identifier: Apache-2.0
"""How does a process that handles untrusted input give up what it does not need, for good?

No new privileges, no capabilities, no network where the kernel lets us leave it, no writing to the file system where it
has Landlock, and hard resource limits. Nothing here needs root, and each step that a kernel lacks is reported rather
than assumed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
from collections.abc import Sequence
from dataclasses import dataclass

# prctl(2), capabilities(7), unshare(2), landlock(7): numbers that the kernel promises to keep
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_NEWNET = 0x40000000
_CLONE_NEWUSER = 0x10000000
_SYS_LANDLOCK_CREATE_RULESET = 444  # the same on every architecture
_SYS_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
# Execute, write a file, and every kind of making and removing; reading stays allowed.
_LANDLOCK_ALL_BUT_READING = 0b1_1111_1111_0011


@dataclass(frozen=True, slots=True)
class Limits:
    """None leaves a limit as it is. Bytes and seconds."""

    address_space_bytes: int | None = None
    cpu_s: int | None = None
    file_bytes: int | None = None
    open_files: int | None = None


def restrict(limits: Limits = Limits(), *, network: bool = False, writes: bool = False) -> Sequence[str]:
    """Restricts this process and all it will start. Returns what this kernel does not offer, for the log.

    `network=False` leaves the machine's network; `writes=False` forbids changing the file system by path (open
    descriptors keep working). Call it before starting threads: Linux restricts threads one by one.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    missing = []
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for kind, value in (
        (resource.RLIMIT_AS, limits.address_space_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
    ):
        if value is not None:
            _lower(kind, value)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    if not network and libc.unshare(_CLONE_NEWNET) != 0 and libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        missing.append("network namespaces")
    _drop_capabilities(libc)
    if not writes and not _forbid_writes(libc):
        missing.append("Landlock")
    return missing


def end_with_parent(signal_number: int) -> None:
    """The kernel sends this process a signal when its parent's thread ends (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)


def _lower(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (bound, bound))


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Root without capabilities owns its files and is otherwise an ordinary user; for others this changes nothing."""
    for capability in range(64):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    if libc.capset(header, bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _forbid_writes(libc: ctypes.CDLL) -> bool:
    syscall = libc.syscall
    if syscall(_SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION) < 1:
        return False
    attributes = struct.pack("=Q", _LANDLOCK_ALL_BUT_READING)
    ruleset = syscall(_SYS_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    try:
        return bool(syscall(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        with contextlib.suppress(OSError):
            os.close(ruleset)
