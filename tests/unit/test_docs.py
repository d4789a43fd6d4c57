# SPDX-License-Identifier: Apache-2.0
"""The documentation: its links lead somewhere, its commands and code are valid, its generated parts are up to date."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import flashtensors
import pytest
import typer.main

import flashd
from flashd.cli.app import app
from flashd.client.client import Client
from flashd.config import loading
from flashd.dbus import wire

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "packaging" / "docs"
SHIP = runpy.run_path(str(DOCS / "ship.py"))
FLASH = typer.main.get_command(app)
PAGES: list[Path] = [
    *SHIP["pages"](),
    *sorted((ROOT / ".github").rglob("*.md")),
    ROOT / "tests" / "campaigns" / "README.md",
]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
# Programs that run in a checkout, and those of other people that pages tell users to run.
OF_OTHERS = {
    *("git", "cd", "cp", "busctl", "curl", "python3", "vllm", "apt", "adduser", "systemctl", "."),
    *("export", "pip", "open-webui", "claude"),
    ".venv/bin/python",
}
# Paths of the repository in code spans; one with a word in capitals stands for others.
PATH = re.compile(r"`((?:flashd|packaging|tests|native|systemd|tray|\.github)/[\w./-]*)`")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def commands(block: str) -> Iterator[str]:
    """The commands of a console block, without what they print."""
    for line in block.replace("\\\n", " ").splitlines():
        if line.strip().startswith("$ "):
            yield line.strip().removeprefix("$ ").replace("<this repository>", "URL")


# -- links -----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> list[str]:
    """The anchors that GitHub and MkDocs both give to the headings of a page."""
    prose = FENCE.sub("", page.read_text())
    found = []
    for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        found.append(re.sub(r"[-\s]", "-", words))
    return found


def targets(page: Path) -> Iterator[tuple[Path, str]]:
    """The file and the anchor of every link that is not to the web."""
    for link in SHIP["links"](page.read_text()):
        _, _, target, anchor = link.groups()
        if "://" not in target:
            yield (page.parent / target).resolve() if target else page, (anchor or "").removeprefix("#")


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for file, anchor in targets(page):
        assert file.is_file(), f"{name_of(page)} links to {file}"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)} links to #{anchor} of {name_of(file)}"


@every_page
def test_anchors_are_the_same_everywhere(page: Path) -> None:
    """GitHub and MkDocs differ in headings that come twice, and in two hyphens in a row."""
    found = anchors(page)
    assert len(found) == len(set(found)), sorted(anchor for anchor in found if found.count(anchor) > 1)
    assert not [anchor for anchor in found if "--" in anchor]


def test_every_page_can_be_reached_from_the_readme_and_is_in_the_menu() -> None:
    seen, pending = set(), [ROOT / "README.md"]
    while pending:
        page = pending.pop()
        if page not in seen and page.suffix == ".md" and page in PAGES:
            seen.add(page)
            pending += [file for file, _ in targets(page)]
    menu = (DOCS / "mkdocs.yml").read_text()
    for page in DOCS.glob("*.md"):
        assert page in seen, f"no link leads to {page.name}"
        assert f"- docs/{page.name}\n" in menu


def test_what_is_shipped_links_only_to_what_is_shipped(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DOCS / "ship.py", tmp_path], check=True)
    shipped = [tmp_path / "README.md", *(tmp_path / "docs").glob("*.md")]
    assert len(shipped) == len(SHIP["pages"]())
    count = 0
    for page in shipped:
        for file, _ in targets(page):
            assert file.is_file() and file.is_relative_to(tmp_path), f"{page.name}: {file}"
            count += 1
    assert count > 50


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs mkdocs: packaging/environment docs")
    pages = ROOT / "build" / "docs" / "pages"
    subprocess.run([sys.executable, DOCS / "ship.py", pages], check=True)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run([*command, "--config-file", DOCS / "mkdocs.yml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "site" / "index.html").read_text()
    assert "docs/install/" in home and not re.findall(r'(?:src|href)="https?://(?!www\.mkdocs\.org)', home)


# -- what pages say --------------------------------------------------------------------------------------------------


def test_generated_parts_are_up_to_date() -> None:
    command = [sys.executable, ROOT / "packaging" / "reference", "docs", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@every_page
def test_nothing_is_of_the_machine_it_was_made_on(page: Path) -> None:
    for here in (sys.prefix, str(ROOT), str(Path.home())):
        assert f"{here}/" not in page.read_text()


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size < 7000


@every_page
def test_paths_of_the_repository_exist(page: Path) -> None:
    for path in PATH.findall(page.read_text()):
        assert re.search(r"[A-Z]{4}", path) or (ROOT / path).exists(), f"{name_of(page)} names {path}"


@every_page
def test_settings_exist(page: Path) -> None:
    sections = "|".join(sorted({setting.key.split(".")[0] for setting in loading.settings()}))
    for key in re.findall(rf"`((?:{sections})\.[a-z_.]+|models\.NAME\.[a-z_]+)`", page.read_text()):
        assert loading.find(key), f"{name_of(page)} names {key}"


# -- blocks ----------------------------------------------------------------------------------------------------------


def parse_flash(words: list[str]) -> None:
    """Parses a command line of flash as flash does, without running it. Raises what flash would say."""
    command: Any = FLASH
    context = command.make_context("flash", [], resilient_parsing=True)
    while hasattr(command, "resolve_command"):
        _, words, _ = command.make_parser(context).parse_args(list(words))
        name, command, words = command.resolve_command(context, words)
        assert command is not None, f"there is no command {name}"
        context = command.make_context(name, [], parent=context, resilient_parsing=True)
    command.parse_args(command.context_class(command, info_name=command.name, parent=context.parent), list(words))
    if command.name == "config" and words and not words[0].startswith("-"):
        loading.find(words[0])


def check_busctl(words: list[str]) -> None:
    """Members on the bus are there, with the signature that is given."""
    words = [word for word in words if not word.startswith("--")]
    assert words[0] in {"call", "get-property"} and words[1] == wire.BUS_NAME
    interface, member, *given = words[3:]
    (found,) = (e for e in ElementTree.fromstring(wire.interface_xml(interface)).iter() if e.get("name") == member)
    signature = "".join(str(a.get("type")) for a in found.iter("arg") if a.get("direction") == "in")
    assert given[:1] == ([signature] if words[0] == "call" and signature else [])


@every_page
def test_commands_are_valid(page: Path) -> None:
    for command in (command for block in blocks(page, "console") for command in commands(block)):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        for part in command.split("&&"):
            words = [word for word in shlex.split(part, comments=True) if word != "sudo"]
            try:
                if words[0] == "flash":
                    parse_flash(words[1:])
                elif words[0] == "busctl":
                    check_busctl(words[1:])
                elif (ROOT / words[0]).is_file() or words[0] == ".venv/bin/python":
                    assert (ROOT / words[-1 if len(words) == 1 else 0]).exists()
                else:
                    assert words[0] in OF_OTHERS or words[0].startswith("~"), words[0]
            except Exception as error:
                if "does not exist" in str(error):
                    continue  # an example's own
                error.add_note(f"{name_of(page)}: {command}")
                raise


@every_page
def test_python_is_valid(page: Path) -> None:
    """Programs compile, and call what is there with arguments that are there."""
    for block in blocks(page, "python"):
        for call in (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
            if not isinstance(call.func, ast.Attribute) or not isinstance(call.func.value, ast.Name):
                continue
            owner = {"flashd": flashd, "ft": flashtensors, "client": Client}.get(call.func.value.id)
            if owner is not None:
                parameters = inspect.signature(getattr(owner, call.func.attr)).parameters
                takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
                assert takes_all or {keyword.arg for keyword in call.keywords} <= parameters.keys(), call.func.attr


def test_a_command_that_is_wrong_is_found() -> None:
    for wrong in (["lst"], ["run"], ["list", "--nothing"], ["config", "engines.nothing", "1"], ["engine", "fetch"]):
        with pytest.raises(Exception, match=r".+"):
            parse_flash(wrong)
    parse_flash(["--bus", "session", "run", "NAME", "hello", "--max-tokens", "3"])
