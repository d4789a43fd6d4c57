# SPDX-License-Identifier: Apache-2.0
"""The factory of vLLM engines, which knows which checkpoints can share an engine, and how its processes are started."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.manifest import VOLATILE, context_length_of, read_config
from flashd.engines import codec
from flashd.engines.control import VLLM_IMAGE_FORMAT
from flashd.engines.engine import NO_OPTIONS, EngineOptions, GpuPlan, RankPlan
from flashd.engines.kv_cache import AUTO, LEAST_BYTES, MOST_SEQUENCES, bytes_for_context
from flashd.engines.messages import Tuning
from flashd.engines.process import Settings, ZygoteFactory
from flashd.errors import Unsupported
from flashd.io.cuda import Gpu
from flashd.io.streamer import blake3
from flashd.units import GiB, MiB

_ACTIVATION_BYTES = 1 * GiB
_USUAL_CACHE_BYTES = 2 * GiB  # of one for a model whose need is unknown
_FACTORS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_COMMUNICATION_BYTES = 1 * GiB  # memory of NCCL and of vLLM's own all-reduce on each of several GPUs
# Quantisation methods with which images may be possible; the engine decides (workers/vllm/quantised.py). Of the first,
# vLLM replaces weights in place.
_TAKEN_IN_PLACE = {"fp8", "awq", "gptq", "compressed-tensors"}
_PARKED = _TAKEN_IN_PLACE | {"modelopt", "mxfp4"}
# The arguments for speculative decoding, and the methods that need no second model.
_SPECULATIVE = ("--speculative-config", "--spec-", "-sc")
_WITHOUT_DRAFT = {"ngram", "ngram_gpu", "suffix"}
# Arguments with which vLLM keeps KV blocks, or encoded pictures, where no reset reaches them, without a record of the
# weights that made them.
_KEEPING = ("--kv-transfer", "--kv-offloading", "--ec-transfer")
# Entries about themselves by the libraries that save fine-tunes, which nothing reads.
_INCIDENTAL = (VOLATILE - {"torch_dtype", "dtype"}) | {"is_local", "local_files_only", "name_or_path"}
_SETTINGS = {"config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"}

REMEDY = "flash engine install vllm, or set engines.vllm.python to an interpreter that has vLLM and flashd"


def environment(caches: Path) -> Mapping[str, str]:
    """Returns environment variables for vLLM's processes. `caches` is the folder for compiled code."""
    return {
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "VLLM_USE_MEGA_AOT_ARTIFACT": "1",  # load compiled code as it is, where vLLM would trace it again
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_RPC_BASE_PATH": ".",  # its sockets are in the engine's own folder, which is its working directory
        "VLLM_SERVER_DEV_MODE": "0",  # development endpoints allow everything, and the daemon needs none
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class VllmFactory(ZygoteFactory):
    """Makes vLLM engines."""

    copies_checkpoints = True

    def __init__(self, settings: Settings, gpus: Sequence[Gpu]) -> None:
        """`gpus`: the GPUs that a CUDA build of vLLM may use, in order of preference."""
        super().__init__("vllm", "flashd.workers.vllm.main", settings, remedy=REMEDY)
        self._gpus = gpus
        self._keys: dict[str, str] = {}
        self._contexts: dict[tuple[object, ...], int] = {}

    def rebind_key(self, checkpoint: Checkpoint, options: EngineOptions = NO_OPTIONS) -> str:
        """Returns a digest over everything that vLLM reads of a model, or is told about it, only at its start."""
        model_key, tuning = self._model_key(checkpoint), self._tuning(options)
        own = checkpoint.id if _has_draft(tuning.arguments) or _keeps_what_it_read(tuning.arguments) else ""
        return _digest({"model": model_key, "own": own, **codec.to_json(tuning)}) if model_key else ""

    def _tuning(self, options: EngineOptions) -> Tuning:
        all_get = self._settings.tuning
        kv_cache_bytes = all_get.kv_cache_bytes if options.kv_cache_bytes is None else options.kv_cache_bytes
        return replace(all_get, arguments=(*all_get.arguments, *options.arguments), kv_cache_bytes=kv_cache_bytes)

    def _model_key(self, checkpoint: Checkpoint) -> str:
        """Returns the model's part of the key: configuration, layout, dtype, tokenizer, template, sampling defaults.

        vLLM cannot replace all kinds of quantised weights in place. A quantised model that it can park at least gets
        the key of its own checkpoint, so that its engine can be woken with it; all others get no key.
        """
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
        """Plans an engine. Raises Unsupported if it has more ranks than there are GPUs."""
        if not self._gpus:
            return None
        build = await self._zygote.build()
        if build["platform"] != "cuda":
            return None
        tuning = self._tuning(options)
        ranks = Ranks.parse(tuning.arguments)
        if ranks.count > len(self._gpus):
            raise Unsupported(
                f"vLLM needs {ranks.count} GPUs, but there are {len(self._gpus)}",
                hint="change the parallelism in engines.vllm.arguments",
            )
        parts = {
            "format": VLLM_IMAGE_FORMAT,
            **build,
            "model": await asyncio.to_thread(self._model_key, checkpoint),
            "checkpoint": checkpoint.id,
            "arguments": tuning.arguments,
            "ranks": ranks.count,
            "adapters": len(tuning.adapters) > 0,
        }
        makes_image = bool(parts["model"]) and ranks.count == ranks.tensor and not _has_draft(tuning.arguments)
        part_bytes = checkpoint.manifest.data_bytes // ranks.count
        # Vocabularies are padded for the kernels, some of which unpack zero points; small layers are on every rank.
        growth = 8 if ranks.count > 1 else 16 if checkpoint.manifest.quantization else 64
        weights_bytes = part_bytes + part_bytes // growth + 64 * MiB
        besides_bytes = _ACTIVATION_BYTES + (_COMMUNICATION_BYTES if ranks.count > 1 else 0)
        cache_bytes, most_cache_bytes = tuning.kv_cache_bytes, 0
        if cache_bytes == AUTO:
            cache_bytes = await self._context_bytes(checkpoint, tuning.arguments, ranks.tensor)
            cache_bytes = max(LEAST_BYTES, cache_bytes)
            most_cache_bytes = MOST_SEQUENCES * cache_bytes
        return GpuPlan(
            tuple(
                RankPlan(
                    device=gpu.name,
                    key=_digest({**parts, "gpu": gpu.model, "rank": rank}) if makes_image else "",
                    weights_bytes=weights_bytes,
                    besides_bytes=besides_bytes,
                    cache_bytes=cache_bytes,
                    # Before its weights are moved into an image, or replaced by views of one, vLLM creates the model
                    # in its own memory.
                    building_bytes=weights_bytes if makes_image else 0,
                    most_cache_bytes=most_cache_bytes,
                )
                for rank, gpu in enumerate(self._gpus[: ranks.count])
            )
        )

    async def _context_bytes(self, checkpoint: Checkpoint, arguments: tuple[str, ...], ranks: int) -> int:
        """Reads the configuration once: a swap plans several times."""
        key = (checkpoint.id, arguments, ranks)
        if key not in self._contexts:
            self._contexts[key] = await asyncio.to_thread(_context_bytes, checkpoint, arguments, ranks)
        return self._contexts[key]


def _context_bytes(checkpoint: Checkpoint, arguments: Sequence[str], ranks: int) -> int:
    """Returns the KV cache that each rank needs for the model's whole context, or what the arguments allow of it.

    If its configuration does not say, that is as much as engines have by default.
    """
    config = read_config(checkpoint.side_files()["config.json"].read_bytes())
    told = _parsed(arguments)
    tokens = _as_tokens(told.max_model_len) or context_length_of(config)
    item_bytes = 1 if told.kv_cache_dtype.startswith("fp8") else 2
    return bytes_for_context(config, tokens, ranks=ranks, item_bytes=item_bytes) or _USUAL_CACHE_BYTES


def _as_tokens(text: str) -> int:
    """Parses `--max-model-len`, such as 8192, 8k (8,000) or 8K (8,192), as vLLM does; 0 for "auto" and other words."""
    number, factor = (text[:-1], _FACTORS[text[-1]]) if text[-1:] in _FACTORS else (text, 1)
    try:
        return max(0, int(float(number) * factor))
    except (ValueError, OverflowError):
        return 0


def _keeps_what_it_read(arguments: Sequence[str]) -> bool:
    return any(argument.replace("_", "-").startswith(_KEEPING) for argument in arguments)


def _has_draft(arguments: Sequence[str]) -> bool:
    """Tells whether arguments for speculative decoding involve a second model.

    It may be a part of the checkpoint, is of no use to another one, and no image contains its weights. Methods that are
    not known to need none count as well.
    """
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
    """The processes, each with a GPU, in which vLLM runs a model; `count` is their number.

    If all of them are `tensor` parallel, each has a part of every layer, and makes an image of its part.
    """

    tensor: int
    count: int

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Ranks:
        """Parses the parallelism arguments like `vllm serve`; one rank if they are invalid."""
        found = _parsed(arguments)
        sizes = (max(1, found.tensor), max(1, found.pipeline), max(1, found.data))
        return cls(sizes[0], math.prod(sizes))


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments that plans depend on. Invalid ones count as none: vLLM reports the error itself."""
    try:
        found, _ = _parser().parse_known_args(list(arguments))
    except argparse.ArgumentError:
        found = _parser().parse_args([])
    return found


@functools.cache  # for every swap, and it is slow to make
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for short, name in (("-tp", "tensor"), ("-pp", "pipeline"), ("-dp", "data")):
        long = f"--{name}-parallel-size"
        parser.add_argument(short, long, long.replace("-", "_").replace("__", "--"), dest=name, type=int, default=1)
    for name in ("max-model-len", "kv-cache-dtype"):
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", default="")
    return parser


def _digest(parts: object) -> str:
    return blake3(json.dumps(parts, sort_keys=True).encode()).hex()


def _essence(path: Path) -> str:
    """Returns a digest of a settings file without incidental entries."""
    raw = path.read_bytes()
    try:
        table: object = json.loads(raw)
    except ValueError:
        return blake3(raw).hex()
    if isinstance(table, dict):
        table = {name: value for name, value in table.items() if name not in _INCIDENTAL}
    return _digest(table)
