# SPDX-License-Identifier: Apache-2.0
"""What stands in more than one place says the same in each."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from flashd import config

ROOT = Path(__file__).parents[2]
DEBIAN = ROOT / "packaging" / "debian"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_package_has_the_version_of_the_project() -> None:
    found = re.match(r"flashd \(([^)]+)\)", (DEBIAN / "changelog").read_text())
    assert found is not None
    assert found[1] == PROJECT["version"]


def test_every_program_is_packed() -> None:
    rules = (DEBIAN / "rules").read_text()
    programs = re.search(r"for program in ([^;]+);", rules)
    assert programs is not None
    # The tray's has a launcher of its own: GTK is the system's.
    of_the_tray = set(re.findall(r"}/usr/bin/([\w-]+)\"", (ROOT / "packaging" / "desktop" / "install").read_text()))
    assert of_the_tray == {"flashd-tray"}
    assert set(programs[1].split()) | of_the_tray == set(PROJECT["scripts"])


def test_the_unit_has_the_folders_that_the_daemon_uses() -> None:
    paths = config.default_paths(config.Scope.SYSTEM)
    unit = (ROOT / "systemd" / "flashd.service").read_text()
    assert f"StateDirectory={paths.state.relative_to('/var/lib')}\n" in unit
    assert f"RuntimeDirectory={paths.runtime.relative_to('/run')}\n" in unit
    assert f"ReadWritePaths=-{paths.drop_ins}\n" in unit
    folders = (ROOT / "systemd" / "tmpfiles.conf").read_text()
    assert f"d {paths.models} " in folders
    assert f"d {paths.drop_ins} " in folders


def test_engines_are_asked_for_where_their_unit_listens() -> None:
    socket = (ROOT / "systemd" / "flashd-engine.socket").read_text()
    service = (ROOT / "systemd" / "flashd-engine@.service").read_text()
    assert f"ListenSequentialPacket={config.ENGINE_SOCKET}\n" in socket
    assert f"StateDirectory={config.ENGINE_STATE.relative_to('/var/lib')}\n" in service
    assert f"BindReadOnlyPaths=-{config.default_paths(config.Scope.SYSTEM).state}/environments\n" in service
    devices = re.findall(r"(?m)^DeviceAllow=.*$", service)
    assert devices == re.findall(r"(?m)^DeviceAllow=.*$", (ROOT / "systemd" / "flashd.service").read_text())


def test_the_configuration_that_is_shipped_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "packaging" / "flashd.toml").read_text()
    paths = config.default_paths(config.Scope.SYSTEM)
    given = tmp_path / "flashd.toml"
    given.write_text(text)
    changed = config.Paths(given, paths.state, paths.runtime, paths.models)
    assert config.load(changed) == config.load(config.Paths(tmp_path / "none", *_rest(paths)))
    # And so is what it shows as examples.
    given.write_text(re.sub(r"^# (?=\[|\w+ = )", "", text, flags=re.MULTILINE))
    assert config.load(changed) != config.load(config.Paths(tmp_path / "none", *_rest(paths)))


def _rest(paths: config.Paths) -> tuple[Path, Path, Path]:
    return paths.state, paths.runtime, paths.models


@pytest.mark.parametrize("script", ["packaging/examples/swap-and-ask.sh", "packaging/debian/flashd.postrm"])
def test_scripts_are_posix(script: str) -> None:
    shell = shutil.which("dash")
    if shell is None:
        pytest.skip("needs dash")
    subprocess.run([shell, "-n", ROOT / script], check=True)
