# SPDX-License-Identifier: Apache-2.0
"""What does the daemon know of vLLM? Which checkpoints share an engine, and what its processes are told at birth."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.manifest import VOLATILE
from flashd.cuda import Gpu
from flashd.engines.engine import NO_OPTIONS, EngineOptions, GpuPlan, RankPlan
from flashd.engines.process import Settings, ZygoteFactory
from flashd.engines.vllm import IMAGE_FORMAT
from flashd.errors import Unsupported
from flashd.streamer import blake3
from flashd.units import GiB, MiB

_ACTIVATION_BYTES = 1 * GiB
_COMMUNICATION_BYTES = 1 * GiB  # what NCCL and vLLM's own all-reduce take of each of several GPUs
# Quantisation of which images may be made; whether one is, the engine says (flashd/engines/vllm/quantised.py).
_TAKEN_IN_PLACE = {"fp8"}
_PARKED = _TAKEN_IN_PLACE | {"modelopt", "mxfp4"}
# The arguments that have vLLM guess ahead, and its ways of doing so without a second model.
_SPECULATIVE = ("--speculative-config", "--spec-", "-sc")
_WITHOUT_DRAFT = {"ngram", "ngram_gpu", "suffix"}
# Those that have it keep what a model has read beyond its KV cache, where nobody knows of which weights that is.
_KEEPING = ("--kv-transfer", "--kv-offloading")
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
        "VLLM_USE_MEGA_AOT_ARTIFACT": "1",  # what was compiled is loaded as it is; vLLM itself would trace it again
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_RPC_BASE_PATH": ".",  # its sockets lie in the engine's own folder, which is its working directory
        "VLLM_SERVER_DEV_MODE": "0",  # those endpoints can do anything, and the daemon needs none of them
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class VllmFactory(ZygoteFactory):
    """Makes vLLM engines."""

    def __init__(self, settings: Settings, gpus: Sequence[Gpu]) -> None:
        """`gpus` are what a vLLM that is built for GPUs runs on, those that are used first first."""
        super().__init__("vllm", "flashd.engines.vllm.zygote", settings, remedy=REMEDY)
        self._gpus = gpus
        self._keys: dict[str, str] = {}

    def rebind_key(self, checkpoint: Checkpoint, options: EngineOptions = NO_OPTIONS) -> str:
        """What vLLM is told, and what it reads of a model: it does both once, when it starts."""
        model_key, told = self._model_key(checkpoint), self._told(options)
        own = checkpoint.id if _has_draft(told["arguments"]) or _keeps_what_it_read(told["arguments"]) else ""
        return _digest({"model": model_key, "own": own, **told}) if model_key else ""

    def _told(self, options: EngineOptions) -> Mapping[str, Any]:
        all_get = self._settings.options
        kv_cache_bytes = options.kv_cache_bytes
        return {
            **all_get,
            "arguments": [*all_get["arguments"], *options.arguments],
            "kv_cache_bytes": all_get["kv_cache_bytes"] if kv_cache_bytes is None else kv_cache_bytes,
        }

    def _model_key(self, checkpoint: Checkpoint) -> str:
        """Configuration, layout, dtype, tokenizer, template and defaults for sampling. Of quantised weights vLLM cannot
        take others in place in every case: those that it can park at least come back to the engine that had them, and
        all others get a new one."""
        manifest = checkpoint.manifest
        method = manifest.quantization
        if not manifest.architecture_key or (method and not (self._gpus and method in _PARKED)):
            return ""
        if manifest.id not in self._keys:
            files = checkpoint.side_files()
            parts = [manifest.architecture_key]
            for name, digest in sorted(manifest.side_files.items()):
                parts.append(f"{name} {_essence(files[name]) if name in _SETTINGS else digest}")
            if method and method not in _TAKEN_IN_PLACE:
                parts.append(manifest.id)
            self._keys[manifest.id] = blake3("\n".join(parts).encode()).hex()
        return self._keys[manifest.id]

    async def gpu_plan(self, checkpoint: Checkpoint, options: EngineOptions = NO_OPTIONS) -> GpuPlan | None:
        """Raises Unsupported if its ranks are more than there are GPUs."""
        if not self._gpus:
            return None
        build = await self._zygote.build()
        if build["platform"] != "cuda":
            return None
        told = self._told(options)
        ranks = Ranks.parse(told["arguments"])
        if ranks.count > len(self._gpus):
            raise Unsupported(
                f"vLLM is to run on {ranks.count} GPUs, and there are {len(self._gpus)}",
                hint="see engines.vllm.arguments",
            )
        parts = {
            "format": IMAGE_FORMAT,
            **build,
            "model": await asyncio.to_thread(self._model_key, checkpoint),
            "checkpoint": checkpoint.id,
            "arguments": told["arguments"],
            "ranks": ranks.count,
            "adapters": len(told["adapters"]) > 0,
        }
        makes_image = bool(parts["model"]) and ranks.count == ranks.tensor and not _has_draft(told["arguments"])
        part_bytes = checkpoint.manifest.data_bytes // ranks.count
        # A vocabulary is padded to what kernels like, and small layers are on every rank.
        weights_bytes = part_bytes + part_bytes // (64 if ranks.count == 1 else 8) + 64 * MiB
        besides_bytes = _ACTIVATION_BYTES + (_COMMUNICATION_BYTES if ranks.count > 1 else 0)
        return GpuPlan(
            tuple(
                RankPlan(
                    device=gpu.name,
                    key=_digest({**parts, "gpu": gpu.model, "rank": rank}) if makes_image else "",
                    weights_bytes=weights_bytes,
                    working_bytes=told["kv_cache_bytes"] + besides_bytes,
                    # vLLM makes a model in memory of its own before that is moved into an image, or views one. It
                    # has no KV cache then.
                    starting_bytes=max(0, weights_bytes - told["kv_cache_bytes"]) if makes_image else 0,
                )
                for rank, gpu in enumerate(self._gpus[: ranks.count])
            )
        )


def _keeps_what_it_read(arguments: Sequence[str]) -> bool:
    return any(argument.replace("_", "-").startswith(_KEEPING) for argument in arguments)


def _has_draft(arguments: Sequence[str]) -> bool:
    """Whether a second model guesses ahead. It may be a part of the checkpoint, and is of no use to another; no image
    has its weights. What is not known to do without counts as one."""
    said: dict[str, list[str]] = {}
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        name, _, value = argument.partition("=")
        if (name := name.replace("_", "-")).startswith(_SPECULATIVE):
            said.setdefault(name.rpartition("-config.")[2].removeprefix("--spec-"), []).append(value or following)
    is_told = bool(said)
    for value in said.pop("--speculative-config", []) + said.pop("-sc", []):
        with contextlib.suppress(ValueError, AttributeError):
            for name, told in json.loads(value).items():
                said.setdefault(name, []).append(str(told))
    methods = said.get("method", [])
    return is_told and ("model" in said or not methods or not _WITHOUT_DRAFT.issuperset(methods))


@dataclass(frozen=True, slots=True)
class Ranks:
    """In how many processes, with a GPU each, vLLM runs a model: `count`. If they are all `tensor` parallel, each has a
    part of every layer, and makes an image of it."""

    tensor: int
    count: int

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Ranks:
        """What `vllm serve` would make of these arguments; of what it would refuse, one rank: it says so itself."""
        try:
            found, _ = _parser().parse_known_args(list(arguments))
        except argparse.ArgumentError:
            return cls(1, 1)
        sizes = (max(1, found.tensor), max(1, found.pipeline), max(1, found.data))
        return cls(sizes[0], math.prod(sizes))


@functools.cache  # every swap asks, and it takes a while to make
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for short, name in (("-tp", "tensor"), ("-pp", "pipeline"), ("-dp", "data")):
        long = f"--{name}-parallel-size"
        parser.add_argument(short, long, long.replace("-", "_").replace("__", "--"), dest=name, type=int, default=1)
    return parser


def _digest(parts: object) -> str:
    return blake3(json.dumps(parts, sort_keys=True).encode()).hex()


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
