# SPDX-License-Identifier: Apache-2.0
"""The commands, settings and functions on the page for users of flashtensors, Ollama and llama-swap exist."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import flashtensors
import typer.main

import flashd
from flashd.cli.app import app
from flashd.compat.session import Session
from flashd.config import loading

PAGE = (Path(__file__).parents[2] / "packaging" / "docs" / "migrating.md").read_text()
# Code spans of the column with flashd's equivalents.
ROWS = [line.split("|")[2] for line in PAGE.splitlines() if line.startswith("| ")]
HERE = " ".join(re.findall(r"`([^`]+)`", "\n".join(ROWS)))


def test_settings() -> None:
    named = set(re.findall(r"\b(?:store|memory|streamer|engines|inbox|bus)\.[a-z_.]+", HERE))
    assert len(named) > 9 and named <= {setting.key for setting in loading.settings()}


def test_commands() -> None:
    named = set(re.findall(r"\bflash ([a-z]+)", PAGE))
    there = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert len(named) > 12 and named <= there


def test_functions_and_their_arguments() -> None:
    for name in re.findall(r"\bft\.([a-z_]+)\(", PAGE):
        assert callable(getattr(flashtensors, name)), name
    for name in re.findall(r"\bflash\.([a-z_]+)\(", PAGE):
        assert callable(getattr(flashtensors.flash, name)), name
    assert set(re.findall(r"\b([a-z_]+)=…", PAGE)) <= set(inspect.signature(Session.configure).parameters)


def test_everything_that_is_offered_is_there() -> None:
    for module in (flashtensors, flashtensors.flash, flashd):
        for name in module.__all__:
            assert getattr(module, name) is not None, name


def test_what_is_installed_as_flashtensors_does_not_need_its_own_place() -> None:
    """In the wheel it lies beside flashd, and no longer in it."""
    for path in (Path(flashd.__file__).parent / "compat" / "flashtensors").glob("*.py"):
        assert "compat.flashtensors" not in path.read_text()
