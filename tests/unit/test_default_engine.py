# SPDX-License-Identifier: Apache-2.0
"""The kind of engine for models that choose none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashd.config.settings import Config, EnginesConfig, VllmConfig
from flashd.daemon.serving.default_engine import default_engine, has_vllm


@pytest.mark.parametrize(
    ("configured", "has_gpu", "vllm", "kind", "why"),
    [
        ("auto", False, True, "torch", "there is no GPU"),
        ("auto", True, False, "torch", "flash engine install vllm"),
        ("auto", True, True, "vllm", "there is a GPU"),
        ("torch", True, True, "torch", "engines.default"),
        ("vllm", False, False, "vllm", "engines.default"),
    ],
)
def test_it_is_by_what_there_is_unless_it_is_chosen(
    configured: str, has_gpu: bool, vllm: bool, kind: str, why: str
) -> None:
    chosen = default_engine(configured, has_gpu=has_gpu, has_vllm=vllm)
    assert chosen.kind == kind and why in chosen.why


def test_vllm_is_there_if_an_interpreter_is_configured_or_installed() -> None:
    configured = replace(Config(), engines=EnginesConfig(vllm=VllmConfig(python="/opt/vllm/bin/python")))
    assert has_vllm(configured, "")
    assert has_vllm(Config(), "/var/lib/flashd/environments/vllm/1/bin/python")
    assert not has_vllm(Config(), ""), "the tests' own environment has none"
