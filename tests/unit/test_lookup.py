# SPDX-License-Identifier: Apache-2.0
"""Suggestions of existing names for a mistyped one."""

from __future__ import annotations

import pytest

from flashd.store.lookup import nearest

THERE = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-14B", "ada", "bob", "my model", "größe")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("Qwen/Qwen3-0.6", "Qwen/Qwen3-0.6B"),
        ("qwen/qwen3-14", "Qwen/Qwen3-14B"),
        ("adda", "ada"),
        ("bbo", "bob"),
        ("mymodel", "my model"),
        ("grösse", "größe"),
    ],
)
def test_a_name_with_a_slip_is_recognised(typed: str, meant: str) -> None:
    assert nearest(typed, THERE)[0] == meant


@pytest.mark.parametrize("typed", ["", "zzz", "a" * 10_000, "mistral", "\x00"])
def test_what_is_like_no_name_is_not_guessed_at(typed: str) -> None:
    assert nearest(typed, THERE) == []
