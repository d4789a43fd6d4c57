# SPDX-License-Identifier: Apache-2.0
"""Readers of values in the JSON of requests: each returns the value to use, or refuses it with a message."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeGuard

ASK_VLLM = "engines of vLLM can do it: flash engine install vllm, then flash config engines.default vllm"
_MOST_SHOWN_VALUES = 8


class WrongValue(Exception):
    """Raised with a message about the values that a field accepts, and perhaps a hint what to do instead."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


JsonObject = dict[str, Any]  # as parsed, or to be written: the values are of any kind of JSON
Read = Callable[[object], Any]  # returns the value to use; raises WrongValue


def number(low: float, high: float) -> Read:
    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise WrongValue(f"must be a number from {low:g} to {high:g}")
        return float(value)

    return read


def whole(low: int, high: int) -> Read:
    def read(value: object) -> int:
        if not is_whole(value) or not low <= value <= high:
            raise WrongValue(f"must be a whole number from {low} to {high}")
        return int(value)

    return read


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise WrongValue("must be true or false")
    return value


def text(value: object) -> str:
    if not isinstance(value, str):
        raise WrongValue("must be a text")
    return value


def only(*values: object, hint: str = "") -> Read:
    """Returns a reader that accepts only the values of an unsupported field that have no effect."""
    allowed = [json.dumps(value, sort_keys=True) for value in values]
    refusal = f"can only be {' or '.join(allowed[:_MOST_SHOWN_VALUES])} here" if allowed else "is not supported here"

    def read(value: object) -> None:
        if json.dumps(value, sort_keys=True) not in allowed:
            raise WrongValue(refusal, hint=hint)

    return read


def vllm_only(*values: object) -> Read:
    """Returns a reader like `only`, for a field that engines of vLLM support."""
    return only(*values, hint=ASK_VLLM)


def anything(value: object) -> None:
    """Accepts all values, because the field has no effect on the answer."""
