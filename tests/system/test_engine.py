# SPDX-License-Identifier: Apache-2.0
"""A real engine below the real unit, with all that the unit forbids. Its framework is this checkout's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Machine, booted

SAYS = "I am Ada, the first model you dropped into the folder."
MAKE = "import sys, pathlib, small_models; small_models.make_base(pathlib.Path(sys.argv[1]))"
CONNECT = "import socket; socket.socket(socket.AF_UNIX).connect('/run/flashd/openai.sock')"
FRAMEWORK, ENGINES = "/opt/framework", "/opt/engines"


@pytest.fixture(scope="module")
def ready(base: Path, package: Path) -> Iterator[Machine]:
    """A machine with an interpreter that has torch, and with ada imported."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not (base / "usr" / "bin" / version).exists():
        pytest.skip(f"needs a machine with {version}, for which this checkout's torch was built")
    with booted(base, bind=f"{sysconfig.get_path('platlib')}:{FRAMEWORK}") as machine:
        site = machine.root / ENGINES.lstrip("/") / "lib" / version / "site-packages"
        site.mkdir(parents=True)
        (site / "all.pth").write_text(f"/usr/lib/flashd/lib/{version}/site-packages\n{FRAMEWORK}\n")
        (site.parents[2] / "bin").mkdir()
        (site.parents[2] / "bin" / "python3").symlink_to(f"/usr/bin/{version}")
        (site.parents[2] / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")

        shutil.copy(package, machine.root / "root" / "flashd.deb")
        machine.run("dpkg", "-i", "/root/flashd.deb")
        (machine.root / "etc/flashd/flashd.toml").write_text(f'[engines.torch]\npython = "{ENGINES}/bin/python3"\n')
        tour = {**os.environ, "PYTHONPATH": str(ROOT / "packaging" / "tour"), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", MAKE, machine.root / "root" / "ada"], env=tour, check=True)
        machine.run("useradd", "-m", "-G", "flashd", "erin")
        machine.run("useradd", "-m", "dave")
        machine.run("flash", "import", "/root/ada", "ada")
        yield machine


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
