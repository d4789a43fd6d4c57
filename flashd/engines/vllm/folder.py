# SPDX-License-Identifier: Apache-2.0
"""What does vLLM find in a model's folder where weights would be? The header of a safetensors file, without the data.

By it vLLM tells which layers are quantised (GPTQ, AWQ), the dtype if the config has none, and whether there is an
output layer besides the embedding. Whoever reads on finds no data, which safetensors refuses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from flashd.checkpoint.header import ALIASES, METADATA

Listed = Mapping[str, Mapping[str, Any]]
_OUTPUT = "lm_head.weight"
_EMBEDDING = ("emb", "wte", "shared.weight")  # in the names of input embeddings, whatever the architecture


def listed(layout: str) -> Listed:
    """The tensors of a checkpoint under all their names. Only an output layer that is the embedding is not listed: vLLM
    would take it for one of its own, and both would be in memory."""
    document = json.loads(layout)
    names = {name: [name] for name in document if name != METADATA}
    for alias, name in json.loads(document.get(METADATA, {}).get(ALIASES, "{}")).items():
        names[name].append(alias)
    found = {}
    for name, same in names.items():
        is_embedding = any(part in other for other in same for part in _EMBEDDING)
        for other in same:
            if not (is_embedding and other.endswith(_OUTPUT)):
                found[other] = document[name]
    return found


def digest(tensors: Listed) -> str:
    """Equal where vLLM builds the same model of equal configs, as far as it depends on what is listed."""
    parts = sorted((name, tensor["dtype"], tensor["shape"]) for name, tensor in tensors.items())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
