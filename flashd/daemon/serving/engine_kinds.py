# SPDX-License-Identifier: Apache-2.0
"""The kinds of engine, with their factories and interpreters."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Mapping, Sequence

from flashd.config.environment import for_engines
from flashd.config.paths import ENGINE_SOCKET, ENGINE_STATE
from flashd.config.settings import engine_python, variables
from flashd.daemon.events import Events
from flashd.daemon.job import Job
from flashd.daemon.lifecycle.restore import Restore
from flashd.daemon.lifecycle.settings import Settings
from flashd.daemon.serving import default_engine as default_engines
from flashd.daemon.serving.default_engine import DefaultEngine, default_engine, why_no_vllm
from flashd.daemon.serving.endpoint import RuntimeFolder
from flashd.engines import llama_factory, process
from flashd.engines.engine import EngineFactory
from flashd.engines.environments import Environments
from flashd.engines.kv_cache import AUTO
from flashd.engines.vllm_factory import VllmFactory
from flashd.engines.vllm_factory import environment as vllm_environment
from flashd.io.cuda import Gpu

_INGEST = {"import", "pull"}


class EngineKinds:
    """The factories of engines, by kind.

    Engines of the machine's daemon run in separate units if the service manager has them.
    """

    def __init__(
        self,
        settings: Settings,
        environments: Environments,
        runtime: RuntimeFolder,
        restore: Restore,
        gpus: Sequence[Gpu],
        events: Events,
        *,
        is_shared: bool,
    ) -> None:
        self._settings = settings
        self._environments = environments
        self._has_begun = False
        paths, engines = settings.paths, settings.current.engines
        service = ENGINE_SOCKET if is_shared and ENGINE_SOCKET.is_socket() else None
        state = ENGINE_STATE if service else paths.state
        torch = process.Settings(
            python=self.python("torch"),
            runtime=runtime.path,
            logs=paths.state / "logs",
            threads=_threads(engines.torch.threads),
            max_tokens_default=engines.torch.max_tokens_default,
            start_timeout_s=engines.start_timeout_s,
            environment=for_engines(),
            numbers=restore.numbers,
            keeper=restore.engines,
            passed_on=events.connection_passed_on,
            service=service,
        )
        vllm = dataclasses.replace(
            torch,
            python=self.python("vllm"),
            environment={
                **torch.environment,
                **vllm_environment(state / "compiled"),
                **variables(engines.vllm.environment, "engines.vllm.environment"),
            },
            options={
                "arguments": list(engines.vllm.arguments),
                "adapters": list(engines.vllm.adapters),
                "kv_cache_bytes": AUTO if engines.vllm.kv_cache_bytes == "auto" else engines.vllm.kv_cache_bytes,
            },
        )
        llama = dataclasses.replace(
            torch,
            python=self.python(llama_factory.KIND),
            options={
                "threads": _threads(engines.llama.threads),
                "arguments": list(engines.llama.arguments),
                "program": engines.llama.server,
                "context": engines.llama.context,
            },
        )
        self._configured = engines.default  # fixed until a restart, like engines' settings
        self._has_gpu = bool(gpus)
        self._events = events
        self.default = self._chosen()
        factories: list[EngineFactory] = [
            process.torch_factory(torch),
            VllmFactory(vllm, gpus),
            llama_factory.LlamaFactory(llama),
        ]
        self.factories: Mapping[str, EngineFactory] = {factory.kind: factory for factory in factories}
        events.job_changed.subscribe(self._job_changed)
        events.inbox_changed.subscribe(self._inbox_changed)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.factories)

    def begin(self) -> None:
        """Starts the zygote of the default kind of engine. Call it as soon as there is a model, or about to be one."""
        engines = self._settings.current.engines
        if engines.warm_up and not self._has_begun:
            self._has_begun = True
            self.factories[self.default.kind].begin()

    async def environment_changed(self, kind: str) -> None:
        """Uses the new environment for new engines. Running engines stay as they are."""
        await self.factories[kind].run_in(self.python(kind))
        former, self.default = self.default, await asyncio.to_thread(self._chosen)
        if self.default != former:
            self._events.default_engine_changed()
        if self._has_begun and kind == self.default.kind:
            self.factories[kind].begin()

    async def close(self, *, leaving: bool) -> None:
        for factory in self.factories.values():
            await factory.close(leaving=leaving)

    def _job_changed(self, job: Job) -> None:
        if job.kind in _INGEST:
            self.begin()

    def _inbox_changed(self, has_any: bool) -> None:
        if has_any:
            self.begin()

    def _chosen(self) -> DefaultEngine:
        is_open = self._configured == default_engines.AUTO and self._has_gpu
        why_not = why_no_vllm(self._settings.current, self._environments.interpreter("vllm")) if is_open else ""
        return default_engine(self._configured, has_gpu=self._has_gpu, without_vllm=why_not)

    def python(self, kind: str) -> str:
        """Returns the interpreter for a kind of engine."""
        return engine_python(self._settings.current, kind, self._environments.interpreter(kind))


def _threads(configured: int) -> int:
    """More threads than cores wait for each other by spinning, so that an engine hardly gets anywhere."""
    return min(configured, len(os.sched_getaffinity(0)))
