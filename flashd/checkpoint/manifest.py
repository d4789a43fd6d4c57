# SPDX-License-Identifier: Apache-2.0
"""What is known of a checkpoint without reading its weights? A small TOML file beside them."""

from __future__ import annotations

import dataclasses
import functools
import json
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from flashd.checkpoint.header import Header, strict_json
from flashd.errors import CorruptCheckpoint, InvalidSource
from flashd.streamer import blake3

FORMAT = 1
# What transformers writes into config.json that says nothing about the architecture.
VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash", "use_cache", "auto_map"}


@dataclass(frozen=True, slots=True)
class Manifest:
    """`id` addresses everything by content; `weights` the weights alone; digests are BLAKE3 in hexadecimal.

    Checkpoints with equal `architecture_key` have the same configuration and layout: an engine that holds one can be
    rebound to the other. `quantization` is the method that config.json names, or empty.
    """

    id: str
    weights: str
    header_digest: str
    digests_digest: str
    digest_block_bytes: int
    data_offset: int
    data_bytes: int
    tensor_count: int
    dtype: str
    architecture: str
    architecture_key: str
    layout: str
    quantization: str
    side_files: Mapping[str, str]
    created_at: float
    source: str

    def to_toml(self) -> str:
        return tomli_w.dumps({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_toml(cls, text: str, path: str) -> Manifest:
        """Raises CorruptCheckpoint if this is not a manifest of a format we know."""
        return _parsed(text, path)

    def _checked(self) -> Manifest:
        """Raises TypeError for values of another kind than declared: dataclasses do not look."""
        kinds: dict[str, tuple[type, ...]] = {
            "int": (int,), "float": (int, float), "str": (str,), "Mapping[str, str]": (dict,),
        }  # fmt: skip
        for field in dataclasses.fields(self):
            if not isinstance(getattr(self, field.name), kinds[str(field.type)]):
                raise TypeError(f"{field.name} is not of type {field.type}")
        for name, digest in self.side_files.items():
            if "/" in name or not isinstance(digest, str):
                raise TypeError(f"{name!r} cannot be a side file")
        return self

    @classmethod
    def read(cls, path: Path) -> Manifest:
        return cls.from_toml(path.read_text(encoding="utf-8"), str(path))


@functools.lru_cache(maxsize=256)  # every swap needs one, and TOML takes half a millisecond to parse
def _parsed(text: str, path: str) -> Manifest:
    try:
        document = tomllib.loads(text)
        if document.pop("format", None) != FORMAT:
            raise CorruptCheckpoint(f"{path} is of a format that this version does not know", hint="update flashd")
        return Manifest(**document)._checked()
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise CorruptCheckpoint(f"{path} is damaged: {error}", hint="remove the model and convert it again") from None


def weights_id(header_digest: bytes, digest_table: bytes) -> str:
    return blake3(header_digest + blake3(digest_table)).hex()


def checkpoint_id(weights: str, side_files: Mapping[str, str]) -> str:
    """Addresses weights and side files together: another chat template is another checkpoint of the same weights."""
    lines = [weights, *(f"{name} {digest}" for name, digest in sorted(side_files.items()))]
    return blake3("\n".join(lines).encode()).hex()


def dominant_dtype(header: Header) -> str:
    """The dtype that most bytes have."""
    counts: Counter[str] = Counter()
    for tensor in header.tensors:
        counts[tensor.dtype] += max(tensor.extent.length, 1)
    return counts.most_common(1)[0][0] if counts else ""


def read_config(raw: bytes) -> dict[str, Any]:
    """config.json as a table; raises InvalidSource if it is something else."""
    config = strict_json(raw, "config.json", constants=True)  # Mamba's time_step_limit is [0.0, Infinity]
    if not isinstance(config, dict):
        raise InvalidSource("config.json is not a JSON object")
    return config


def architecture_of(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return _label(names[0]) if isinstance(names, list) and names else ""


def quantization_of(config: Mapping[str, Any]) -> str:
    quantization = config.get("quantization_config")
    return _label(quantization.get("quant_method")) or "unknown" if isinstance(quantization, dict) else ""


def _label(value: object) -> str:
    """A word of a stranger's that people will read on terminals; nothing if it is not such a word."""
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 200 else ""


def architecture_key(config: Mapping[str, Any], layout: str) -> str:
    """Equal if and only if configuration (but for its volatile parts) and layout are; empty without a config."""
    if not config:
        return ""
    stable = {name: value for name, value in config.items() if name not in VOLATILE}
    return blake3(f"{json.dumps(stable, sort_keys=True)}\0{layout}".encode()).hex()
