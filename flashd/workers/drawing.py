# SPDX-License-Identifier: Apache-2.0
"""Decides whether requests that do not say so sample tokens or take the likeliest.

Both kinds of engine follow generation_config.json by the same rule, because their own rules differ: transformers takes
the likeliest token unless do_sample is set, and vLLM always samples and ignores do_sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HOW = ("temperature", "top_p", "top_k", "min_p")


def draws(settings: Mapping[str, Any]) -> bool:
    """Returns do_sample; without it, whether there is any sampling parameter."""
    said = settings.get("do_sample")
    if isinstance(said, bool):
        return said
    return any(isinstance(settings.get(name), int | float) for name in _HOW)
