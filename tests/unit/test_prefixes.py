# SPDX-License-Identifier: Apache-2.0
"""Salts of requests to vLLM: whatever computes a prefix is in them, and nothing else has the same."""

from __future__ import annotations

from dataclasses import dataclass

from flashd.workers.vllm.prefixes import Salts

ONE, OTHER = "a" * 64, "b" * 64


@dataclass
class Adapter:
    lora_name: str
    lora_int_id: int = 7


@dataclass
class Request:
    cache_salt: str | None = None
    lora_request: Adapter | None = None


def salted(salts: Salts, own: str | None = None, adapter: str = "") -> str:
    request = Request(own, Adapter(adapter) if adapter else None)
    salts.add(request)
    assert request.cache_salt
    return request.cache_salt


def test_a_salt_names_the_checkpoint_the_adapter_and_the_callers_salt() -> None:
    salts = Salts()
    salts.enter(ONE, {"tuned": "1f"})
    assert salted(salts) == ONE
    assert salted(salts, "mine") == f"{ONE}:mine"
    assert salted(salts, adapter="tuned") == f"{ONE}.1f"
    assert salted(salts, "mine", "tuned") == f"{ONE}.1f:mine"
    assert salted(salts, adapter="unknown") == f"{ONE}.7"


def test_a_caller_cannot_take_the_salt_of_another_model() -> None:
    salts = Salts()
    found = set()
    for checkpoint in (ONE, OTHER):
        salts.enter(checkpoint, {"tuned": "1f"})
        found |= {salted(salts, own, adapter) for own in (None, ".1f", OTHER, ":" + OTHER) for adapter in ("", "tuned")}
    assert len(found) == 16


def test_requests_between_two_models_share_nothing() -> None:
    salts = Salts()
    found = [salted(salts)]
    for _ in range(2):
        salts.leave()
        found.append(salted(salts))
    assert len(set(found)) == 3
