# SPDX-License-Identifier: Apache-2.0
"""Settings: one dataclass for each section, each field with its default and its documentation.

A field that ends in `_bytes` is a size: its key has no suffix, and its value is written as people write sizes
(`host_budget = "64GB"`). Settings that differ for one model have a section of their own, `[models."NAME"]`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flashd.errors import InvalidArgument
from flashd.units import GiB, MiB


def _setting(default: Any, doc: str, *, live: bool = False) -> Any:
    """A field with its documentation; `live` if a change takes effect at once."""
    return field(default=default, metadata={"doc": doc, "live": live})


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """[store]: the checkpoints on disk."""

    path: Path = _setting(  # noqa: RUF009 -- it is field(), with less to repeat
        Path(), "Folder of the checkpoints. Default: store, in the state directory."
    )
    quota_bytes: int = _setting(0, "Most disk space that checkpoints may take; 0 for no limit.")
    keep_versions: int = _setting(1, "Number of older versions kept of each model.")
    private_group: str = _setting("", "Group whose members see private models too. Default: only the owner, and root.")


@dataclass(frozen=True, slots=True)
class InboxConfig:
    """[inbox]: folders whose sources are converted to models automatically."""

    folders: tuple[Path, ...] = _setting((), "Watched folders. Default: ~/models for a user.")
    settle_s: float = _setting(2.0, "A source is converted once it has not changed for this long.")
    rescan_s: float = _setting(30.0, "Interval between scans of the folders, which need no event from the kernel.")
    private: bool = _setting(False, "Make models converted from the inbox private to the inbox's owner.")
    on_remove: Literal["keep", "remove"] = _setting(
        "keep", "Whether to keep or remove a model when its source is deleted from the inbox.", live=True
    )


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """[memory]: the pools of host and GPU memory."""

    host_budget_bytes: int = _setting(0, "Most host memory that arenas may take; 0 chooses by the machine.")
    huge_pages: Literal["auto", "off"] = _setting("auto", "Whether arenas use huge pages where the machine has them.")
    device_budget_bytes: int = _setting(0, "Most memory of each GPU that arenas may take; 0: all but the reserve.")
    device_reserve_bytes: int = _setting(
        8 * GiB, "Memory of each GPU left to engines and other programs; never more than half of the GPU's memory."
    )
    unified: Literal["auto", True, False] = _setting(
        "auto", "Whether the GPU uses host memory as its own, so that weights are never copied; auto asks the GPU."
    )
    simulated_device_bytes: int = _setting(
        0, "Size of a GPU to simulate in host memory, for development on a machine without one; 0 for none."
    )
    prewarm: tuple[str, ...] = _setting(
        (), "Models to load when the daemon starts, in this order, as far as they fit into memory."
    )
    prewarm_tier: Literal["host", "device"] = _setting(
        "host", "Tier into which prewarm loads; device means the first GPU."
    )


@dataclass(frozen=True, slots=True)
class StreamerConfig:
    """[streamer]: reads from disk into memory."""

    block_bytes: int = _setting(8 * MiB, "Size of one read.")
    depth: int = _setting(12, "Reads in flight.")
    backend: Literal["auto", "io_uring", "threads"] = _setting("auto", "How reads are issued.")
    direct: bool = _setting(True, "Bypass the page cache with O_DIRECT where the file system supports it.")
    verify: bool = _setting(True, "Compare loaded weights with their digests.")
    stall_timeout_s: float = _setting(
        180.0,
        "Time without progress after which a transfer counts as stuck, and the service manager restarts the daemon; "
        "0: never.",
        live=True,
    )
    staging_bytes: int = _setting(256 * MiB, "Pinned host memory per GPU through which reads for that GPU pass.")


@dataclass(frozen=True, slots=True)
class TorchConfig:
    """[engines.torch]: the engine on PyTorch and transformers."""

    python: str = _setting(
        "",
        "Interpreter that has torch, transformers and this version of flashd. "
        "Default: the environment made by flash engine install, else the daemon's own interpreter.",
    )
    threads: int = _setting(0, "Threads of each engine, at most one per core; 0 for as many as that.")
    max_tokens_default: int = _setting(512, "Most tokens to generate for a request that sets no limit.")


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """[engines.vllm]: vLLM, in an environment of its own."""

    python: str = _setting(
        "",
        "Interpreter that has vLLM and this version of flashd. "
        "Default: the environment made by flash engine install, else the daemon's own interpreter.",
    )
    arguments: tuple[str, ...] = _setting((), "Further arguments for every engine, as for vllm serve.")
    environment: tuple[str, ...] = _setting(
        (), "NAME=VALUE variables for its processes, added to the daemon's own, such as NCCL_* and TORCH_*."
    )
    adapters: tuple[str, ...] = _setting(
        (), "LoRA adapters to apply to the requests that name them: NAME=FOLDER, or FOLDER."
    )
    kv_cache_bytes: int | Literal["auto"] = _setting(
        2 * GiB,
        "KV cache of each engine. auto: what the model's context needs, and GPU memory that is free when the engine "
        "starts, except for one more such model. 0 lets vLLM choose, which takes most of the memory.",
    )


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """[engines.llama]: llama.cpp's llama-server, which answers with GGUF models."""

    server: str = _setting(
        "", "Path of llama-server. Default: the one made by flash engine install llama.cpp, else the one on PATH."
    )
    context: int = _setting(
        8192, "Most tokens of a request and its answer; never more than the model was made for. 0: as many as that."
    )
    threads: int = _setting(0, "Threads of each engine, at most one per core; 0 for as many as that.")
    arguments: tuple[str, ...] = _setting((), "Further arguments for every engine, as for llama-server.")


@dataclass(frozen=True, slots=True)
class EnginesConfig:
    """[engines]: the inference processes."""

    default: Literal["auto", "torch", "vllm"] = _setting(
        "auto",
        "Kind of engine for a swap that names none. auto: vllm if there is a GPU and vLLM is installed, else torch. "
        "GGUF models always go to llama.cpp.",
    )
    warm_up: bool = _setting(True, "Import the framework before the first swap; costs its memory from then on.")
    warm_new: bool = _setting(
        True, "Load a new model and make its image while flashd is idle, if there is free memory for it.", live=True
    )
    max_parked: int = _setting(2, "Most parked engines to keep; the one parked longest ago is stopped first.")
    spare_bytes: int = _setting(
        0,
        "Available memory of the machine below which parked engines are stopped; 0: a 64th of its memory.",
        live=True,
    )
    drain_timeout_s: float = _setting(10.0, "Time that requests in flight have to finish before a swap cuts them off.")
    start_timeout_s: float = _setting(
        600.0,
        "Time after which an engine that does not answer has failed. "
        "The first engine of an architecture takes longer, because it compiles.",
    )
    idle_timeout_s: float = _setting(
        0.0,
        "Time without requests after which the active model is parked until the next request wakes it; 0: never.",
        live=True,
    )
    on_idle: Literal["park", "evict"] = _setting(
        "park", "Whether an idle model is only parked, or also evicted from memory.", live=True
    )
    prewarm: str = _setting("", "Model to make active when the daemon starts, unless one is. Default: none.")
    per_architecture: int = _setting(
        2,
        "Most engines on GPUs that serve models of one architecture at once. Models share an engine by turns, and get "
        "another one if they take turns often and enough memory is free: the GPU's, and the machine's.",
    )
    turn_s: float = _setting(
        2.0,
        "Time that a model keeps its engine while the gateway has requests for another that needs it. "
        "What is being generated then is finished.",
    )
    torch: TorchConfig = field(default_factory=TorchConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)
    llama: LlamaConfig = field(default_factory=LlamaConfig)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """[models.NAME]: settings that differ for one model; "default" takes the value from [engines]."""

    engine: Literal["default", "torch", "vllm"] = _setting(
        "default", "Kind of engine for the model NAME, for a swap that names none.", live=True
    )
    idle_timeout_s: float | Literal["default"] = _setting(
        "default", "The same as engines.idle_timeout_s, for this model; 0: it stays active.", live=True
    )
    arguments: tuple[str, ...] = _setting(
        (),
        "Arguments for a vLLM or llama.cpp engine started for this model, after engines.vllm.arguments or "
        "engines.llama.arguments.",
        live=True,
    )
    kv_cache_bytes: int | Literal["default", "auto"] = _setting(
        "default", "KV cache of its vLLM engine, as engines.vllm.kv_cache.", live=True
    )


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """[limits]: the most that one user may have at once. One connection has at most half of what ends with it."""

    calls: int = _setting(256, "Most calls of one user that are waiting for their answers.", live=True)
    jobs: int = _setting(256, "Most unfinished jobs of one user.", live=True)
    leases: int = _setting(512, "Most leases of one user.", live=True)
    imports: int = _setting(16, "Most imports of one user that are waiting for files.", live=True)
    descriptors: int = _setting(8192, "Most files that one user's unfinished imports hold open.", live=True)
    models: int = _setting(
        2000, "Most models of one user. Models made from the machine's own models folder do not count.", live=True
    )


@dataclass(frozen=True, slots=True)
class BusConfig:
    """[bus]: the D-Bus address of the daemon."""

    address: str = _setting("", "session, system or a D-Bus address. Default: system for root, else session.")


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """[gateway]: the HTTP address of all models."""

    addresses: tuple[str, ...] = _setting(
        ("127.0.0.1:8434",),
        "Where the gateway of flash start listens: HOST:PORT, and nowhere for an empty list. "
        "The machine's gateway listens where flashd-gateway.socket says.",
    )
    hosts: tuple[str, ...] = _setting(
        (), "Names beside localhost by which requests without a token may call the gateway, such as a proxy's."
    )
    origins: tuple[str, ...] = _setting(
        (), "Web sites whose pages may use the gateway without a token, such as http://localhost:3000."
    )
    change_models: bool = _setting(
        False,
        "Let requests without a token pull and remove models, as Ollama's programs do, and change them at the page.",
    )
    pull: bool = _setting(
        False,
        "Pull the model that a request names, OWNER/NAME, if it is not here; its client waits meanwhile. "
        "Only for requests that may pull models: see gateway.change_models.",
    )
    progress: bool = _setting(
        False, "Tell the clients of streams as text of the answer what they wait for, not as a comment of the stream."
    )
    page: bool = _setting(True, "Show the page at /, and the state of the machine at /flashd/v1, which it is made of.")
    history: int = _setting(
        10_000,
        "Requests, swaps and other jobs that the page remembers when the gateway is started again, without what was "
        "asked and answered; 0 for none.",
    )
    max_waiting: int = _setting(256, "Most requests that wait for one model; further ones are refused.")


@dataclass(frozen=True, slots=True)
class Config:
    """The settings, by section."""

    store: StoreConfig = field(default_factory=StoreConfig)
    inbox: InboxConfig = field(default_factory=InboxConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    streamer: StreamerConfig = field(default_factory=StreamerConfig)
    engines: EnginesConfig = field(default_factory=EnginesConfig)
    models: Mapping[str, ModelConfig] = field(default_factory=dict)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    bus: BusConfig = field(default_factory=BusConfig)

    def model(self, *names: str) -> ModelConfig:
        """Returns the settings of a model that has these names; the first of them that is configured counts."""
        return next((self.models[name] for name in names if name in self.models), ModelConfig())


def engine_python(config: Config, kind: str, installed: str) -> str:
    """Returns the interpreter for engines of a kind: the configured one, else the installed one, else our own."""
    configured = {"torch": config.engines.torch.python, "vllm": config.engines.vllm.python}.get(kind)
    return configured or installed or sys.executable


def variables(assignments: Sequence[str], key: str) -> Mapping[str, str]:
    """Parses NAME=VALUE assignments. Raises InvalidArgument, which names the setting `key`, for any other text."""
    for assignment in assignments:
        if not assignment.partition("=")[0] or "=" not in assignment:
            raise InvalidArgument(f"{key} has {assignment!r}", hint='write it like ["NAME=VALUE"]')
    return dict(assignment.split("=", 1) for assignment in assignments)
