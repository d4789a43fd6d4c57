# SPDX-License-Identifier: Apache-2.0
"""The kind of engine for models and swaps that choose none."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from flashd.config.settings import Config

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class DefaultEngine:
    """A kind of engine, and the reason for it in a few words."""

    kind: str
    why: str


def default_engine(configured: str, *, has_gpu: bool, has_vllm: bool) -> DefaultEngine:
    """Chooses by the setting engines.default, and for "auto" by what there is."""
    if configured != AUTO:
        return DefaultEngine(configured, "by the setting engines.default")
    if not has_gpu:
        return DefaultEngine("torch", "there is no GPU")
    if not has_vllm:
        return DefaultEngine("torch", "vLLM is not installed, so the GPU is not used: flash engine install vllm")
    return DefaultEngine("vllm", "there is a GPU, and vLLM is installed")


def has_vllm(config: Config, installed: str) -> bool:
    """Tells whether there is an interpreter that has vLLM: the configured one, the `installed` one, or our own."""
    return bool(config.engines.vllm.python or installed) or find_spec("vllm") is not None
