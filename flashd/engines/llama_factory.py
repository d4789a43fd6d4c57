# SPDX-License-Identifier: Apache-2.0
"""The factory of llama.cpp engines, which answer with GGUF files and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.gguf.traits import SIDE_FILE
from flashd.engines import codec
from flashd.engines.engine import NO_OPTIONS, EngineOptions
from flashd.engines.messages import Tuning
from flashd.engines.process import Settings, ZygoteFactory
from flashd.io.streamer import blake3

KIND = "llama.cpp"
_REMEDY = "flashd's own Python needs uvicorn and aiohttp: install flashd[gateway]"


class LlamaFactory(ZygoteFactory):
    """Makes llama.cpp engines. Each is for one checkpoint: it is parked and woken, and another gets its own."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(KIND, "flashd.workers.llama.main", settings, remedy=_REMEDY)

    def refusal(self, architecture: str, side_files: Mapping[str, Path]) -> str:  # noqa: ARG002 -- it knows them itself
        return "" if SIDE_FILE in side_files else "llama.cpp reads GGUF files only, and this is none"

    def rebind_key(self, checkpoint: Checkpoint, options: EngineOptions = NO_OPTIONS) -> str:
        parts = {"checkpoint": checkpoint.id, **codec.to_json(self._tuning(options))}
        return blake3(json.dumps(parts, sort_keys=True).encode()).hex()

    def _tuning(self, options: EngineOptions) -> Tuning:
        for_all = self._settings.tuning
        return replace(for_all, arguments=(*for_all.arguments, *options.arguments))
