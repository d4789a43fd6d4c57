# SPDX-License-Identifier: Apache-2.0
"""Manifests: the metadata of checkpoints, in small TOML files beside the weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from flashd import toml
from flashd.checkpoint.header import MAX_HEADER_BYTES, Header
from flashd.checkpoint.json_reader import read_json
from flashd.durable import as_count, as_text, as_time, read_bytes
from flashd.errors import CorruptCheckpoint, InvalidSource
from flashd.io.streamer import ALIGNMENT, blake3
from flashd.legible import legible

FORMAT = 1
_LONGEST_NAME = 200  # characters of a class, a dtype or a method
# What architectures call the number of their positions; the first that is there counts.
_CONTEXT_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
_LONGEST_CONTEXT = (1 << 32) - 1
# Entries of transformers in config.json that do not describe the architecture.
VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash", "use_cache", "auto_map"}


@dataclass(frozen=True, slots=True)
class Manifest:
    """Metadata of a checkpoint. `id` addresses all its contents, `weights` only the weights; digests are BLAKE3 in hex.

    Checkpoints with equal `architecture_key` have the same configuration and layout: an engine that holds one can be
    rebound to the other. `quantization` is the method in config.json, or empty.
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
        """Parses a manifest. Raises CorruptCheckpoint if it is malformed or of an unknown format."""
        return _parsed(text, path)

    def is_of_its_content(self) -> bool:
        """True if the id matches the digests. The id of an image is its key instead."""
        return self.id == checkpoint_id(self.weights, self.side_files)

    def _checked(self) -> Manifest:
        """Checks types and values, which dataclasses do not. Raises ValueError."""
        for name in ("digest_block_bytes", "data_offset", "data_bytes", "tensor_count"):
            as_count(getattr(self, name))
        for name in ("dtype", "architecture", "architecture_key", "layout", "quantization", "source"):
            as_text(getattr(self, name))
        for name in ("dtype", "architecture", "quantization"):
            _check_name(getattr(self, name), name)
        for digest in (self.id, self.weights, self.header_digest, self.digests_digest):
            _check_digest(digest)
        as_time(self.created_at)
        if self.digest_block_bytes < 1 or self.data_offset > MAX_HEADER_BYTES + ALIGNMENT:
            raise ValueError("its sizes are impossible")
        if self.weights != weights_id(self.header_digest, self.digests_digest):
            raise ValueError("its values contradict each other")
        if not isinstance(self.side_files, dict):
            raise ValueError("it has no table of side files")
        for name, digest in self.side_files.items():
            if "/" in name or "\0" in name or name in {"", ".", ".."}:
                raise ValueError(f"{name[:80]!r} cannot be a side file")
            _check_digest(digest)
        return self

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads a manifest. Raises OSError, ValueError if it is not text, or CorruptCheckpoint."""
        return cls.from_toml(read_bytes(path).decode(), str(path))


@functools.lru_cache(maxsize=256)  # cached, because every swap needs one, and parsing TOML takes half a millisecond
def _parsed(text: str, path: str) -> Manifest:
    try:
        document = toml.parse(text)
        if document.pop("format", None) != FORMAT:
            raise CorruptCheckpoint(f"{path} has a format unknown to this version", hint="update flashd")
        return Manifest(**document)._checked()
    except (ValueError, TypeError) as error:
        raise CorruptCheckpoint(f"{path} is damaged: {error}", hint="remove the model and convert it again") from None


def _check_digest(value: object) -> None:
    if re.fullmatch("[0-9a-f]{64}", as_text(value)) is None:
        raise ValueError(f"{str(value)[:80]!r} is not a digest")


def weights_id(header_digest: str, digests_digest: str) -> str:
    """Addresses weights by the digests of their header and of the table of their blocks' digests."""
    return blake3(bytes.fromhex(header_digest) + bytes.fromhex(digests_digest)).hex()


def checkpoint_id(weights: str, side_files: Mapping[str, str]) -> str:
    """Addresses weights and side files together: another chat template is another checkpoint of the same weights."""
    lines = [weights, *(f"{name} {digest}" for name, digest in sorted(side_files.items()))]
    return blake3("\n".join(lines).encode()).hex()


def dominant_dtype(header: Header) -> str:
    """Returns the dtype of most of the bytes."""
    counts: Counter[str] = Counter()
    for tensor in header.tensors:
        counts[tensor.dtype] += max(tensor.extent.length, 1)
    return counts.most_common(1)[0][0] if counts else ""


def read_config(raw: bytes) -> dict[str, Any]:
    """Parses config.json. Raises InvalidSource unless it is a JSON object."""
    config = read_json(raw, "config.json", constants=True)
    if not isinstance(config, dict):
        raise InvalidSource("config.json is not a JSON object")
    return config


def check_names(config: Mapping[str, object]) -> None:
    """Checks the names in config.json that are shown to users or used by engines. Raises InvalidSource."""
    architectures, quantization = config.get("architectures"), config.get("quantization_config")
    said = [("architectures", name) for name in (architectures if isinstance(architectures, list) else ())]
    said += [("model_type", config.get("model_type"))]
    # For a model of several parts, a dtype for each.
    said += [(key, config.get(key)) for key in ("torch_dtype", "dtype") if not isinstance(config.get(key), dict)]
    if isinstance(quantization, dict):
        said.append(("quant_method", quantization.get("quant_method")))
    try:
        if not isinstance(architectures, list | None):
            raise ValueError("architectures is not a list")
        for key, name in said:
            if name is not None:
                _check_name(name, key)
    except ValueError as error:
        hint = "correct it, or get config.json from the model's origin again"
        raise InvalidSource(f"config.json is wrong: {error}", hint=hint) from None


def _check_name(value: object, key: str) -> None:
    """Checks that a value is a short legible text. Raises ValueError."""
    if not isinstance(value, str) or legible(value, _LONGEST_NAME) != value:
        raise ValueError(f"{key} is {reprlib.repr(value)}, not a name")


def architecture_of(config: Mapping[str, object]) -> str:
    names = config.get("architectures")
    return _label(names[0]) if isinstance(names, list) and names else ""


def quantization_of(config: Mapping[str, object]) -> str:
    quantization = config.get("quantization_config")
    return _label(quantization.get("quant_method")) or "unknown" if isinstance(quantization, dict) else ""


def context_length_of(config: Mapping[str, object]) -> int:
    """Returns the most tokens that the model can read and write at once by its configuration; 0 if that does not say.

    Of a model of several parts, it is that of the part that reads text.
    """
    part = config.get("text_config")
    for described in (part, config) if isinstance(part, dict) else (config,):
        for name in _CONTEXT_LENGTHS:
            length = described.get(name)
            if isinstance(length, int) and not isinstance(length, bool) and 0 < length <= _LONGEST_CONTEXT:
                return length
    return 0


def _label(value: object) -> str:
    """Returns a name that has passed `check_names`; empty if there is none."""
    return legible(value, _LONGEST_NAME) if isinstance(value, str) else ""


def architecture_key(config: Mapping[str, object], layout: str) -> str:
    """Returns a key that is equal if and only if configuration (except its volatile parts) and layout are equal; empty
    without a config.
    """
    if not config:
        return ""
    stable = {name: value for name, value in config.items() if name not in VOLATILE}
    return blake3(f"{json.dumps(stable, sort_keys=True)}\0{layout}".encode()).hex()
