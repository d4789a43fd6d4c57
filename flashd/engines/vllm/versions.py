# SPDX-License-Identifier: Apache-2.0
"""Where do versions of vLLM differ in what we use? Here, and nowhere else.

Written for 0.22 to 0.33. What moved between them is looked for where it is, newest place first.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace
from typing import Any

import torch
import vllm
from vllm.platforms import current_platform
from vllm.utils import system_utils
from vllm.utils.argparse_utils import FlexibleArgumentParser

VERSION: str = vllm.__version__


def _found(name: str, *modules: str) -> Any:
    """The first of these modules that has it."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"vLLM {VERSION} has no {name} where flashd looks for it")


_CLI = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
_make_arg_parser = _found("make_arg_parser", *_CLI)
_validate = _found("validate_parsed_serve_args", *_CLI)
_build_client = _found(
    "build_async_engine_client", "vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server"
)
_build_app = _found("build_app", "vllm.entrypoints.launchers.app", "vllm.entrypoints.openai.api_server")
_init_app_state = _found(
    "init_app_state", "vllm.entrypoints.launchers.api_server.app_state", "vllm.entrypoints.openai.api_server"
)
_model_path = _found(
    "BaseModelPath", "vllm.entrypoints.openai.models.protocol", "vllm.entrypoints.openai.serving_models"
)
_environment = _found("compile_factors", "vllm.envs")
_get_loader = _found("get_model_loader", "vllm.model_executor.model_loader")
_world_group = _found("get_world_group", "vllm.distributed.parallel_state")


def is_cpu() -> bool:
    return bool(current_platform.is_cpu())


def is_cuda() -> bool:
    return bool(current_platform.is_cuda())


def build() -> dict[str, str]:
    """What a model's weights look like after loading depends on, besides the model and the GPU."""
    return {
        "vllm": VERSION,
        "torch": torch.__version__,
        "platform": "cpu" if is_cpu() else "cuda" if is_cuda() else "other",
        # Which kernels are chosen depends on variables, too.
        "environment": hashlib.sha256(repr(sorted(_environment().items())).encode()).hexdigest(),
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What `vllm serve` makes of these arguments. Raises ValueError for what it does not know."""
    parser = _make_arg_parser(FlexibleArgumentParser(prog="vllm serve", exit_on_error=False))
    parser.error = _refuse
    parsed: argparse.Namespace = parser.parse_args(list(arguments))
    _validate(parsed)
    return parsed


def tell_apart(arguments: argparse.Namespace, model: str) -> None:
    """vLLM finds what it compiled by a hash of its settings, and the path of a model is the same for all of ours. So
    the hash gets `model` as well: configs may be equal where different layers are quantised."""
    arguments.additional_config = {**(arguments.additional_config or {}), "flashd_model": model}


def _refuse(message: str) -> None:
    raise ValueError(message)


def engine_client(arguments: argparse.Namespace) -> AbstractAsyncContextManager[Any]:
    """vLLM's client of its engine core, which runs in processes of its own."""
    client: AbstractAsyncContextManager[Any] = _build_client(arguments)
    return client


async def application(client: Any, arguments: argparse.Namespace) -> Any:
    """The OpenAI server, as an ASGI application."""
    tasks = await client.get_supported_tasks()
    given = [arguments, tasks, client.model_config][: len(inspect.signature(_build_app).parameters)]
    app = _build_app(*given)
    wanted = inspect.signature(_init_app_state).parameters
    known = {"engine_client": client, "state": app.state, "args": arguments, "supported_tasks": tasks}
    known["vllm_config"] = client.vllm_config
    await _init_app_state(**{name: value for name, value in known.items() if name in wanted})
    return app


def weights_depend_on(config: Any) -> dict[str, Any]:
    """What the bytes and the layout of one rank's weights after loading depend on, besides the checkpoint: all that a
    server was told which could matter. Too much costs a second copy, too little a wrong answer."""
    model, parallel = config.model_config, config.parallel_config
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel")
    ranks = ("rank", "data_parallel_rank")  # the first counts anew in each part of the second, which has other experts
    described = model.hf_config.to_dict()
    for incidental in ("_name_or_path", "transformers_version"):
        described.pop(incidental, None)
    return {
        **build(),
        "gpu": current_platform.get_device_name(),
        "model": json.dumps(described, sort_keys=True, default=str),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "kv_cache": str(config.cache_config.cache_dtype),
        **{name: getattr(parallel, name, None) for name in (*sizes, *ranks)},
        # Which kernels run, and so how weights are packed for them; newer versions have more to say about it.
        **{name: repr(getattr(config, name, None)) for name in ("attention_config", "kernel_config")},
    }


def writes_weights(config: Any) -> bool:
    """Whether a server was told to do what writes to its weights, or has them written, while it serves."""
    has_transfer = getattr(config, "weight_transfer_config", None) is not None
    return has_transfer or moves_experts(config) or bool(getattr(config.model_config, "enable_sleep_mode", False))


def moves_experts(config: Any) -> bool:
    """Whether the experts of a mixture are dealt anew to its ranks while it serves."""
    return bool(getattr(config.parallel_config, "enable_eplb", False))


def has_encoder(model_config: Any) -> bool:
    """Of pictures or the like, whose output is kept for another time."""
    return any(getattr(model_config, name, False) for name in ("is_multimodal_model", "is_encoder_decoder"))


def keep_untied(model_config: Any) -> None:
    """Keeps an output layer that the checkpoint has besides the embedding, even if both have the same values: vLLM 0.32
    and newer would make one of them after loading, but a server that is shown an image has nothing to compare."""
    if hasattr(model_config, "word_embeddings_untied_by_checkpoint"):
        model_config.word_embeddings_untied_by_checkpoint = False


def is_draft(model_config: Any) -> bool:
    """Whether this is the model that guesses ahead for another."""
    return getattr(model_config, "runner_type", "") == "draft"


def has_draft(config: Any) -> bool:
    """Whether another model guesses ahead for this one; n-grams need none."""
    return is_draft(getattr(config.speculative_config, "draft_model_config", None))


def is_part_of_target(draft_config: Any, config: Any) -> bool:
    """Whether a draft model's weights are in the checkpoint that it guesses ahead for (multi-token prediction)."""
    return bool(draft_config.model == config.speculative_config.target_model_config.model)


def own_loader(load_config: Any) -> Any:
    """vLLM's, of files."""
    return _get_loader(dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={}))


def all_agree(is_so: bool) -> bool:
    """Whether it is so on every rank; each must ask."""
    group = _world_group()
    if group.world_size == 1:
        return is_so
    answer = torch.tensor(int(is_so))
    torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(answer)


def rename(app: Any, names: Sequence[str], path: str) -> None:
    """What requests may call the model from now on. The list is changed in place: everything in vLLM refers to it."""
    app.state.openai_serving_models.base_model_paths[:] = [_model_path(name=name, model_path=path) for name in names]


async def offer_adapters(app: Any, folders: Mapping[str, str]) -> Mapping[str, str]:
    """Has requests find these LoRA adapters by name, and no others; returns why vLLM does not take some."""
    serving = app.state.openai_serving_models
    refused = {}
    serving.lora_requests.clear()  # in place: everything in vLLM refers to it
    for name, folder in folders.items():
        asked = SimpleNamespace(lora_name=name, lora_path=folder, load_inplace=False, is_3d_lora_weight=False)
        answer = await serving.load_lora_adapter(asked)
        if not isinstance(answer, str):
            refused[name] = str(getattr(getattr(answer, "error", answer), "message", answer))
    return refused


def fork_processes() -> None:
    """Makes vLLM fork its processes: they have imported everything then.

    It looks at a model's class in a process of its own, lest that touches a GPU, and has it import vLLM once more: a
    fork is as far away. On a processor it insists on spawning its ranks, by an environment variable that it sets while
    it starts, so that OpenMP's threads are placed anew; none has been started in us. With CUDA it forks by itself as
    long as nobody has touched a GPU, and rightly spawns if somebody has.
    """
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    if hasattr(registry, "_run_in_subprocess"):
        registry._run_in_subprocess = _run_in_fork
    if not is_cpu():
        return
    original = system_utils.get_mp_context

    def forking() -> Any:
        return multiprocessing.get_context("fork")

    for name, module in list(sys.modules.items()):
        if name.startswith("vllm") and getattr(module, "get_mp_context", None) is original:
            module.get_mp_context = forking  # type: ignore[attr-defined]


def _run_in_fork(work: Callable[[], Any]) -> Any:
    """What `work` returns, in a process that has all that we have imported and ends with it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with os.fdopen(writer, "wb") as answer:
            try:
                pickle.dump((True, work()), answer)
            except BaseException as error:  # noqa: BLE001 -- told to the parent, which raises it
                pickle.dump((False, f"{type(error).__name__}: {error}"), answer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        raw = answer.read()
    os.waitpid(pid, 0)
    if not raw:
        raise RuntimeError("the process that was to look at the model's class died")
    is_result, result = pickle.loads(raw)
    if not is_result:
        raise RuntimeError(result)
    return result


def preload() -> None:
    """Imports what engines need and vLLM itself imports late."""
    importlib.import_module("vllm.v1.engine.async_llm")
    importlib.import_module("vllm.v1.engine.core")
    importlib.import_module("vllm.v1.executor.multiproc_executor")
    importlib.import_module("vllm.v1.executor.uniproc_executor")
    importlib.import_module("vllm.model_executor.models.registry")
    importlib.import_module("vllm.model_executor.model_loader")
    if is_cpu():
        importlib.import_module("vllm.v1.worker.cpu_worker")
    else:
        importlib.import_module("vllm.v1.worker.gpu_worker")
    for model in ("llama", "qwen2", "qwen3", "qwen3_moe"):
        importlib.import_module(f"vllm.model_executor.models.{model}")
    _make_arg_parser(FlexibleArgumentParser())  # its imports, and what it caches of every configuration class
