# SPDX-License-Identifier: Apache-2.0
"""Commands that a test run has started end with it, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import leash
import pytest
from processes import is_alive
from waiting import until

# A builder that has left its parent, its group and its session, and one that has not.
BUILDS = "setsid sh -c 'echo $$ > gone.pid; sleep 300' & (sleep 300 & echo $! > near.pid; wait)"
RUN = "import leash, sys; leash.run(['sh', '-c', sys.argv[1]])"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_builders_end_with_who_runs_them(tmp_path: Path, number: int) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, BUILDS], cwd=tmp_path, env={"PYTHONPATH": str(Path(leash.__file__).parent)},
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    files = [tmp_path / "gone.pid", tmp_path / "near.pid"]
    until(lambda: all(file.exists() and file.read_text() for file in files))
    pids = [int(file.read_text()) for file in files]
    assert all(map(is_alive, pids))
    run.send_signal(number)
    run.wait()
    until(lambda: not any(map(is_alive, pids)))


def test_a_command_is_run_as_subprocess_runs_it(tmp_path: Path) -> None:
    done = leash.run(["sh", "-c", "echo out; echo err >&2; pwd; exit 3"], cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"out\n{tmp_path}\n", "err\n")
