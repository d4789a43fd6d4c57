# SPDX-License-Identifier: Apache-2.0
"""The manual pages cover all programs, settings and interfaces, and troff has no warnings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer.main

from flashd.cli.app import app
from flashd.config import loading
from flashd.dbus import wire

REFERENCE = Path(__file__).parents[2] / "packaging" / "reference"
PAGES = {"flash.1", "flashd.8", "flashd-gateway.8", "flashd-inbox.1", "flashd.toml.5", "org.flashd1.5"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, REFERENCE, "man", folder], check=True)
    return folder


def read(page: Path) -> str:
    return page.read_text().replace("\\-", "-")


def test_these_are_the_pages(pages: Path) -> None:
    assert {page.name for page in pages.iterdir()} == PAGES


@pytest.mark.parametrize("name", sorted(PAGES))
def test_troff_has_nothing_to_say(pages: Path, name: str) -> None:
    if shutil.which("man") is None or shutil.which("groff") is None:
        pytest.skip("needs man-db and groff-base")
    command = ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", pages / name]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "MANROFFSEQ": "", "MANWIDTH": "80"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_every_command_and_option_is_there(pages: Path) -> None:
    page = read(pages / "flash.1")
    command = typer.main.get_command(app)
    assert {"run", "swap", "list", "import"} <= set(command.commands)  # type: ignore[attr-defined]
    of_engine = {f"engine {name}": inner for name, inner in command.commands["engine"].commands.items()}  # type: ignore[attr-defined]
    for name, inner in {**command.commands, **of_engine}.items():  # type: ignore[attr-defined]
        assert inner.hidden or f".SS flash {name} " in page, name
        for option in (option for param in inner.params if not param.hidden for option in param.opts):
            assert not option.startswith("--") or option in page, f"{name} {option}"


def test_every_setting_is_there_with_its_meaning(pages: Path) -> None:
    page = read(pages / "flashd.toml.5")
    for setting in loading.settings():
        assert f"\\fB{setting.key}\\fR" in page
        assert setting.doc.partition(" Default: ")[0].rstrip(".") in page


def test_every_member_is_there_with_its_meaning(pages: Path) -> None:
    page = read(pages / "org.flashd1.5")
    for interface in wire.INTERFACES:
        for member in ElementTree.fromstring(wire.interface_xml(interface)).iter():
            if member.tag in {"method", "signal", "property"}:
                (docs,) = (a.get("value", "") for a in member.findall("annotation"))
                assert str(member.get("name")) in page
                assert docs.replace("\\", "\\e") in page
