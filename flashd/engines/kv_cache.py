# SPDX-License-Identifier: Apache-2.0
"""The KV cache that a model needs to hold its whole context, by its configuration."""

from __future__ import annotations

from collections.abc import Mapping

from flashd.units import MiB

MOST_SEQUENCES = 32  # that vLLM answers at once on a GPU
AUTO = -1  # in place of a size: as much as is free when the engine starts
LEAST_BYTES = 256 * MiB  # of such a cache
_MOST = 1 << 20  # of anything that is counted here; a checkpoint may claim whatever it likes
_BATCHED_TOKENS = 8192  # that vLLM may read at once, beyond a sliding window
_LAYERS = {"full_attention": False, "sliding_attention": True, "chunked_attention": True}  # with a window or not


def bytes_for_context(config: Mapping[str, object], tokens: int, *, ranks: int = 1, item_bytes: int = 2) -> int:
    """Returns the bytes that each of `ranks` tensor-parallel ranks needs for one sequence of `tokens` tokens.

    `item_bytes` is the size of a number in the cache. 0 if the configuration does not say. Layers with other kinds of
    attention have a small state instead, which is not counted.
    """
    part = config.get("text_config")
    config = part if isinstance(part, dict) else config
    layers, heads = _count(config, "num_hidden_layers"), _count(config, "num_attention_heads")
    token_bytes = _numbers_of_a_token(config, heads, ranks) * item_bytes
    if not (layers and token_bytes and tokens > 0):
        return 0
    window = _count(config, "sliding_window")
    in_window = min(tokens, window + _BATCHED_TOKENS) if window else tokens
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != layers:
        return layers * tokens * token_bytes
    with_window = [_LAYERS[kind] for kind in kinds if isinstance(kind, str) and kind in _LAYERS]
    held = sum(in_window if is_windowed else tokens for is_windowed in with_window)
    return held * token_bytes


def _numbers_of_a_token(config: Mapping[str, object], heads: int, ranks: int) -> int:
    """Returns how many numbers one layer keeps of a token on each rank."""
    if latent := _count(config, "kv_lora_rank"):  # multi-head latent attention, of which each rank has all
        return latent + _count(config, "qk_rope_head_dim")
    width = _count(config, "head_dim") or (_count(config, "hidden_size") // heads if heads else 0)
    kv_heads = _count(config, "num_key_value_heads") or heads
    return 2 * max(1, -(-kv_heads // ranks)) * width if kv_heads else 0


def _count(config: Mapping[str, object], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST else 0
