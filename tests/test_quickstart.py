# SPDX-License-Identifier: Apache-2.0
"""The README's first command, run as a new user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from waiting import until

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(600)
def test_the_quick_start_shows_the_main_job_and_leaves_nothing_behind() -> None:
    before = {path.name for path in (ROOT / "build").glob("quickstart-*")}
    done = subprocess.run(
        [ROOT / "packaging" / "quickstart"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "I am Ada, the first model you dropped into the folder." in done.stdout
    assert "My name is Bob, a fine-tune of Ada with opinions of my own." in done.stdout
    assert "What it took" in done.stdout
    assert "temporary, and are removed" in done.stdout and "cp -r ~/Downloads/Qwen3-0.6B ~/models/\n" in done.stdout
    assert {path.name for path in (ROOT / "build").glob("quickstart-*")} == before


def left(mark: str) -> list[str]:
    """The command lines of what still runs for the quick start that has this in its environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_one_that_is_ended_leaves_nothing_and_shows_no_traceback(end: signal.Signals, tmp_path: Path) -> None:
    before = {path.name for path in (ROOT / "build").glob("quickstart-*")}
    mark = f"QUICKSTART_OF_A_TEST={os.getpid()}-{end.name}"
    process = subprocess.Popen(
        [ROOT / "packaging" / "quickstart", "--keep"],
        env={**os.environ, **dict([mark.split("=")]), "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    until(lambda: any("flashd.daemon.main" in line for line in left(mark)), 120)
    if end is signal.SIGINT:
        os.killpg(process.pid, end)  # as a terminal does
    else:
        process.send_signal(end)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + end and "Traceback" not in said, said
    until(lambda: left(mark) == [])
    assert {path.name for path in (ROOT / "build").glob("quickstart-*")} == before
    assert list(tmp_path.iterdir()) == []
