# SPDX-License-Identifier: Apache-2.0
"""Which LoRA adapters does vLLM apply to the requests that name them? Those of the model that is active, and no others.

An engine is rebound from model to model, and vLLM would apply an adapter to any of them: the answer to a request that
meets the wrong base would be nonsense. So an adapter is there only while a model is active that its adapter_config.json
calls its base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashd.checkpoint.adapter import readings
from flashd.checkpoint.header import strict_json
from flashd.checkpoint.source import ADAPTER
from flashd.errors import EngineFailed, InvalidSource

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM may be told are the most
_HINT = "see engines.vllm.adapters: NAME=FOLDER, or FOLDER, of an adapter as PEFT saves it"


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """One of `engines.vllm.adapters`, `base` as its trainer has recorded it."""

    name: str
    folder: Path
    base: str
    rank: int

    @classmethod
    def read(cls, setting: str) -> AppliedAdapter:
        """Raises EngineFailed for what is no adapter, or does not say of which base."""
        name, _, path = setting.rpartition("=")
        folder = Path(path).expanduser()
        try:
            document = strict_json((folder / ADAPTER).read_bytes(), ADAPTER, constants=True)
        except (OSError, InvalidSource) as error:
            raise EngineFailed(f"the adapter {setting} cannot be read: {error}", hint=_HINT) from None
        fields = document if isinstance(document, dict) else {}
        patterns = fields.get("rank_pattern") or {}
        ranks = [fields.get("r", 8), *(patterns.values() if isinstance(patterns, dict) else ())]
        base = fields.get("base_model_name_or_path")
        if not isinstance(base, str) or not base or not all(type(rank) is int for rank in ranks):
            raise EngineFailed(f"the {ADAPTER} of {setting} says no base, or no rank", hint=_HINT)
        return cls(name or folder.name, folder, base, max(ranks))

    def is_of(self, names: Sequence[str]) -> bool:
        """Whether a model that is called so is its base, as a dropped adapter would find it."""
        called = {part.casefold() for name in names for part in (name, name.rpartition("/")[2])}
        return any(reading.casefold() in called for reading in readings(self.base))


def arguments(adapters: Sequence[AppliedAdapter]) -> Iterator[str]:
    """What vLLM is told when it starts, so that it can apply them."""
    if adapters:
        largest = max(adapter.rank for adapter in adapters)
        yield from ("--enable-lora", "--max-lora-rank", str(next((r for r in _RANKS if r >= largest), largest)))
        yield from ("--max-cpu-loras", str(len(adapters)))
