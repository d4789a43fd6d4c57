# SPDX-License-Identifier: Apache-2.0
"""Facts that are stated in several files agree."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flashd._version import __version__
from flashd.config import loading
from flashd.config.paths import ENGINE_SOCKET, ENGINE_STATE, Paths, Scope, default_paths

ROOT = Path(__file__).parents[2]
DEBIAN = ROOT / "packaging" / "debian"
METAINFO = ROOT / "packaging" / "desktop" / "org.flashd1.Tray.metainfo.xml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_what_is_released_has_the_version_of_the_code() -> None:
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    assert metadata.version("flashd") == __version__, "the environment is older: packaging/environment"
    found = re.match(r"flashd \(([^)]+)\)", (DEBIAN / "changelog").read_text())
    assert found is not None and found[1] == __version__
    assert f"\n## {__version__}\n" in (ROOT / "packaging" / "docs" / "changelog.md").read_text()
    newest = ElementTree.parse(METAINFO).find("releases/release")
    assert newest is not None and newest.get("version") == __version__


def test_every_program_is_packed() -> None:
    rules = (DEBIAN / "rules").read_text()
    programs = re.search(r"^programs = (.+)$", rules, re.MULTILINE)
    assert programs is not None
    # The tray's has a launcher of its own: GTK is the system's.
    of_the_tray = set(re.findall(r"}/usr/bin/([\w-]+)\"", (ROOT / "packaging" / "desktop" / "install").read_text()))
    assert of_the_tray == {"flashd-tray"}
    assert set(programs[1].split()) | of_the_tray == set(PROJECT["scripts"])


def test_the_unit_has_the_folders_that_the_daemon_uses() -> None:
    paths = default_paths(Scope.SYSTEM)
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
    assert f"ListenSequentialPacket={ENGINE_SOCKET}\n" in socket
    assert f"StateDirectory={ENGINE_STATE.relative_to('/var/lib')}\n" in service
    assert f"BindReadOnlyPaths=-{default_paths(Scope.SYSTEM).state}/environments\n" in service
    devices = re.findall(r"(?m)^DeviceAllow=.*$", service)
    assert devices == re.findall(r"(?m)^DeviceAllow=.*$", (ROOT / "systemd" / "flashd.service").read_text())


def test_the_configuration_that_is_shipped_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "packaging" / "flashd.toml").read_text()
    paths = default_paths(Scope.SYSTEM)
    given = tmp_path / "flashd.toml"
    given.write_text(text)
    changed = Paths(given, paths.state, paths.runtime, paths.models)
    assert loading.load(changed) == loading.load(Paths(tmp_path / "none", *_rest(paths)))
    # So are its examples.
    given.write_text(re.sub(r"^# (?=\[|\w+ = )", "", text, flags=re.MULTILINE))
    assert loading.load(changed) != loading.load(Paths(tmp_path / "none", *_rest(paths)))


def _rest(paths: Paths) -> tuple[Path, Path, Path]:
    return paths.state, paths.runtime, paths.models


@pytest.mark.parametrize("script", ["packaging/examples/swap-and-ask.sh", "packaging/debian/flashd.postrm"])
def test_scripts_are_posix(script: str) -> None:
    shell = shutil.which("dash")
    if shell is None:
        pytest.skip("needs dash")
    subprocess.run([shell, "-n", ROOT / script], check=True)
