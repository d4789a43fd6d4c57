# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters that stay adapters: vLLM applies them to requests that name them, and only to those of their base.

An engine is rebound from model to model, and vLLM would apply an adapter to any of them, with nonsense as the answer
for a wrong base. So an adapter belongs to the model that its adapter_config.json names as its base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashd.checkpoint.json_reader import read_json
from flashd.checkpoint.lora.source import MAX_RANK, readings
from flashd.checkpoint.source.reader import ADAPTER
from flashd.errors import EngineFailed, InvalidSource

_HINT = "correct engines.vllm.adapters: NAME=FOLDER, or FOLDER, of an adapter in PEFT's format"


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """An adapter of `engines.vllm.adapters`, with its `base` as recorded by its trainer."""

    name: str
    folder: Path
    base: str
    rank: int

    @classmethod
    def read(cls, setting: str) -> AppliedAdapter:
        """Reads an adapter. Raises EngineFailed if the folder is not an adapter, or does not name its base."""
        name, _, path = setting.rpartition("=")
        folder = Path(path).expanduser()
        try:
            document = read_json((folder / ADAPTER).read_bytes(), ADAPTER, constants=True)
        except (OSError, InvalidSource) as error:
            raise EngineFailed(f"the adapter {setting} cannot be read: {error}", hint=_HINT) from None
        fields = document if isinstance(document, dict) else {}
        patterns = fields.get("rank_pattern") or {}
        ranks = [fields.get("r", 8), *(patterns.values() if isinstance(patterns, dict) else ())]
        base = fields.get("base_model_name_or_path")
        are_ranks = all(type(rank) is int and 0 < rank <= MAX_RANK for rank in ranks)
        if not isinstance(base, str) or not base or not are_ranks:
            raise EngineFailed(f"the {ADAPTER} of {setting} lacks a base or a rank", hint=_HINT)
        return cls(name or folder.name, folder, base, max(ranks))

    def id(self) -> str:
        """Returns a digest over the identities and times of its files, which no other adapter in the folder has.

        Empty if they cannot be read.
        """
        try:
            found = [(file.name, file.stat()) for file in sorted(self.folder.iterdir()) if file.is_file()]
        except OSError:
            return ""
        known = [(name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found]
        return hashlib.sha256(repr(known).encode()).hexdigest()[:32]

    def is_of(self, names: Sequence[str]) -> bool:
        """Tells whether a model with these names is its base, by the rules for dropped adapters."""
        called = {part.casefold() for name in names for part in (name, name.rpartition("/")[2])}
        return any(reading.casefold() in called for reading in readings(self.base))
