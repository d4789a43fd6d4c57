# SPDX-License-Identifier: Apache-2.0
"""The commands and programs of the documentation, run against a daemon as a reader would run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SAYS, Daemon, lasting_daemon
from waiting import until

import flashd

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "packaging" / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Needs something that tests lack: a GPU, the hub, vLLM, a service manager that restarts the daemon, root.
NOT_HERE = ("cuda:0", "client.pull(", "flash pull", "--engine vllm", "flash restart", "sudo ", "flash doctor")


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "console") for line in block.replace("\\\n", " ").splitlines()]
    found = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [command for command in found if not any(words in command for words in NOT_HERE)]


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    with lasting_daemon() as running:
        yield running


@pytest.fixture
def home(shared: Daemon, sources: Path, tmp_path: Path) -> Iterator[Path]:
    """A home with a fine-tune in it, and the daemon's models folder as ~/models."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "models").symlink_to(shared.models)
    shutil.copytree(sources / "ada", folder / "finetunes" / "my-model")
    yield folder
    with flashd.connect(shared.address) as client:
        for engine in client.engines():
            client.stop_engine(engine)
        for model in client.models():
            client.remove(model.name)
    for source in shared.models.iterdir():
        shutil.rmtree(source)


def run(command: str, daemon: Daemon, home: Path) -> str:
    """Runs a line of a shell, with the paths of this daemon in place of those of a machine; returns what it printed."""
    runtime = str(daemon.runtime / "run")
    here = command.replace("/run/user/1000/flashd", runtime).replace("--user", f"--address={daemon.address}")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(home), "PATH": path, "FLASHD_BUS_ADDRESS": daemon.address}
    done = subprocess.run(
        ["bash", "-c", here], env=environment, capture_output=True, text=True, check=False, timeout=120, cwd=home,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout.replace(runtime, "/run/user/1000/flashd")


def is_there(daemon: Daemon, name: str) -> bool:
    with flashd.connect(daemon.address) as client:
        return name in {model.name for model in client.models()}


def test_daily_use(shared: Daemon, home: Path) -> None:
    """The README's: a folder is dropped, listed, swapped to and asked."""
    (block,) = (block for block in blocks(ROOT / "README.md", "console") if "flash start" in block)
    printed = {}
    for line in block.splitlines():
        command = line.removeprefix("$ ")
        if not any(words in command for words in NOT_HERE):
            printed[command.split()[1]] = run(command, shared, home)
            if command.startswith("cp "):
                until(lambda: is_there(shared, "my-model"))
    assert "my-model" in printed["list"] and SAYS["ada"] in printed["run"]


def test_settings(daemon: Daemon, home: Path) -> None:
    done = [command for command in commands(DOCS / "configuration.md") if run(command, daemon, home) is not None]
    assert len(done) > 5 and "8GiB" in run("flash config models.Qwen/Qwen3-14B.kv_cache", daemon, home)


def test_requests_on_the_bus_and_on_the_socket(shared: Daemon, home: Path) -> None:
    for program in ("busctl", "curl"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    run("flash import ~/finetunes/my-model my-model", shared, home)
    swap, endpoint = commands(DOCS / "dbus.md")
    run(swap, shared, home)
    with flashd.connect(shared.address) as client:
        until(lambda: bool(client.status().active_model))
    assert run(endpoint, shared, home) in (DOCS / "dbus.md").read_text()
    (ask,) = commands(DOCS / "http.md")
    assert SAYS["ada"] in run(ask, shared, home)


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "python.md"], ids=lambda page: page.name)
def test_programs(page: Path, shared: Daemon, home: Path, sources: Path) -> None:
    shutil.copytree(sources / "bob", home / "data" / "finetunes" / "tuned")
    run("flash import ~/finetunes/my-model my-model", shared, home)
    programs = [block for block in blocks(page, "python") if not any(words in block for words in NOT_HERE)]
    assert programs
    for program in programs:
        file = home / "program.py"
        file.write_text(program.replace('"/data/', f'"{home}/data/'))
        printed = run(f"python {file}", shared, home)
        assert SAYS["ada"] in printed or "client.chat" not in program
