# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file says about its model, kept as a side file of the checkpoint, because engines read the rest."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from flashd.checkpoint.gguf.header import GgufHeader
from flashd.checkpoint.json_reader import read_json
from flashd.errors import InvalidSource
from flashd.legible import legible

SIDE_FILE = "gguf.json"  # marks a checkpoint whose weights are a GGUF file
_LONGEST_NAME = 200
_LONGEST_CONTEXT = (1 << 32) - 1
_RANKS = 4  # LLAMA_POOLING_TYPE_RANK: the model gives a score for two texts
_NO_POOLING = (0, -1)
# Kinds of files that are no models by themselves.
_PARTS = {
    "adapter": ("a LoRA adapter in GGUF", "merge it into its base with llama-export-lora, and drop the result"),
    "mmproj": ("the part of a model that sees", "drop the GGUF file of the language model: it then reads text only"),
    "imatrix": ("an importance matrix for quantising", "drop the GGUF file of the model"),
}


@dataclass(frozen=True, slots=True)
class Traits:
    """`pooling` is llama.cpp's number for how vectors are made of tokens' states; 0 for a model that writes.

    `types` counts the tensors of each type.
    """

    architecture: str
    context_length: int = 0
    pooling: int = 0
    has_template: bool = False
    knows_tools: bool = False
    types: Mapping[str, int] = field(default_factory=dict)

    @property
    def embeds(self) -> bool:
        return self.pooling not in _NO_POOLING

    @property
    def ranks(self) -> bool:
        return self.pooling == _RANKS

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> Traits:
        """Parses the side file. Raises InvalidSource if it is not one."""
        document = read_json(raw, SIDE_FILE)
        try:
            if not isinstance(document, dict):
                raise TypeError
            return cls(**document)
        except TypeError:
            raise InvalidSource(f"{SIDE_FILE} is malformed", hint="convert the model again") from None


def traits_of(header: GgufHeader, path: str) -> Traits:
    """Describes the model of a file. Raises InvalidSource if it holds none."""
    architecture, kind = header.text("general.architecture"), header.text("general.type")
    kind = "mmproj" if architecture == "clip" else kind
    if kind in _PARTS:
        what, hint = _PARTS[kind]
        raise InvalidSource(f"{path} is {what}, not a model", hint=hint)
    if not architecture or legible(architecture, _LONGEST_NAME) != architecture:
        raise InvalidSource(f"{path} does not name the architecture of its model", hint="convert the model again")
    context = header.number(f"{architecture}.context_length")
    pooling = header.number(f"{architecture}.pooling_type")
    if not pooling and architecture.endswith("bert"):
        pooling = 1  # an encoder, which cannot write: the mean of its states, as llama.cpp takes then
    template = header.text("tokenizer.chat_template")
    return Traits(
        architecture=architecture,
        context_length=context if 0 < context <= _LONGEST_CONTEXT else 0,
        pooling=pooling,
        has_template=bool(template),
        knows_tools="tool" in template,
    )


def with_types(traits: Traits, header: GgufHeader) -> Traits:
    """Returns the traits with the types of the tensors."""
    return dataclasses.replace(traits, types=dict(Counter(tensor.type_name for tensor in header.tensors)))


def dominant_type(header: GgufHeader) -> str:
    """Returns the type of most of the bytes."""
    sizes: Counter[str] = Counter()
    for tensor in header.tensors:
        sizes[tensor.type_name] += max(tensor.size_bytes, 1)
    return sizes.most_common(1)[0][0] if sizes else ""
