# SPDX-License-Identifier: Apache-2.0
"""The KV cache that models need for their context."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.engines.kv_cache import bytes_for_context

KiB = 1 << 10
LLAMA_8B = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
}  # fmt: skip
DEEPSEEK = {"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
GEMMA = {
    "text_config": {
        "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"], "sliding_window": 1024,
    }
}  # fmt: skip
HYBRID = {
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "tokens", "options", "wanted"),
    [
        (LLAMA_8B, 1, {}, 128 * KiB),  # as its makers say
        (LLAMA_8B, 131072, {}, 16 << 30),
        (LLAMA_8B, 1, {"item_bytes": 1}, 64 * KiB),
        (LLAMA_8B, 1, {"ranks": 2}, 64 * KiB),
        (LLAMA_8B, 1, {"ranks": 16}, 16 * KiB),  # each rank has at least one head
        ({**LLAMA_8B, "head_dim": 256}, 1, {}, 256 * KiB),
        (DEEPSEEK, 1, {"ranks": 8}, 61 * 576 * 2),
        (GEMMA, 100_000, {}, (5 * (1024 + 8192) + 100_000) * 2 * 8 * 256 * 2),
        (GEMMA, 100, {}, 6 * 100 * 2 * 8 * 256 * 2),
        (HYBRID, 1000, {}, 1000 * 2 * 2 * 256 * 2),
        ({}, 1000, {}, 0),
        (LLAMA_8B, 0, {}, 0),
    ],
)
def test_known_models(config: dict[str, object], tokens: int, options: dict[str, int], wanted: int) -> None:
    assert bytes_for_context(config, tokens, **options) == wanted


words = st.sampled_from(["", "full_attention", "sliding_attention", "other"])
values = st.none() | st.booleans() | st.integers() | st.floats() | words | st.lists(words | st.none(), max_size=4)
names = st.sampled_from([*LLAMA_8B, *DEEPSEEK, *GEMMA, *GEMMA["text_config"]])


@given(config=st.dictionaries(names, values | st.dictionaries(names, values)), tokens=st.integers(0, 1 << 40))
def test_any_configuration_has_an_answer(config: dict[str, object], tokens: int) -> None:
    assert bytes_for_context(config, tokens) >= 0
