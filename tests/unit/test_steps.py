# SPDX-License-Identifier: Apache-2.0
"""Set-up scripts say what they do, show why something failed, and leave nothing half made (packaging/steps.sh)."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import until

PACKAGING = Path(__file__).parents[2] / "packaging"
HEAD = f"set -euo pipefail\n. {PACKAGING / 'steps.sh'}\n"
SCRIPTS = ("quickstart", "environment", "vllm-environment", "build-deb", "tray", "../tests/clients/environment")


def script(folder: Path, text: str) -> list[str]:
    (folder / "setup").write_text(HEAD + text)
    return ["bash", str(folder / "setup")]


def run(folder: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        script(folder, text), cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_as_many_steps_as_it_says(name: str) -> None:
    text = (PACKAGING / name).read_text()
    assert "steps.sh" in text
    said = [int(line.split()[-1]) for line in text.splitlines() if line.strip().startswith("steps ")]
    taken = sum(line.strip().startswith("step ") for line in text.splitlines())
    branches = {"environment": 1}.get(name, 0)  # of a step that is one of two
    assert max(said) == taken - branches


def test_steps_are_told_on_standard_error_and_programs_are_not_heard(tmp_path: Path) -> None:
    done = run(tmp_path, 'steps 2\nlog=log\nstep one\nquietly echo noise\nstep two\ndone_in "all is there"\n')
    assert done.returncode == 0 and done.stdout == ""
    assert done.stderr.splitlines()[:2] == ["setup: 1/2 one", "setup: 2/2 two"]
    assert done.stderr.splitlines()[2].startswith("setup: all is there (")
    assert (tmp_path / "log").read_text() == "noise\n"


def test_what_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    done = run(tmp_path, "steps 1\nlog=log\nstep one\nlogged 'it failed' sh -c 'echo reason; exit 7'\necho never\n")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[1:] == ["reason", "flashd: it failed", "        the whole log is in log"]


def test_a_long_step_shows_what_it_is_at(tmp_path: Path) -> None:
    """The command waits until its progress has been shown, which is what `told` says."""
    text = (
        "steps 1\nlog=log\nstep one\n"
        "quietly sh -c 'echo; echo \"  Downloading torch (190 MB)\"; until [ -e told ]; do sleep 0.02; done'\n"
    )
    command = script(tmp_path, text)
    environment = {**os.environ, "FLASHD_PROGRESS_S": "0.1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "setup: 1/1 one\n"
        while "Downloading" not in (line := process.stderr.readline()):
            assert line
        (tmp_path / "told").touch()
    assert re.fullmatch(r"setup: 1/1 \d+ s: Downloading torch \(190 MB\)\n", line)
    assert process.returncode == 0


def test_of_two_scripts_that_make_the_same_one_waits(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = script(tmp_path / "other", "alone lock\ntouch held\nuntil [ -e go ]; do sleep 0.02; done\ntouch made\n")
    second = script(tmp_path, "alone lock\n[ -e made ] && echo made\n")
    with subprocess.Popen(first, cwd=tmp_path) as making:
        until((tmp_path / "held").exists)
        pipe = subprocess.PIPE
        with subprocess.Popen(second, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as waiting:
            assert waiting.stdout is not None and waiting.stderr is not None
            assert waiting.stderr.readline() == "setup: waits for another one, which is making it\n"
            (tmp_path / "go").touch()
            assert waiting.stdout.read() == "made\n"
    assert making.returncode == 0


def test_progress_is_one_changing_line_on_a_terminal(tmp_path: Path) -> None:
    text = "steps 1\nlog=log\nstep one\nquietly sh -c 'echo noise; until [ -e told ]; do sleep 0.02; done'\n"
    ours, theirs = pty.openpty()
    with subprocess.Popen(script(tmp_path, text), cwd=tmp_path, stderr=theirs) as process:
        os.close(theirs)
        written = b""
        while b"noise" not in written:
            written += os.read(ours, 4096)
        (tmp_path / "told").touch()
    os.close(ours)
    assert process.returncode == 0
    assert written.startswith(b"setup: 1/1 one\r\n\r\x1b[K")
    assert b"\n" not in written.partition(b"\x1b[K")[2]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_that_is_ended_undoes_what_is_half_made(tmp_path: Path, end: signal.Signals) -> None:
    text = (
        "steps 1\nmkdir made\nundo() { rm -r made; }\nlog=made/log\nstep one\n"
        "quietly sh -c 'echo $$; exec sleep 1000'\n"
    )
    process = subprocess.Popen(script(tmp_path, text), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "made" / "log"
    until(lambda: log.exists() and log.read_text().endswith("\n"))
    sleeper = int(log.read_text())
    process.send_signal(end)
    process.communicate(timeout=60)
    assert process.returncode == 128 + end and not (tmp_path / "made").exists()
    until(lambda: not Path(f"/proc/{sleeper}").exists())


@pytest.mark.parametrize("is_told", [False, True])
def test_uv_installs_where_pip_was_told_nothing(tmp_path: Path, is_told: bool) -> None:
    """The programs here only write down how they are called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("uv", "python"):
        (programs / name).write_text(
            f'#!/bin/sh\n[ "$3" = config ] && {{ cat ../told; exit; }}\necho {name} "$@" >> calls\n'
        )
        (programs / name).chmod(0o755)
    (tmp_path / "told").touch()
    (tmp_path / "work").mkdir()
    if is_told:
        (tmp_path / "told").write_text("global.index-url='https://example.org/simple'\n")
    path = f"{programs}:{os.environ['PATH']}"
    done = run(tmp_path, "cd work\nsteps 1\nlog=log\nstep one\ninstall_into python --editable .\n", PATH=path)
    assert done.returncode == 0, done.stderr
    (called,) = (tmp_path / "work" / "calls").read_text().splitlines()
    by_pip = "python -m pip install --progress-bar off --disable-pip-version-check --editable ."
    assert called == (by_pip if is_told else "uv pip install --python python --editable .")


def test_the_interpreter_of_the_tests_finds_its_environment_made() -> None:
    """A second run takes no time: everything is there already."""
    if not (PACKAGING.parent / ".venv").samefile(Path(sys.prefix)):
        pytest.skip("these tests run elsewhere than in .venv")
    if not list((PACKAGING.parent / ".venv").glob("flashd-*.stamp")):
        pytest.skip(".venv was not made by packaging/environment")
    done = subprocess.run([PACKAGING / "environment", "test"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "" and done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--kep"], 2, "unrecognized arguments: --kep"),
        (["nowhere"], 2, "nowhere is no model folder: No such file or directory"),
        (["empty"], 2, "empty holds no weights"),
        (["--help"], 0, "MODEL_FOLDER"),
    ],
)
def test_the_quick_start_checks_its_arguments_before_it_sets_anything_up(
    tmp_path: Path, arguments: list[str], status: int, said: str
) -> None:
    (tmp_path / "tour").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("quickstart", "steps.sh", "tour/arguments.py"):
        shutil.copy2(PACKAGING / name, tmp_path / name)
    (tmp_path / "environment").write_text("#!/bin/sh\necho sets up >&2; exit 7\n")
    (tmp_path / "environment").chmod(0o755)
    done = subprocess.run(
        [tmp_path / "quickstart", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == status
    assert said in done.stdout + done.stderr and "sets up" not in done.stderr
