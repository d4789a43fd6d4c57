# SPDX-License-Identifier: Apache-2.0
"""The sandbox, in which a process that handles untrusted input permanently gives up unnecessary privileges.

There are no new privileges, no capabilities, no network if the kernel permits leaving it, no writes to the file system
if it has Landlock, no sockets and no programs if it has seccomp filters, and there are hard resource limits. Nothing
here requires root, and steps that the kernel does not support are reported.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Sequence
from dataclasses import dataclass

# prctl(2), capabilities(7), unshare(2), landlock(7): stable numbers of the kernel's interface
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_NEWNET = 0x40000000
_CLONE_NEWUSER = 0x10000000
_SYS_LANDLOCK_CREATE_RULESET = 444  # the same on every architecture
_SYS_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
# Executing, writing files, and all kinds of creation and removal; reading stays permitted. Later versions of Landlock
# can also forbid moving between folders (2), truncating (3) and ioctls of devices (5).
_LANDLOCK_ALL_BUT_READING = 0b1_1111_1111_0011
_LANDLOCK_LATER = {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}

# seccomp(2), bpf_common.h, audit.h
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1
_SECCOMP_RET_ALLOW = 0x7FFF0000
_SECCOMP_RET_ERRNO = 0x00050000
_BPF_LOAD_WORD, _BPF_JUMP_EQUAL, _BPF_JUMP_AT_LEAST, _BPF_RETURN = 0x20, 0x15, 0x35, 0x06
_X32_SYSCALLS = 0x40000000  # the second set of numbers that x86-64 has
# Sockets, programs, other processes, and ways around a filter, such as io_uring, which can open sockets too.
_FORBIDDEN = {
    "x86_64": (0xC000003E, 317, {
        "socket": 41, "connect": 42, "socketpair": 53, "execve": 59, "kill": 62, "ptrace": 101, "keyctl": 250,
        "process_vm_readv": 310, "process_vm_writev": 311, "bpf": 321, "execveat": 322, "pidfd_send_signal": 424,
        "io_uring_setup": 425, "pidfd_getfd": 438,
    }),
    "aarch64": (0xC00000B7, 277, {
        "socket": 198, "connect": 203, "socketpair": 199, "execve": 221, "kill": 129, "ptrace": 117, "keyctl": 219,
        "process_vm_readv": 270, "process_vm_writev": 271, "bpf": 280, "execveat": 281, "pidfd_send_signal": 424,
        "io_uring_setup": 425, "pidfd_getfd": 438,
    }),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits in bytes and seconds. None leaves a limit as it is."""

    address_space_bytes: int | None = None
    memory_bytes: int | None = None  # private and writable memory, which is what a process really uses
    cpu_s: int | None = None
    file_bytes: int | None = None
    open_files: int | None = None


def restrict(
    limits: Limits = Limits(), *, network: bool = False, writes: bool = False, sockets: bool = True
) -> Sequence[str]:
    """Restricts this process and its children. Returns the measures that this kernel does not support, for the log.

    `network=False` leaves the machine's network; `writes=False` forbids changing the file system by path and running
    programs (open descriptors keep working); `sockets=False` forbids making sockets, running programs and touching
    other processes: sockets in the file system are reachable from every network namespace. Call it before starting
    threads: Linux restricts threads one by one.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    missing = []
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for kind, value in (
        (resource.RLIMIT_AS, limits.address_space_bytes),
        (resource.RLIMIT_DATA, limits.memory_bytes),
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
    if not sockets and not _forbid_syscalls(libc):
        missing.append("seccomp")
    return missing


def end_with_parent(signal_number: int) -> None:
    """Has the kernel send this process a signal when its parent's thread ends (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)


def _lower(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (bound, bound))


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Drops all capabilities, which makes root an ordinary user that owns its files. No effect for other users."""
    for capability in range(64):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    if libc.capset(header, bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _forbid_writes(libc: ctypes.CDLL) -> bool:
    syscall = libc.syscall
    version = syscall(_SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION)
    if version < 1:
        return False
    rights = _LANDLOCK_ALL_BUT_READING | sum(right for since, right in _LANDLOCK_LATER.items() if since <= version)
    attributes = struct.pack("=Q", rights)
    ruleset = syscall(_SYS_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    try:
        return bool(syscall(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        with contextlib.suppress(OSError):
            os.close(ruleset)


def _forbid_syscalls(libc: ctypes.CDLL) -> bool:
    """Installs a seccomp filter for all threads, with which forbidden calls fail with EPERM. False if unsupported."""
    if platform.machine() not in _FORBIDDEN:
        return False
    architecture, seccomp, forbidden = _FORBIDDEN[platform.machine()]
    refuse = (_BPF_RETURN, 0, 0, _SECCOMP_RET_ERRNO | errno.EPERM)
    numbers = sorted(forbidden.values())
    # struct seccomp_data: int nr; __u32 arch. Jumps count the instructions they skip.
    program = [
        (_BPF_LOAD_WORD, 0, 0, 4),
        (_BPF_JUMP_EQUAL, 1, 0, architecture),
        refuse,
        (_BPF_LOAD_WORD, 0, 0, 0),
        (_BPF_JUMP_AT_LEAST, len(numbers) + 1, 0, _X32_SYSCALLS),
        *((_BPF_JUMP_EQUAL, len(numbers) - index, 0, number) for index, number in enumerate(numbers)),
        (_BPF_RETURN, 0, 0, _SECCOMP_RET_ALLOW),
        refuse,
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    filter_program = struct.pack("@HP", len(program), ctypes.addressof(code))
    result = libc.syscall(seccomp, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, filter_program)
    return bool(result == 0)
