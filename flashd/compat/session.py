# SPDX-License-Identifier: Apache-2.0
"""What do the functions of flashtensors do here? They are the methods of a session, which is a client of the daemon."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal, TypedDict

from flashd import client as clients
from flashd import obtaining, starting
from flashd.client import Client, Model
from flashd.compat import modules, settings
from flashd.compat.language_model import LanguageModel
from flashd.errors import InvalidArgument, NotAuthorized, NotFound, Unavailable

log = logging.getLogger("flashtensors")

Backend = Literal["vllm", "transformers", "auto"]

_STOP_S = 60.0
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_GENERATES_TEXT = "ForCausalLM"


class NoServer(Unavailable, ConnectionError):
    """No daemon runs. Programs that were written for flashtensors expect a ConnectionError then."""


class Metrics(TypedDict):
    """Seconds, and bytes. Download, conversion and registration overlap, and all count as `download_time`; what the
    daemon has already takes none."""

    total_time: float
    download_time: float
    transform_time: float
    register_time: float
    model_size: int


class Registration(TypedDict):
    """What `register_model` returns; `path` is the checkpoint's folder in the store."""

    status: Literal["success"]
    backend: str
    model: str
    path: str
    metrics: Metrics


class ModelInfo(TypedDict):
    """What `get_model_info` says of a model. Sizes in bytes, times in seconds since the epoch (0 for never).

    `backend` is `auto`, which any of them can be chosen in place of, and `ranks` 1: one checkpoint serves them all.
    """

    model_id: str
    backend: Backend
    ranks: int
    path: str
    size: int
    dtype: str
    architecture: str
    tensor_count: int
    residency: str
    active: bool
    created_at: int
    last_used_at: int


class Session:
    """One program's use of the daemon. Each call connects anew, so a session may be used from any thread."""

    def __init__(self) -> None:
        self._started: subprocess.Popen[bytes] | None = None

    # -- the daemon --------------------------------------------------------------------------------------------------

    def configure(
        self,
        storage_path: str | os.PathLike[str] | None = None,
        mem_pool_size: int | None = None,
        chunk_size: int | None = None,
        num_threads: int | None = None,
        gpu_memory_utilization: float | None = None,
        server_host: str | None = None,
        server_port: int | None = None,
        registration_required: bool = False,
    ) -> None:
        """Sees to it that a daemon runs, as `flash start` does, and has these settings if it is started now.

        `storage_path` is `store.path` (a folder `flashd` in it), `mem_pool_size` `memory.host_budget`, `chunk_size`
        `streamer.block`, `num_threads` `streamer.depth`; sizes in bytes. The others mean nothing to flashd: engines
        take a KV cache of a size that is set (`engines.vllm.kv_cache`), and nobody listens on the network.

        Raises InvalidArgument, or Unavailable if no daemon can be started.
        """
        if gpu_memory_utilization is not None and not 0 < gpu_memory_utilization <= 1:
            raise InvalidArgument(f"gpu_memory_utilization cannot be {gpu_memory_utilization}", hint="0.85, say")
        meant = settings.wanted(storage_path, mem_pool_size, chunk_size, num_threads)
        for name, value in (("server_host", server_host), ("server_port", server_port)):
            if value is not None:
                log.info("%s=%s: flashd is reached over D-Bus, and listens on no network", name, value)
        if registration_required:
            log.info("registration_required: a model that is not registered is registered when it is loaded")
        try:
            client = clients.connect()
        except Unavailable:
            settings.write(meant)
            self._start().close()
            return
        with client:
            settings.tell_differences(client, meant)

    def connect(self, server_host: str | None = None, server_port: int | None = None) -> None:  # noqa: ARG002
        """Starts no daemon; raises NoServer unless one runs. Host and port mean nothing: it is on D-Bus."""
        try:
            clients.connect().close()
        except Unavailable as error:
            raise NoServer(error.message, hint=error.hint) from None

    def shutdown_server(self) -> None:
        """Ends the daemon if this program started it. One that ran before is other programs' too, and goes on."""
        process, self._started = self._started, None
        if process is None or process.poll() is not None:
            log.info("flashd was not started by this program; to end it: flash stop")
            return
        with clients.connect() as client:
            client.stop()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            raise Unavailable(
                f"flashd still runs after {_STOP_S:.0f} s", hint="its log says what it waits for"
            ) from None

    def activate_vllm_integration(self) -> None:
        """Nothing has to be patched: vLLM finds flashd's loader by itself (`--load-format flash`), and the daemon runs
        vLLM. Tells the daemon that this interpreter has one, if it has, and the daemon was not told of another."""
        if importlib.util.find_spec("vllm") is None:
            log.info("this interpreter has no vLLM; the daemon's engines run where engines.vllm.python says")
            return
        with self._client() as client:
            if settings.value(client, "engines.vllm.python"):
                return
            if self._started is not None:
                return  # the daemon runs in this interpreter, and its own is the default
            try:
                if client.set_config("engines.vllm.python", sys.executable):
                    log.warning("flashd uses the vLLM of %s when it is started again: flash stop", sys.executable)
            except NotAuthorized as error:  # the machine's daemon, whose administrator chooses
                log.warning("flashd cannot be told of the vLLM of %s: %s", sys.executable, error.message)

    def cleanup_gpu(self) -> None:
        """Parks the engine, which gives back its weights and its KV cache, and empties this process's CUDA cache.

        The next `generate` wakes it again. Does nothing where no daemon runs.
        """
        modules.release_unused()
        try:
            client = clients.connect()
        except Unavailable:
            return
        with client:
            try:
                client.park()
            except NotFound:
                log.debug("no engine serves")

    # -- models ------------------------------------------------------------------------------------------------------

    def register_model(
        self,
        model_id: str,
        backend: Backend = "auto",
        torch_dtype: str | None = None,
        force: bool = False,
        hf_token: str | None = None,
    ) -> Registration:
        """Makes a model of the daemon's: of a folder, of what the Hugging Face cache has, or pulled from the hub.

        A model that the daemon has is left alone unless `force`. One checkpoint serves every backend. It is stored as
        its maker saved it: `torch_dtype` is for `load_model(backend="transformers")`, and only compared here.

        Raises NotFound, InvalidSource, StoreFull, TransferFailed; nothing is returned for failures.
        """
        _check_backend(backend)
        began = time.monotonic()
        with self._client() as client:
            model = None if force else obtaining.known(client, obtaining.name_of(model_id))
            obtained_s = 0.0
            if model is None:
                model = obtaining.obtain(client, model_id, token=hf_token)
                obtained_s = time.monotonic() - began
            path = _folder(client, model)
        _say_dtype(model, torch_dtype)
        metrics = Metrics(
            total_time=time.monotonic() - began,
            download_time=obtained_s,
            transform_time=0.0,
            register_time=0.0,
            model_size=model.size_bytes,
        )
        return Registration(status="success", backend=backend, model=model.name, path=str(path), metrics=metrics)

    def load_model(
        self,
        model_id: str,
        backend: Backend | None = None,
        *,
        dtype: str | None = None,
        torch_dtype: str | None = None,
        gpu_memory_utilization: float | None = None,  # noqa: ARG002 -- see `configure`
        device_map: object = None,
        hf_token: str | None = None,
    ) -> Any:
        """Makes a model ready; registers it first if it is not. `backend` decides what is returned:

        - `vllm`: a `LanguageModel`, asked as vllm.LLM is, in an engine of the daemon's; returns when its first token is
          possible, in milliseconds if an engine of its kind is warm.
        - `transformers`: the transformers model in this process, of whatever class its config.json names, over the
          daemon's memory; `dtype` and `device_map` (one device) are as transformers has them.
        - `auto`, or none: a `LanguageModel` in the default kind of engine if it generates text, else `transformers`.

        Raises as `register_model`, and EngineFailed or OutOfMemory; the model that ran before runs on then.
        """
        chosen = _check_backend(backend or "auto")
        model_name = self.register_model(model_id, chosen, hf_token=hf_token)["model"]
        with self._client() as client:
            model = client.model(model_name)
            if chosen == "auto" and not model.architecture.endswith(_GENERATES_TEXT):
                chosen = "transformers"
            if chosen == "transformers":
                wanted = dtype or torch_dtype
                return modules.load(client, model.name, _folder(client, model), dtype=wanted, device_map=device_map)
        _say_dtype(model, dtype or torch_dtype)
        found = LanguageModel(self._client, model.name, "vllm" if chosen == "vllm" else "")
        found.activate()
        return found

    def get_model_info(self, model_id: str) -> ModelInfo | None:
        """What the daemon knows of a model; None if it has none of that name."""
        with self._client() as client:
            model = obtaining.known(client, obtaining.name_of(model_id))
            return _info(client, model) if model else None

    def list_models(self) -> dict[str, ModelInfo]:
        """All models by name."""
        with self._client() as client:
            return {model.name: _info(client, model) for model in client.models()}

    def _client(self) -> Client:
        try:
            return clients.connect()
        except Unavailable:
            return self._start()

    def _start(self) -> Client:
        started = starting.start()
        self._started = started.process
        return started.client


def _check_backend(backend: Backend) -> Backend:
    if backend not in {"vllm", "transformers", "auto"}:
        raise InvalidArgument(f"there is no backend {backend!r}", hint="use vllm, transformers or auto")
    return backend


def _say_dtype(model: Model, wanted: object) -> None:
    """A program that asks for another dtype than the checkpoint has is told so: nothing is cast behind its back."""
    stored = _DTYPES.get(model.dtype)
    if wanted is not None and stored is not None and str(wanted).removeprefix("torch.") not in {stored, "auto"}:
        log.warning("%s stays in %s, as it was saved; it is not served in %s", model.name, stored, wanted)


def _folder(client: Client, model: Model) -> Path:
    return Path(client.status().store_path) / "checkpoints" / model.checkpoint


def _info(client: Client, model: Model) -> ModelInfo:
    return ModelInfo(
        model_id=model.name,
        backend="auto",
        ranks=1,
        path=str(_folder(client, model)),
        size=model.size_bytes,
        dtype=_DTYPES.get(model.dtype, model.dtype),
        architecture=model.architecture,
        tensor_count=model.tensor_count,
        residency=model.residency,
        active=model.active,
        created_at=model.created_at,
        last_used_at=model.last_used_at,
    )


# Functions of a module need something to be functions of: this program's only session. It connects when it is used.
_session = Session()
configure = _session.configure
connect = _session.connect
shutdown_server = _session.shutdown_server
activate_vllm_integration = _session.activate_vllm_integration
cleanup_gpu = _session.cleanup_gpu
register_model = _session.register_model
load_model = _session.load_model
get_model_info = _session.get_model_info
list_models = _session.list_models
