# SPDX-License-Identifier: Apache-2.0
"""The package on Ubuntu 24.04: built, installed and used there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Machine, booted, built, daemon_of, rooted

# Build dependencies; the machine has them too, so that one root serves both.
BUILD = ("build-essential", "debhelper", "python3-dev", "python3-venv")


def prepare() -> tuple[Path, Path]:
    """A root to boot, and the package that was built in it."""
    base = rooted("libglib2.0-bin", *BUILD, suite="noble")
    return base, daemon_of(built("noble", base))


@pytest.fixture(scope="module")
def ubuntu(tools: None) -> Iterator[Machine]:
    base, package = prepare()
    with booted(base) as machine:
        shutil.copy(package, machine.root / "root" / "flashd.deb")
        yield machine


def test_it_is_installed_started_and_used(ubuntu: Machine) -> None:
    assert 'VERSION_ID="24.04"' in ubuntu.run("cat", "/etc/os-release").out
    depends = ubuntu.run("dpkg-deb", "--field", "/root/flashd.deb", "Depends").out
    assert "python3 (>= 3.12), python3 (<< 3.13)" in depends
    ubuntu.run("sh", "-ec", "dpkg -i /root/flashd.deb; systemctl enable --now flashd")
    assert ubuntu.show("flashd", "ActiveState") == "active"
    assert ubuntu.show("flashd", "NRestarts") == "0"
    ubuntu.run("useradd", "-m", "-G", "flashd", "erin")
    ubuntu.run("useradd", "-m", "dave")
    ubuntu.make_source("/home/erin/one", owner="erin")
    ubuntu.run_as("erin", "flash", "import", "/home/erin/one", "one")
    ubuntu.run_as("erin", "flash", "load", "one")
    assert ubuntu.models() == {"one": "host"}
    assert ubuntu.run_as("dave", "flash", "load", "one", check=False).status == 5


def test_warm_models_outlive_a_restart_and_a_new_installation(ubuntu: Machine) -> None:
    for command in ("systemctl restart flashd", "dpkg -i /root/flashd.deb"):
        before = ubuntu.show("flashd", "MainPID")
        ubuntu.run("sh", "-ec", command)
        assert ubuntu.show("flashd", "MainPID") not in {before, "0"}
        assert ubuntu.models() == {"one": "host"}


def test_it_goes(ubuntu: Machine) -> None:
    ubuntu.run("dpkg", "--purge", "flashd")
    assert not (ubuntu.root / "usr/lib/flashd").exists()
    assert (ubuntu.root / "var/lib/flashd/store").exists(), "models are kept where nobody can be asked"
