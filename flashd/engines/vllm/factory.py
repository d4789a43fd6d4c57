# SPDX-License-Identifier: Apache-2.0
"""What does the daemon know of vLLM? Which checkpoints share an engine, and what its processes are told at birth."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.manifest import VOLATILE
from flashd.cuda import Gpu
from flashd.engines.engine import NO_OPTIONS, EngineOptions, GpuPlan
from flashd.engines.process import Settings, ZygoteFactory
from flashd.streamer import blake3
from flashd.units import GiB, MiB

_IMAGE_FORMAT = "1"  # of what flashd/engines/vllm/images.py makes
_ACTIVATION_BYTES = 1 * GiB
# Several GPUs hold a part each, and each would need an image of its own.
_PARALLEL = ("-tp", "-pp", "--tensor-parallel-size", "--pipeline-parallel-size", "--tensor_parallel_size")
# What the libraries that save fine-tunes write of their own circumstances, and nothing reads again.
_INCIDENTAL = (VOLATILE - {"torch_dtype", "dtype"}) | {"is_local", "local_files_only", "name_or_path"}
_SETTINGS = {"config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"}

REMEDY = "flash engine install vllm, or set engines.vllm.python to an interpreter that has vLLM and flashd"


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

    def __init__(self, settings: Settings, gpu: Gpu | None) -> None:
        """`gpu` is what a vLLM that is built for GPUs runs on."""
        super().__init__("vllm", "flashd.engines.vllm.zygote", settings, remedy=REMEDY)
        self._gpu = gpu
        self._keys: dict[str, str] = {}

    def rebind_key(self, checkpoint: Checkpoint, options: EngineOptions = NO_OPTIONS) -> str:
        """What vLLM is told, and what it reads of a model: it does both once, when it starts."""
        model_key = self._model_key(checkpoint)
        return _digest({"model": model_key, **self._told(options)}) if model_key else ""

    def _told(self, options: EngineOptions) -> Mapping[str, Any]:
        all_get = self._settings.options
        kv_cache_bytes = options.kv_cache_bytes
        return {
            "arguments": [*all_get["arguments"], *options.arguments],
            "kv_cache_bytes": all_get["kv_cache_bytes"] if kv_cache_bytes is None else kv_cache_bytes,
        }

    def _model_key(self, checkpoint: Checkpoint) -> str:
        """Configuration, layout, dtype, tokenizer, template and defaults for sampling. Quantised weights vLLM cannot
        take twice in every case, so those get a new engine."""
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

    async def gpu_plan(self, checkpoint: Checkpoint, options: EngineOptions = NO_OPTIONS) -> GpuPlan | None:
        if self._gpu is None:
            return None
        build = await self._zygote.build()
        if build["platform"] != "cuda":
            return None
        told, size_bytes = self._told(options), checkpoint.manifest.data_bytes
        parts = {
            "format": _IMAGE_FORMAT,
            **build,
            "gpu": self._gpu.model,
            "model": await asyncio.to_thread(self._model_key, checkpoint),
            "checkpoint": checkpoint.id,
            "arguments": told["arguments"],
        }
        makes_image = parts["model"] and not any(argument.startswith(_PARALLEL) for argument in told["arguments"])
        return GpuPlan(
            device=self._gpu.name,
            key=_digest(parts) if makes_image else "",
            weights_bytes=size_bytes + size_bytes // 64 + 64 * MiB,  # a vocabulary is padded to what kernels like
            working_bytes=told["kv_cache_bytes"] + _ACTIVATION_BYTES,
        )


def _essence(path: Path) -> str:
    """The digest of a settings file, without what is incidental."""
    raw = path.read_bytes()
    try:
        table: Any = json.loads(raw)
    except ValueError:
        return blake3(raw).hex()
    if isinstance(table, dict):
        table = {name: value for name, value in table.items() if name not in _INCIDENTAL}
    return _digest(table)


def _digest(parts: object) -> str:
    return blake3(json.dumps(parts, sort_keys=True).encode()).hex()
