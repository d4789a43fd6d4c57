# SPDX-License-Identifier: Apache-2.0
"""The example programs, as they are shipped: compiled, and run against a daemon with a model that says who it is."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import made_models
import pytest
from conftest import SAYS, Daemon, Remote, import_model

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "packaging" / "examples"


def needs(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def python(folder: Path) -> list[str | Path]:
    found = subprocess.run(["/usr/bin/python3", "-c", "import gi"], check=False, capture_output=True)
    if found.returncode:
        pytest.skip("needs python3-gi")
    return ["/usr/bin/python3", EXAMPLES / "swap_and_ask.py"]


def shell(folder: Path) -> list[str | Path]:
    needs("busctl", "curl")
    return [EXAMPLES / "swap-and-ask.sh"]


def c(folder: Path) -> list[str | Path]:
    needs("cc", "pkg-config")
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "libsystemd"], capture_output=True, text=True, check=False
    )
    if flags.returncode:
        pytest.skip("needs libsystemd-dev")
    program = folder / "swap_and_ask"
    source = EXAMPLES / "swap_and_ask.c"
    warnings = ("-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined")
    subprocess.run(["cc", *warnings, source, "-o", program, *flags.stdout.split()], check=True)
    return [program]


@pytest.fixture(scope="module")
def ada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    made_models.put(folder, "ada")
    return folder / "ada"


@pytest.mark.parametrize("example", [python, shell, c], ids=["python", "shell", "c"])
async def test_it_swaps_and_asks(
    example: Callable[[Path], list[str | Path]], remote: Remote, daemon: Daemon, ada: Path, tmp_path: Path
) -> None:
    command = example(tmp_path)
    await import_model(remote, ada, "ada")
    environment = {**os.environ, "FLASHD_BUS_ADDRESS": daemon.address}

    def run(model: str, question: str) -> subprocess.CompletedProcess[str]:
        called = [*command, model, question]
        return subprocess.run(called, env=environment, capture_output=True, text=True, check=False, timeout=100)

    answered = run("ada", "Who are you?")
    assert answered.returncode == 0, answered.stderr
    assert SAYS["ada"] in answered.stdout
    quoted = run("ada", 'Who is "Ada" \\ who?')
    assert quoted.returncode == 0, quoted.stderr
    refused = run("nobody", "?")
    assert refused.returncode != 0
    assert "nobody" in refused.stderr


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_the_shell_one_ends_where_there_is_no_bus(shell: str, tmp_path: Path) -> None:
    needs("busctl", "curl", shell)
    command = [shell, EXAMPLES / "swap-and-ask.sh", "ada", "Who are you?"]
    environment = {**os.environ, "FLASHD_BUS_ADDRESS": f"unix:path={tmp_path}/nowhere"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0 and "No such file" in done.stderr
