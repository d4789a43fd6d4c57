# SPDX-License-Identifier: Apache-2.0
"""The Python of tests that imports torch once does what the interpreter that it stands for does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import imported

from flashd.engines.control import Channel, pair
from flashd.engines.messages import AskBuild


def run(python: str | Path, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([python, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr.strip().rpartition("\n")[2]


def test_status_and_words_are_the_interpreters_own(imported_torch: Path) -> None:
    _, merges, unpickles = imported.TORCH
    for arguments in (("-c", "print(7); raise SystemExit(3)"), ("-m", merges), ("-m", unpickles, "9", "{}")):
        assert run(imported_torch, *arguments) == run(sys.executable, *arguments)


def test_a_zygote_ends_as_its_program_does_and_the_other_way_round(imported_torch: Path, tmp_path: Path) -> None:
    for is_killed in (False, True):
        ours, theirs = pair()
        command = [imported_torch, "-m", imported.TORCH[0], str(theirs.fileno()), tmp_path]
        with theirs:
            program = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
        with ours, program:
            Channel(ours).send(AskBuild())
            assert b"torch" in ours.recv(4096)
            if is_killed:
                os.kill(program.pid, signal.SIGKILL)
                assert ours.recv(4096) == b"", "it has ended too"
            ours.close()
            assert program.wait() == (-signal.SIGKILL if is_killed else 0)
