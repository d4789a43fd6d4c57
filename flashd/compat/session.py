# SPDX-License-Identifier: Apache-2.0
"""The functions of flashtensors, as methods of a session, which is a client of the daemon."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal, TypedDict

from flashd.checkpoint.dtypes import DTYPES, PLAIN_FLOATS
from flashd.client import client as clients
from flashd.client import launch, resolve
from flashd.client.client import Client
from flashd.client.results import Model
from flashd.compat import modules, settings
from flashd.compat.language_model import LanguageModel
from flashd.errors import InvalidArgument, NotAuthorized, NotFound, Unavailable

log = logging.getLogger("flashtensors")

Backend = Literal["vllm", "transformers", "auto"]

_TORCH_NAMES = {name: DTYPES[name].torch_name for name in PLAIN_FLOATS}
_GENERATES_TEXT = "ForCausalLM"


class NoServer(Unavailable, ConnectionError):
    """Raised if no daemon is running. Programs written for flashtensors expect a ConnectionError."""


class Metrics(TypedDict):
    """Metrics in seconds and bytes.

    Download, conversion and registration overlap, and together are `download_time`, which is 0 for a model that the
    daemon already has.
    """

    total_time: float
    download_time: float
    transform_time: float
    register_time: float
    model_size: int


class Registration(TypedDict):
    """The result of `register_model`. `path` is the checkpoint's folder in the store."""

    status: Literal["success"]
    backend: str
    model: str
    path: str
    metrics: Metrics


class ModelInfo(TypedDict):
    """The result of `get_model_info`. Sizes are in bytes, times in seconds since the epoch (0 for never).

    `backend` is always `auto` and `ranks` is 1, because one checkpoint serves all backends.
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
    """A program's use of the daemon. Each call opens a connection, so all threads may use a session."""

    def __init__(self) -> None:
        self._has_started = False

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
        """Starts the daemon with these settings, like `flash start`, unless one is running.

        `storage_path` is `store.path` (a folder `flashd` in it), `mem_pool_size` `memory.host_budget`, `chunk_size`
        `streamer.block`, `num_threads` `streamer.depth`; sizes are in bytes. The others are ignored: the KV cache has a
        configured size (`engines.vllm.kv_cache`), and flashd does not listen on the network.

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
        """Checks that a daemon is running. Raises NoServer. Host and port are ignored, because flashd uses D-Bus."""
        try:
            clients.connect().close()
        except Unavailable as error:
            raise NoServer(error.message, hint=error.hint) from None

    def shutdown_server(self) -> None:
        """Ends the daemon if this program has started it. Another daemon keeps running, because others may use it."""
        has_started, self._has_started = self._has_started, False
        if not has_started:
            log.info("flashd was not started by this program, so it keeps running; stop it with flash stop")
            return
        try:
            client = clients.connect(activate=False)
        except Unavailable:
            return
        with client:
            launch.stop(client)

    def activate_vllm_integration(self) -> None:
        """Sets `engines.vllm.python` to this interpreter, if it has vLLM and the setting is empty.

        Nothing has to be patched: vLLM finds flashd's loader itself (`--load-format flash`), and the daemon runs vLLM.
        """
        if importlib.util.find_spec("vllm") is None:
            log.info("this interpreter has no vLLM; the daemon's engines use engines.vllm.python")
            return
        with self._client() as client:
            if settings.value(client, "engines.vllm.python"):
                return
            if self._has_started:
                return  # the daemon runs in this interpreter, which is the default
            try:
                if client.set_config("engines.vllm.python", sys.executable):
                    log.warning("flashd will use the vLLM of %s after flash restart", sys.executable)
            except NotAuthorized as error:  # the machine's daemon, whose administrator chooses
                log.warning("flashd cannot be configured to use the vLLM of %s: %s", sys.executable, error.message)

    def cleanup_gpu(self) -> None:
        """Parks the engine, which releases its weights and KV cache, and empties this process's CUDA cache.

        The next `generate` wakes it again. Does nothing if no daemon is running.
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
        """Adds a model to the daemon: from a folder, from the Hugging Face cache, or from the hub.

        An existing model is kept unless `force`. One checkpoint serves all backends. It keeps the dtype of its source:
        `torch_dtype` is for `load_model(backend="transformers")`, and here a difference is only logged.

        Raises NotFound, InvalidSource, StoreFull or TransferFailed, instead of returning an error status.
        """
        _check_backend(backend)
        began = time.monotonic()
        with self._client() as client:
            model = None if force else resolve.known(client, resolve.name_of(model_id))
            obtained_s = 0.0
            if model is None:
                model = resolve.obtain(client, model_id, token=hf_token)
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
        """Loads a model, which is registered first if necessary. The result depends on `backend`:

        - `vllm`: a `LanguageModel` with the interface of vllm.LLM, in an engine of the daemon. Returns when it can
          generate its first token, which takes milliseconds if there is a parked engine for it.
        - `transformers`: the transformers model in this process, of the class in its config.json, over the daemon's
          memory. `dtype` and `device_map` (one device) are as in transformers.
        - `auto`, or none: a `LanguageModel` in the default kind of engine if it generates text, else `transformers`.

        Raises the errors of `register_model`, EngineFailed or OutOfMemory; the previous model then stays active.
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
        """Returns information about a model; None if the daemon does not have it."""
        with self._client() as client:
            model = resolve.known(client, resolve.name_of(model_id))
            return _info(client, model) if model else None

    def list_models(self) -> dict[str, ModelInfo]:
        """Returns the models by name."""
        with self._client() as client:
            return {model.name: _info(client, model) for model in client.models()}

    def _client(self) -> Client:
        try:
            return clients.connect()
        except Unavailable:
            return self._start()

    def _start(self) -> Client:
        started = launch.start()
        self._has_started = True
        return started.client


def _check_backend(backend: Backend) -> Backend:
    if backend not in {"vllm", "transformers", "auto"}:
        raise InvalidArgument(f"there is no backend {backend!r}", hint="use vllm, transformers or auto")
    return backend


def _say_dtype(model: Model, wanted: object) -> None:
    """Logs that the requested dtype differs from the checkpoint's, because weights are not cast."""
    stored = _TORCH_NAMES.get(model.dtype)
    if wanted is not None and stored is not None and str(wanted).removeprefix("torch.") not in {stored, "auto"}:
        log.warning("%s keeps its dtype %s, and is not served in %s", model.name, stored, wanted)


def _folder(client: Client, model: Model) -> Path:
    return Path(client.status().store_path) / "checkpoints" / model.checkpoint


def _info(client: Client, model: Model) -> ModelInfo:
    return ModelInfo(
        model_id=model.name,
        backend="auto",
        ranks=1,
        path=str(_folder(client, model)),
        size=model.size_bytes,
        dtype=_TORCH_NAMES.get(model.dtype, model.dtype),
        architecture=model.architecture,
        tensor_count=model.tensor_count,
        residency=model.residency,
        active=model.active,
        created_at=model.created_at,
        last_used_at=model.last_used_at,
    )


# The module's functions are methods of this program's only session, which connects when it is used.
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
