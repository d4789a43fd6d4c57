# SPDX-License-Identifier: Apache-2.0
"""Runs torch on untrusted bytes in a separate process, which restricts itself.

The daemon does not import torch. The process gets only open descriptors, and ends with us, when cancelled, or at its
limits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashd.errors import Cancelled, StoreFull, Unavailable
from flashd.units import GiB

MAX_ANSWER_BYTES = 256 << 20
# torch alone maps 1 to 2 GB of address space, and its CUDA builds ten times that; of private memory it wants 0.25 GB.
BASE_ADDRESS_SPACE_BYTES = 32 * GiB
BASE_MEMORY_BYTES = 2 * GiB
BASE_CPU_S = 120
_POLL_S = 0.05
_LAST_WORDS_BYTES = 4096
_TORCH_HINT = "install flashd's torch extra, or set engines.torch.python to an interpreter that has it"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of the process: its status, its output, and the end of its error output."""

    status: int
    answer: bytes
    complaint: str

    @property
    def reason(self) -> str:
        """Explains the failure in one line. torch quotes files, so this text is untrusted."""
        if self.status < 0:
            return (
                f"the converter was ended by signal {-self.status}, because of its limits on time and memory or a bug"
            )
        last = self.complaint.strip().splitlines()[-1:] or [f"exit status {self.status}"]
        return "".join(c for c in last[0] if c.isprintable())[:500]


def run(
    python: str,
    module: str,
    arguments: Sequence[str],
    fds: Sequence[int],
    *,
    what: str,
    scratch: Path,
    cancelled: Callable[[], bool],
    threads: int = 1,
    on_tick: Callable[[], None] = lambda: None,
) -> Outcome:
    """Runs a module of ours with these descriptors, to its end; calls `on_tick` twenty times a second while it works.

    Raises Unavailable, saying that `what` needs torch, where `python` has none; StoreFull or Cancelled.
    """
    with tempfile.TemporaryFile(dir=scratch) as answer, tempfile.TemporaryFile(dir=scratch) as complaints:
        try:
            child = subprocess.Popen(
                [python, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=answer,
                stderr=complaints,
                pass_fds=fds,
                env={"OMP_NUM_THREADS": str(threads)},  # every thread of torch counts against its memory
            )
        except OSError as error:
            raise Unavailable(f"cannot run {python}: {error.strerror}", hint=_TORCH_HINT) from None
        try:
            _await(child, cancelled, on_tick)
        finally:
            child.kill()
            child.wait()
        last_words = _tail(complaints.fileno(), _LAST_WORDS_BYTES).decode(errors="replace")
        outcome = Outcome(child.returncode, _tail(answer.fileno(), MAX_ANSWER_BYTES), last_words)
    for needed in ("torch", "flashd"):
        if outcome.status and f"No module named '{needed}'" in outcome.complaint:
            raise Unavailable(f"{what}, but {python} has no {needed}", hint=_TORCH_HINT)
    if outcome.status in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        hint = "free some space, or remove a model"
        raise StoreFull(f"{what}, but there is no space to unpack it: {os.strerror(outcome.status)}", hint=hint)
    return outcome


def _await(child: subprocess.Popen[bytes], cancelled: Callable[[], bool], on_tick: Callable[[], None]) -> None:
    worked = ""
    while True:
        try:
            child.wait(_POLL_S)
            return
        except subprocess.TimeoutExpired:
            if (works := _processor_time(child.pid)) != worked:
                worked = works
                on_tick()
            if cancelled():
                raise Cancelled("the conversion was cancelled") from None


def _processor_time(pid: int) -> str:
    """Returns the CPU time of a process (proc_pid_stat(5), utime and stime). As long as it grows, it does not hang."""
    with contextlib.suppress(OSError):
        return " ".join(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
    return ""


def _tail(fd: int, limit_bytes: int) -> bytes:
    size_bytes = os.fstat(fd).st_size
    return os.pread(fd, min(size_bytes, limit_bytes), max(0, size_bytes - limit_bytes))
