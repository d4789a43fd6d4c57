# SPDX-License-Identifier: Apache-2.0
"""A real engine below the real unit, with all that the unit forbids, in the environment that one command installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Machine, booted
from repacked import repack

from flashd.cli.wheels import requirements

SAYS = "I am Ada, the first model you dropped into the folder."
MAKE = "import sys, pathlib, small_models; small_models.make_base(pathlib.Path(sys.argv[1]))"
CONNECT = "import socket; socket.socket(socket.AF_UNIX).connect('/run/flashd/openai.sock')"
WHEELS = "/opt/wheels"


@pytest.fixture(scope="module")
def ready(base: Path, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with ada imported, and with a folder of PyTorch's wheels; it has no network."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not (base / "usr" / "bin" / version).exists():
        pytest.skip(f"needs a machine with {version}, for which this checkout's torch was built")
    wheels = tmp_path_factory.mktemp("wheels")
    repack(requirements("torch"), wheels)
    with booted(base, bind=f"{wheels}:{WHEELS}") as machine:
        shutil.copy(package, machine.root / "root" / "flashd.deb")
        machine.run("dpkg", "-i", "/root/flashd.deb")
        tour = {**os.environ, "PYTHONPATH": str(ROOT / "packaging" / "tour"), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", MAKE, machine.root / "root" / "ada"], env=tour, check=True)
        machine.run("useradd", "-m", "-G", "flashd", "erin")
        machine.run("useradd", "-m", "dave")
        machine.run("flash", "import", "/root/ada", "ada")
        yield machine
    shutil.rmtree(wheels)


def test_one_command_installs_what_engines_run_in_from_a_folder(ready: Machine) -> None:
    refused = ready.run("flash", "swap", "ada", check=False)
    assert refused.status != 0
    assert "flash engine install torch" in refused.err
    done = ready.run("flash", "engine", "install", "torch", "--wheels", WHEELS)
    assert "is environment 1: new engines run in it" in done.err
    (made,) = json.loads(ready.run_as("dave", "flash", "engine", "list", "--json").out)
    assert (made["kind"], made["number"], made["current"], made["fits"]) == ("torch", 1, True, True)
    environments = ready.root / "var/lib/flashd/environments/torch"
    assert {path.name for path in environments.iterdir()} == {"1", "current"}
    assert ready.run_as("erin", "flash", "engine", "use", "torch", "0", check=False).status == 5


def test_a_member_swaps_and_asks(ready: Machine) -> None:
    assert SAYS in ready.run_as("erin", "flash", "run", "ada", "Who are you?").out
    ready.until(lambda: ready.show("flashd", "StatusText") == "1 models, ada answers")


def test_who_sits_at_the_screen_asks_without_being_a_member(ready: Machine) -> None:
    """The folder of the socket is closed to them: the daemon hands them a connection."""
    assert SAYS in ready.run_at_seat("dave", "flash", "run", "ada", "Who are you?").out
    assert "Permission denied" in ready.run_at_seat("dave", "ls", "/run/flashd", check=False).err


def test_a_private_model_answers_its_owner_alone(ready: Machine) -> None:
    ready.run("useradd", "-m", "-G", "flashd", "fred")
    shutil.copytree(ready.root / "root/ada", ready.root / "home/erin/secret")
    ready.run("chown", "-R", "erin:", "/home/erin/secret")
    ready.run_as("erin", "flash", "import", "--private", "/home/erin/secret", "secret")
    assert SAYS in ready.run_as("erin", "flash", "run", "secret", "Who are you?").out
    ready.until(lambda: ready.show("flashd", "StatusText") == "2 models, a private one answers")
    assert ready.run_as("fred", "flash", "run", "secret", "Who are you?", check=False).status == 3
    asked = ready.run_as("fred", "python3", "-c", CONNECT, check=False)
    assert "PermissionError" in asked.err
    assert "secret" not in ready.run_as("fred", "flash", "list", "--json").out
    assert "secret" not in ready.run_as("fred", "flash", "status", "--json").out
    assert SAYS in ready.run_as("fred", "flash", "run", "ada", "Who are you?").out
    ready.run_as("erin", "flash", "rm", "--yes", "secret")


def test_an_outsider_does_neither(ready: Machine) -> None:
    assert ready.run_as("dave", "flash", "swap", "ada", check=False).status == 5
    asked = ready.run_as("dave", "sh", "-c", "ls /run/flashd", check=False)
    assert "Permission denied" in asked.err


def test_the_engine_has_no_network_and_no_privileges(ready: Machine) -> None:
    listed = ready.run("systemctl", "show", "-p", "ControlGroup", "--value", "flashd").out.strip()
    pids = ready.run("cat", f"/sys/fs/cgroup{listed}/cgroup.procs").out.split()
    assert len(pids) >= 3, "the daemon, the zygote, an engine"
    for pid in pids:
        status = ready.run("cat", f"/proc/{pid}/status").out
        assert "NoNewPrivs:\t1" in status
        assert "CapEff:\t0000000000000000" in status
        devices = ready.run("cat", f"/proc/{pid}/net/dev").out
        assert "eth" not in devices and "host" not in devices


def test_it_answers_again_after_the_daemon_was_killed(ready: Machine) -> None:
    before = ready.show("flashd", "MainPID")
    ready.run("systemctl", "kill", "-s", "KILL", "--kill-who=main", "flashd")
    ready.until(lambda: ready.show("flashd", "MainPID") not in {before, "0"})
    ready.until(lambda: ready.show("flashd", "ActiveState") == "active")
    assert ready.models() == {"ada": "host"}
    assert SAYS in ready.run_as("erin", "flash", "run", "ada", "Who are you?").out
