# SPDX-License-Identifier: Apache-2.0
"""The kind of engine for models that choose none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flashd.config.settings import Config, EnginesConfig, VllmConfig
from flashd.daemon.serving.default_engine import default_engine, why_no_vllm


@pytest.mark.parametrize(
    ("configured", "has_gpu", "without_vllm", "kind", "why"),
    [
        ("auto", False, "", "torch", "there is no GPU"),
        ("auto", True, "it is not there: install it", "torch", "it is not there, so the GPU is not used: install it"),
        ("auto", True, "", "vllm", "there is a GPU"),
        ("torch", True, "", "torch", "engines.default"),
        ("vllm", False, "it is not there: install it", "vllm", "engines.default"),
    ],
)
def test_it_is_by_what_there_is_unless_it_is_chosen(
    configured: str, has_gpu: bool, without_vllm: str, kind: str, why: str
) -> None:
    chosen = default_engine(configured, has_gpu=has_gpu, without_vllm=without_vllm)
    assert chosen.kind == kind and why in chosen.why


def test_vllm_is_there_if_an_environment_has_it() -> None:
    assert why_no_vllm(Config(), "/var/lib/flashd/environments/vllm/1/bin/python") == ""
    assert "flash engine install vllm" in why_no_vllm(Config(), ""), "the tests' own environment has none"


@pytest.mark.parametrize(
    ("python", "why"),
    [
        ("has it", ""),
        ("lacks it", "engines.vllm.python lacks vllm: "),
        ("fails", "engines.vllm.python cannot be run: "),
        ("not executable", "engines.vllm.python cannot be run: "),
        ("nowhere", "engines.vllm.python cannot be run: "),
    ],
)
def test_a_configured_interpreter_has_vllm_if_it_says_so(python: str, why: str, tmp_path: Path) -> None:
    """An environment does not count then, because engines would not run in it."""
    path = tmp_path / "python"
    if python != "nowhere":
        ours = f'exec "{sys.executable}" "$@"'
        path.write_text(f"#!/bin/sh\n{'exit 1' if python == 'fails' else ours}\n")
        path.chmod(0o644 if python == "not executable" else 0o755)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / f"{'vllm' if python == 'has it' else 'other'}.py").touch()
    vllm = VllmConfig(python=str(path), environment=(f"PYTHONPATH={tmp_path / 'site'}",))
    found = why_no_vllm(Config(engines=EnginesConfig(vllm=vllm)), "/an/environment/bin/python")
    assert found.startswith(why) and bool(found) == bool(why) and str(tmp_path) not in found
