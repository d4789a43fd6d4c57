# SPDX-License-Identifier: Apache-2.0
"""Compares the sizes in a config.json with names and shapes of the tensors, before a model is built.

An engine builds the model from the config, and only then looks for weights: a million layers would take it minutes, and
a vocabulary of 10**9 all memory. These checks bound that work by the size of the checkpoint. The engine itself checks
for missing weights after building the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

_NUMBER = re.compile(r"(?:^|\.)(\d{1,9})(?=\.)")
# Synonyms in transformers' configurations.
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
           "num_decoder_layers", "num_encoder_layers")  # fmt: skip
_WIDTHS = ("hidden_size", "d_model", "n_embd")
_SHARED = "num_hidden_groups"  # ALBERT uses one stored layer many times
_COUNTS = re.compile(r"^(?:num|n)_.*(?:layer|expert|block|head|group|codebook)|_layers$|^depth$")
_MOST_FEATURES = 1024  # counts of things without tensors
_SLACK = 4  # tolerance of dimensions, because packed, padded and fused weights have other shapes


def misfit(config: Mapping[str, object], shapes: Mapping[str, Sequence[int]]) -> str:
    """Explains why tensors of these names and shapes cannot belong to this configuration; empty if they may."""
    indices = [int(found) for name in shapes for found in _NUMBER.findall(name)]
    layers = max((number + 1 for number in indices if number < len(shapes)), default=1)
    dimensions = {size for shape in shapes.values() for size in shape}
    largest = max(dimensions, default=0)
    texts = [config, *(part for name in ("text_config", "llm_config") if isinstance(part := config.get(name), dict))]
    for text in texts if _SHARED not in config else ():
        for name in _LAYERS:
            if _size(text.get(name)) > layers:
                return f"config.json says {name} {text[name]}, but the checkpoint has tensors of {layers} layers"
    for text in texts:
        for name in _WIDTHS:
            if _size(text.get(name)) > _MOST_FEATURES and text[name] not in dimensions:
                return f"config.json says {name} {text[name]}, but no tensor of the checkpoint has that dimension"
    for name, size in _sizes(config):
        bound = max(layers, largest, _MOST_FEATURES) if _COUNTS.search(name) else _SLACK * max(largest, _MOST_FEATURES)
        is_of_tensors = _COUNTS.search(name) or name in _WIDTHS or name in {"vocab_size", "intermediate_size"}
        if is_of_tensors and size > bound:
            return f"config.json says {name} {size}, but no dimension in the checkpoint is larger than {largest}"
    return ""


def _sizes(config: Mapping[str, object], depth: int = 0) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, dict) and depth < 3:
            yield from _sizes(value, depth + 1)
        elif size := _size(value):
            yield name, size


def _size(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
