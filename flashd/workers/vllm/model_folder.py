# SPDX-License-Identifier: Apache-2.0
"""Makes the model folder for vLLM, with only the header of a safetensors file in place of the weights.

From the header, vLLM finds out which layers are quantised (GPTQ, AWQ), the dtype if the config has none, and whether
there is an output layer besides the embedding. Reading weights fails, because safetensors refuses a file without data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from flashd.checkpoint.header import ALIASES, METADATA
from flashd.checkpoint.json_reader import read_json
from flashd.checkpoint.source.reader import pooling_path
from flashd.errors import InvalidSource, Unsupported
from flashd.workers import drawing, pooling


class ListedTensor(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


Listed = Mapping[str, ListedTensor]
_POOLED = {"cls", "mean", "lasttoken"}
_OUTPUT = "lm_head.weight"
_EMBEDDING = ("emb", "wte", "shared.weight")  # in the names of input embeddings, whatever the architecture


def listed(layout: str) -> Listed:
    """Returns the tensors of a checkpoint under all their names, except an output layer that is tied to the embedding.

    vLLM would take that for a separate layer, and hold both in memory.
    """
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


def shapes(tensors: Listed) -> Mapping[str, Sequence[int]]:
    return {name: tensor["shape"] for name, tensor in tensors.items()}


def draws(model: Path) -> bool:
    """Tells whether the model's generation_config.json, or else config.json, enables sampling."""
    own = model / "generation_config.json"
    try:
        settings = read_json((own if own.exists() else model / "config.json").read_bytes(), own.name, constants=True)
    except InvalidSource:
        return True  # vLLM reports the error
    return not isinstance(settings, dict) or drawing.draws(settings)


def check_pooling(model: Path) -> None:
    """Checks that vLLM would pool embeddings as the model declares. Raises Unsupported."""

    def read(name: str) -> bytes | None:
        path = model / pooling_path(name)
        return path.read_bytes() if path.exists() else None

    found = pooling.declared(read)
    if found is not None and (len(found.modes) != 1 or found.modes[0] not in _POOLED or found.prompt):
        said = "a prompt before each text" if found.prompt else " and ".join(found.modes)
        raise Unsupported(
            f"its embeddings are made with {said}, which vLLM does not support", hint="use flash swap --engine torch"
        )


def digest(tensors: Listed) -> str:
    """Returns a digest that is equal if vLLM builds the same model from equal configs with these tensors."""
    parts = sorted((name, tensor["dtype"], tensor["shape"]) for name, tensor in tensors.items())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
