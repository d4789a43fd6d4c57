# SPDX-License-Identifier: Apache-2.0
"""Handles the differences between versions of vLLM, from 0.22 to 0.33.

Names that have moved between modules are looked up in the newest place first.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from multiprocessing import shared_memory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.platforms import current_platform
from vllm.utils import system_utils
from vllm.utils.argparse_utils import FlexibleArgumentParser

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from vllm.config import CacheConfig, LoadConfig, ModelConfig, VllmConfig
    from vllm.engine.protocol import EngineClient
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

VERSION: str = vllm.__version__
_NAP_S = 0.0002
_IS_IDLE = "flashd_is_idle"
_ASKED = "get_external_weight_memory"


def _found(name: str, *modules: str) -> Any:
    """Imports a name from the first of these modules that has it."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"vLLM {VERSION} has no {name} in the modules known to flashd")


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
    """Collects the factors, besides the model and the GPU, on which weights after loading depend."""
    return {
        "vllm": VERSION,
        "torch": torch.__version__,
        "platform": "cpu" if is_cpu() else "cuda" if is_cuda() else "other",
        # Environment variables affect the choice of kernels too.
        "environment": hashlib.sha256(repr(sorted(_environment().items())).encode()).hexdigest(),
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses arguments like `vllm serve`. Raises ValueError for unknown ones."""
    parser = _make_arg_parser(FlexibleArgumentParser(prog="vllm serve", exit_on_error=False))
    parser.error = _refuse
    parsed: argparse.Namespace = parser.parse_args(list(arguments))
    _validate(parsed)
    return parsed


def tell_apart(arguments: argparse.Namespace, model: str) -> None:
    """Adds `model` to the hash by which vLLM finds compiled code.

    The path in that hash is the same for all our models, and configs may be equal although different layers are
    quantised. Code for adapters that was compiled without `keep_adapters_apart` is not used either.
    """
    changes = {"flashd_adapters": "apart"} if is_cpu() and arguments.enable_lora else {}
    arguments.additional_config = {**(arguments.additional_config or {}), "flashd_model": model, **changes}


def take_likeliest(arguments: argparse.Namespace) -> None:
    """Makes greedy decoding the default of requests without a temperature, unless the user has set another default."""
    if arguments.generation_config == "auto":
        arguments.override_generation_config = {"temperature": 0.0, **(arguments.override_generation_config or {})}


def _refuse(message: str) -> None:
    raise ValueError(message)


def engine_client(arguments: argparse.Namespace) -> AbstractAsyncContextManager[EngineClient]:
    """Returns vLLM's client of its engine core, which runs in separate processes."""
    client: AbstractAsyncContextManager[EngineClient] = _build_client(arguments)
    return client


async def application(client: EngineClient, arguments: argparse.Namespace) -> Starlette:
    """Returns vLLM's OpenAI server as an ASGI application."""
    tasks = await client.get_supported_tasks()
    given = [arguments, tasks, client.model_config][: len(inspect.signature(_build_app).parameters)]
    app = _build_app(*given)
    wanted = inspect.signature(_init_app_state).parameters
    known = {"engine_client": client, "state": app.state, "args": arguments, "supported_tasks": tasks}
    known["vllm_config"] = client.vllm_config
    await _init_app_state(**{name: value for name, value in known.items() if name in wanted})
    return app


def before_memory_is_wanted(fit: Callable[[CacheConfig, int, int], None], load_format: str) -> None:
    """Calls `fit` with the cache's configuration, free and total memory, before vLLM refuses to start for lack of it.

    From 0.32 on, vLLM asks the loader before it checks the memory of a GPU, and the loader calls `fit`. Call this once
    in each process.
    """
    if is_cpu():
        _fit_on_cpu(fit, load_format)
    elif is_cuda() and not hasattr(_found("BaseModelLoader", "vllm.model_executor.model_loader.base_loader"), _ASKED):
        from vllm.config import get_current_vllm_config
        from vllm.v1.worker import utils

        wanted = utils.request_memory

        @functools.wraps(wanted)
        def wanting(snapshot: Any, cache_config: CacheConfig, *arguments: object) -> object:
            if get_current_vllm_config().load_config.load_format == load_format:
                fit(cache_config, snapshot.free_memory, snapshot.total_memory)
            return wanted(snapshot, cache_config, *arguments)

        utils.request_memory = wanting


def _fit_on_cpu(fit: Callable[[CacheConfig, int, int], None], load_format: str) -> None:
    """Fits the memory when the configuration is made, because a CPU worker checks memory before it knows the loader."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node
    except ImportError:
        return  # an older version, which never refuses
    made = EngineArgs.create_engine_config

    @functools.wraps(made)
    def making(*arguments: object, **options: object) -> VllmConfig:
        config = made(*arguments, **options)
        if config.load_config.load_format == load_format and config.cache_config.kv_cache_memory_bytes is None:
            for node in get_visible_memory_node():
                memory = get_memory_node_info(node)
                fit(config.cache_config, memory.available_memory, memory.total_memory)
        return config

    EngineArgs.create_engine_config = making


def weights_depend_on(config: VllmConfig) -> dict[str, object]:
    """Collects all settings on which bytes and layout of one rank's weights after loading may depend.

    A setting too many costs a second copy of weights, but a missing one could cause wrong answers.
    """
    model, parallel = config.model_config, config.parallel_config
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel")
    ranks = ("rank", "data_parallel_rank")  # the first restarts in each part of the second, which has other experts
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
        # Choice of kernels, for which weights are packed; newer versions have more such settings.
        **{name: repr(getattr(config, name, None)) for name in ("attention_config", "kernel_config")},
    }


def writes_weights(config: VllmConfig) -> bool:
    """Tells whether a server uses features that write to its weights while it serves."""
    has_transfer = getattr(config, "weight_transfer_config", None) is not None
    return has_transfer or moves_experts(config) or bool(getattr(config.model_config, "enable_sleep_mode", False))


def moves_experts(config: VllmConfig) -> bool:
    """Tells whether experts are redistributed between ranks while the server runs."""
    return bool(getattr(config.parallel_config, "enable_eplb", False))


def has_encoder(model_config: ModelConfig) -> bool:
    """Tells whether the model has an encoder, for images or the like, whose outputs vLLM caches."""
    return any(getattr(model_config, name, False) for name in ("is_multimodal_model", "is_encoder_decoder"))


def keep_untied(model_config: ModelConfig) -> None:
    """Keeps an output layer that a checkpoint has in addition to the embedding, even if both are equal.

    vLLM 0.32 and newer would tie equal ones after loading, but a server that maps an image could not compare them.
    """
    if hasattr(model_config, "word_embeddings_untied_by_checkpoint"):
        model_config.word_embeddings_untied_by_checkpoint = False


def is_draft(model_config: ModelConfig) -> bool:
    """Tells whether this is a draft model for speculative decoding."""
    return getattr(model_config, "runner_type", "") == "draft"


def has_draft(config: VllmConfig) -> bool:
    """Tells whether this model has a draft model; speculative decoding by n-grams needs none."""
    return is_draft(getattr(config.speculative_config, "draft_model_config", None))


def is_part_of_target(draft_config: ModelConfig, config: VllmConfig) -> bool:
    """Tells whether a draft model's weights are in its target's checkpoint (multi-token prediction)."""
    return bool(draft_config.model == config.speculative_config.target_model_config.model)


def own_loader(load_config: LoadConfig) -> BaseModelLoader:
    """Returns vLLM's own loader, which reads files."""
    return _get_loader(dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={}))


def all_agree(is_so: bool) -> bool:
    """Tells whether a condition holds on all ranks. Every rank must call it."""
    group = _world_group()
    if group.world_size == 1:
        return is_so
    answer = torch.tensor(int(is_so))
    torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(answer)


def rename(app: Starlette, names: Sequence[str], path: str) -> None:
    """Sets the names that requests may use for the model. Changes vLLM's list in place, to which all of vLLM refers."""
    app.state.openai_serving_models.base_model_paths[:] = [_model_path(name=name, model_path=path) for name in names]


async def offer_adapters(app: Starlette, folders: Mapping[str, str]) -> Mapping[str, str]:
    """Makes exactly these LoRA adapters available to requests. Returns the reasons for which vLLM refuses some."""
    serving = app.state.openai_serving_models
    refused = {}
    serving.lora_requests.clear()  # in place, because all of vLLM refers to it
    for name, folder in folders.items():
        asked = SimpleNamespace(lora_name=name, lora_path=folder, load_inplace=False, is_3d_lora_weight=False)
        answer = await serving.load_lora_adapter(asked)
        if not isinstance(answer, str):
            refused[name] = str(getattr(getattr(answer, "error", answer), "message", answer))
    return refused


def keep_adapters_apart(config: VllmConfig) -> None:
    """Makes vLLM apply adapters on a CPU only to the requests that name them, also where a step computes others too.

    Tokens of the others have the index -1, with which vLLM's PyTorch operations take the last adapter instead of none
    (https://github.com/vllm-project/vllm/pull/48421). Zeros in their place add nothing.
    """
    if config.lora_config is None or not is_cpu():
        return
    names = ("vllm.lora.ops.torch_ops.lora_ops", "vllm.lora.ops.torch_ops", "vllm.lora.punica_wrapper.punica_cpu")
    modules: list[Any] = [importlib.import_module(name) for name in names]
    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        if not hasattr(operation := getattr(modules[0], name), "__wrapped__"):
            for module in modules:
                setattr(module, name, _only_where_named(operation))


def _only_where_named(operation: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(operation)
    def applied(
        inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, indices: torch.Tensor,
        *more: object, **named: object,
    ) -> None:  # fmt: skip
        operation(torch.where((indices < 0).unsqueeze(1), 0, inputs), weights, output, indices, *more, **named)

    return applied


def before_each_request(client: EngineClient, change: Callable[[Any], None]) -> None:
    """Calls `change` with every request just before it is sent to the engine core.

    All of vLLM's interfaces, for text, tokens, images and embeddings, come together there.
    """
    core = client.engine_core
    send = core.add_request_async

    @functools.wraps(send)
    async def sending(request: Any) -> None:
        change(request)
        await send(request)

    core.add_request_async = sending


def keeps_prefixes(config: VllmConfig) -> bool:
    """Tells whether cached prefixes of a checkpoint are still right after the engine has held another one.

    They are not if clients may write other weights into the engine, or if vLLM computes the scales of the KV cache from
    the first requests. Of several engine cores, only the first answers `is_idle`.
    """
    are_written = getattr(config, "weight_transfer_config", None) is not None
    are_scaled = bool(getattr(config.cache_config, "calculate_kv_scales", False))
    return not are_written and not are_scaled and config.parallel_config.data_parallel_size == 1


def answer_is_idle() -> None:
    """Makes the engine core answer `is_idle`. Call this in its process, or in one from which it is forked."""
    if (core := sys.modules.get("vllm.v1.engine.core")) is not None:  # otherwise this is another process of vLLM
        setattr(core.EngineCore, _IS_IDLE, lambda self: not self.scheduler.has_unfinished_requests())


async def is_idle(client: EngineClient) -> bool:
    """Tells whether the engine core has no requests. It carries out all calls in the order in which they are made."""
    return bool(await client.engine_core.call_utility_async(_IS_IDLE))


async def abort_all(client: EngineClient) -> None:
    """Aborts every request that vLLM still generates for.

    vLLM itself does not abort a request that is cancelled in the moment in which it is handed to the engine core
    (`AsyncLLM.generate`, 0.22 to 0.33): such a request runs to its last token, though nothing awaits it.
    """
    if left := list(client.output_processor.request_states):
        await client.abort(left, internal=True)


def fork_processes() -> None:
    """Makes vLLM fork its processes, which then need no imports.

    vLLM inspects a model's class in a separate process, lest that initialise CUDA, which would import vLLM again; a
    fork protects as well. On a CPU it always spawns its ranks, by an environment variable that it sets at its start, so
    that OpenMP's threads are placed again; we have not started any. With CUDA, vLLM itself forks unless CUDA is
    initialised, and then has to spawn.
    """
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    if hasattr(registry, "_run_in_subprocess"):
        registry._run_in_subprocess = _run_in_fork
    if not is_cpu():
        return
    original = system_utils.get_mp_context

    def forking() -> multiprocessing.context.ForkContext:
        return multiprocessing.get_context("fork")

    for name, module in list(sys.modules.items()):
        if name.startswith("vllm") and getattr(module, "get_mp_context", None) is original:
            module.get_mp_context = forking  # type: ignore[attr-defined]


def tokenise_at_once() -> None:
    """Makes vLLM 0.23 tokenise a prompt at once, instead of waiting 2 ms for others to tokenise together.

    Newer versions do not wait (vllm/utils/async_utils.py has no AsyncMicrobatchTokenizer there).
    """
    module: Any = importlib.import_module("vllm.utils.async_utils")
    if (tokenizer := getattr(module, "AsyncMicrobatchTokenizer", None)) is not None:
        tokenizer.__init__ = functools.partialmethod(tokenizer.__init__, batch_wait_timeout_s=0.0)


def nap_between_steps() -> None:
    """Makes vLLM's processes on a CPU sleep a little whenever they look in vain for each other's messages.

    For a second after each message they would look in a loop that only yields, on cores that compute the model. A step
    takes milliseconds there. On a GPU, where it may take less, the CPU has nothing else to do.
    """
    module: Any = importlib.import_module("vllm.distributed.device_communicators.shm_broadcast")
    if is_cpu() and hasattr(module, "sched_yield"):
        module.sched_yield = functools.partial(time.sleep, _NAP_S)


def name_shared_memory() -> None:
    """Has the ranks on a CPU name the memory that they share like multiprocessing names its own in this process.

    It is left if they are killed. By these names, the zygote finds it after the end of their process group.
    """
    if not is_cpu():
        return
    module: Any = importlib.import_module("vllm.distributed.device_communicators.cpu_communicator")
    shared: Any = getattr(module, "_CPUSHMDistributed", None)
    if make_name := getattr(shared, "make_group_name", None):
        prefix = shared_memory._SHM_NAME_PREFIX.removeprefix("/")  # type: ignore[attr-defined]
        shared.make_group_name = staticmethod(lambda communicator: f"{prefix}{make_name(communicator)}")


def _run_in_fork(work: Callable[[], object]) -> object:
    """Runs `work` in a forked process, which has all our imports, and returns its result."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with os.fdopen(writer, "wb") as answer:
            try:
                pickle.dump((True, work()), answer)
            except BaseException as error:  # noqa: BLE001 -- sent to the parent, which raises it
                pickle.dump((False, f"{type(error).__name__}: {error}"), answer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        raw = answer.read()
    os.waitpid(pid, 0)
    if not raw:
        raise RuntimeError("the process that inspects the model's class died")
    is_result, result = pickle.loads(raw)
    if not is_result:
        raise RuntimeError(result)
    return result


def preload() -> None:
    """Imports modules that engines need but vLLM imports late."""
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
    _make_arg_parser(FlexibleArgumentParser())  # its imports, and its caches for all configuration classes
