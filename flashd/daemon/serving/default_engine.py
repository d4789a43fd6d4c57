# SPDX-License-Identifier: Apache-2.0
"""The kind of engine for models and swaps that choose none."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec

from flashd.config.environment import child_environment
from flashd.config.interpreters import missing_in
from flashd.config.settings import Config, variables
from flashd.engines.environments import MUST_IMPORT
from flashd.errors import Unavailable

log = logging.getLogger(__name__)

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class DefaultEngine:
    """A kind of engine, and the reason for it in a few words."""

    kind: str
    why: str


def default_engine(configured: str, *, has_gpu: bool, without_vllm: str) -> DefaultEngine:
    """Chooses by the setting engines.default, and for "auto" by what there is.

    `without_vllm` says why there is no vLLM, and after a colon what to do; empty if there is.
    """
    if configured != AUTO:
        return DefaultEngine(configured, "by the setting engines.default")
    if not has_gpu:
        return DefaultEngine("torch", "there is no GPU")
    if without_vllm:
        why, _, remedy = without_vllm.partition(": ")
        return DefaultEngine("torch", f"{why}, so the GPU is not used: {remedy}")
    return DefaultEngine("vllm", "there is a GPU, and vLLM is installed")


def why_no_vllm(config: Config, installed: str) -> str:
    """Returns why no interpreter has vLLM, and after a colon what to do; empty if one has it.

    If one is configured, no other counts. Otherwise that is the `installed` one, or ours.
    """
    if python := config.engines.vllm.python:
        return _why_without(python, config)
    if installed or find_spec("vllm") is not None:
        return ""
    return "vLLM is not installed: flash engine install vllm"


def _why_without(python: str, config: Config) -> str:
    """Every user may read the answer, so only the log names the interpreter."""
    setting = "engines.vllm.python"
    try:
        environment = variables(config.engines.vllm.environment, "engines.vllm.environment")
        missing = missing_in(python, MUST_IMPORT["vllm"], child_environment(environment))
    except Unavailable as error:
        log.warning("vLLM is not used: %s", error.message)
        why = "cannot be run"
    else:
        if not missing:
            return ""
        why = f"lacks {' and '.join(missing)}"
        log.warning("vLLM is not used: %s %s", python, why)
    return f"{setting} {why}: set it to an interpreter that has vLLM and flashd, and restart flashd"
