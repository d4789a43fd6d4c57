# SPDX-License-Identifier: Apache-2.0
"""What does the daemon know of vLLM? Which checkpoints share an engine, and what its processes are told at birth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.manifest import VOLATILE
from flashd.engines.process import Settings, ZygoteFactory
from flashd.streamer import blake3

# What the libraries that save fine-tunes write of their own circumstances, and nothing reads again.
_INCIDENTAL = (VOLATILE - {"torch_dtype", "dtype"}) | {"is_local", "local_files_only", "name_or_path"}
_SETTINGS = {"config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"}

REMEDY = (
    "set engines.vllm.python to the interpreter of an environment that has vLLM and flashd "
    "(python -m venv; pip install vllm flashd)"
)


def environment(caches: Path) -> Mapping[str, str]:
    """What vLLM's processes find in their environment besides ours. `caches` keeps what they compile."""
    return {
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_RPC_BASE_PATH": ".",  # its sockets lie in the engine's own folder, which is its working directory
        "VLLM_SERVER_DEV_MODE": "0",  # those endpoints can do anything, and the daemon needs none of them
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class VllmFactory(ZygoteFactory):
    """Makes vLLM engines."""

    def __init__(self, settings: Settings) -> None:
        super().__init__("vllm", "flashd.engines.vllm.zygote", settings, remedy=REMEDY)
        self._keys: dict[str, str] = {}

    def rebind_key(self, checkpoint: Checkpoint) -> str:
        """Configuration, layout, dtype, tokenizer, template and defaults for sampling: vLLM reads all of them once,
        when it starts. Quantised weights it cannot take twice in every case, so those get a new engine."""
        manifest = checkpoint.manifest
        if not manifest.architecture_key or manifest.quantization:
            return ""
        if manifest.id not in self._keys:
            files = checkpoint.side_files()
            parts = [manifest.architecture_key]
            for name, digest in sorted(manifest.side_files.items()):
                parts.append(f"{name} {_essence(files[name]) if name in _SETTINGS else digest}")
            self._keys[manifest.id] = blake3("\n".join(parts).encode()).hex()
        return self._keys[manifest.id]


def _essence(path: Path) -> str:
    """The digest of a settings file, without what is incidental."""
    raw = path.read_bytes()
    try:
        table: Any = json.loads(raw)
    except ValueError:
        return blake3(raw).hex()
    if isinstance(table, dict):
        table = {name: value for name, value in table.items() if name not in _INCIDENTAL}
    return blake3(json.dumps(table, sort_keys=True).encode()).hex()
