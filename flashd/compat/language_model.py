# SPDX-License-Identifier: Apache-2.0
"""The language models returned by `load_model`: they have the interface of vllm.LLM, and run in the daemon's engines.

With a vllm.LLM in this process and our loader, each `load_model` would start an engine, which takes tens of seconds,
and each engine would keep its memory. The daemon's engines are woken or rebound in milliseconds, and are shared by all
programs. So a language model here is small, a program can have a hundred of them, and each call swaps to its model.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flashd.client import openai
from flashd.client.client import Client
from flashd.compat import sampling
from flashd.compat.sampling import Prompt, RequestOutput
from flashd.errors import Busy, EngineFailed, FlashdError, InvalidArgument, NotFound, Unavailable, Unsupported

_AT_ONCE = 32  # concurrent requests: more than an engine batches on typical machines
_PATIENCE_S = 120.0  # while other programs swap to other models
_PAUSE_S = 0.05, 0.6
_NO_LIMIT = 1 << 20  # tokens, for engines that stop by themselves where there is no more room
_CRASHES = 3  # an engine may be ended by a swap, but not again and again
# Errors of a request during which another program swaps to another model.
_SWAPPED_AWAY = (Busy, NotFound, Unavailable, EngineFailed)

Message = Mapping[str, Any]


class LanguageModel:
    """A model in the daemon, with vLLM's interface. Keeps no connection open; may be used from several threads."""

    def __init__(self, connect: Callable[[], Client], model: str, engine: str = "") -> None:
        """`engine` is the kind of engine, torch or vllm; by default the configured one."""
        self._connect = connect
        self._engine = engine
        self.model = model

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: object | Sequence[object] | None = None,
        *,
        lora_request: object | None = None,
        use_tqdm: bool = False,  # noqa: ARG002 -- of vLLM's interface; there is no bar
    ) -> list[RequestOutput]:
        """Returns one output for each prompt, in order. `sampling_params` are vllm.SamplingParams: one, or one for each
        prompt.

        `lora_request` is a vllm.lora.request.LoRARequest for one of `engines.vllm.adapters`, which is found by its
        name; its path is ignored, because engines do not read files for programs.

        Swaps to the model first, and again if another program swaps to another one meanwhile. Raises InvalidArgument
        for requests that the engine refuses, Unsupported for an unknown adapter, EngineFailed, or Busy if other
        programs keep swapping.
        """
        asked = sampling.prompts(prompts)
        bodies = [
            {"prompt": prompt, "return_token_ids": True, **parameters}
            for prompt, parameters in zip(asked, _one_each(sampling_params, len(asked)), strict=True)
        ]
        answers = self._answers("/v1/completions", bodies, _adapter(lora_request))
        return [sampling.output(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: object | Sequence[object] | None = None,
        *,
        lora_request: object | None = None,
        use_tqdm: bool = False,  # noqa: ARG002
    ) -> list[RequestOutput]:
        """Answers one or several conversations like `generate`, with the model's chat template."""
        several = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        bodies = [
            {"messages": list(conversation), "return_token_ids": True, **parameters}
            for conversation, parameters in zip(several, _one_each(sampling_params, len(several)), strict=True)
        ]
        answers = self._answers("/v1/chat/completions", bodies, _adapter(lora_request))
        return [sampling.output(None, answer) for answer in answers]

    def __repr__(self) -> str:
        return f"LanguageModel({self.model!r})"

    def activate(self) -> str:
        """Makes this the active model, and returns the endpoint."""
        with self._connect() as client:
            return client.swap(self.model, engine=self._engine).endpoint

    def _answers(self, path: str, bodies: Sequence[Mapping[str, Any]], adapter: str) -> list[Mapping[str, Any]]:
        """Collects answers in order. Requests that a swap has cut off or refused are repeated."""
        named = {"model": adapter or self.model}
        answers: dict[int, Mapping[str, Any]] = {}
        deadline = time.monotonic() + _PATIENCE_S
        crashes = 0
        while missing := [index for index in range(len(bodies)) if index not in answers]:
            endpoint = self.activate()
            if adapter:
                _check_has(endpoint, adapter)
            with ThreadPoolExecutor(min(_AT_ONCE, len(missing))) as pool:
                asked = [pool.submit(_ask, endpoint, path, {**bodies[index], **named}) for index in missing]
            failures = []
            for index, answer in zip(missing, (future.result() for future in asked), strict=True):
                if isinstance(answer, FlashdError):
                    failures.append(answer)
                else:
                    answers[index] = answer
            crashes += any(isinstance(failure, EngineFailed) for failure in failures)
            if failures:
                if crashes == _CRASHES or time.monotonic() > deadline:
                    raise failures[0]
                time.sleep(random.uniform(*_PAUSE_S))  # random, lest two programs collide again and again
        return [answers[index] for index in range(len(bodies))]


def _ask(endpoint: str, path: str, body: Mapping[str, Any]) -> Mapping[str, Any] | FlashdError:
    try:
        if (
            body.get("max_tokens", 0) is None
        ):  # vLLM's own interface has no limit here, but over HTTP the default would be 16
            room = [model.get("max_model_len") or _NO_LIMIT for model in openai.models(endpoint)]
            body = {**body, "max_tokens": min(room, default=_NO_LIMIT)}
        return openai.ask(endpoint, path, body)
    except _SWAPPED_AWAY as error:
        return error


def _adapter(lora_request: object | None) -> str:
    name = "" if lora_request is None else getattr(lora_request, "lora_name", None)
    if not isinstance(name, str) or (lora_request is not None and not name):
        raise InvalidArgument(f"{lora_request!r} is not a LoRARequest", hint="use vllm.lora.request.LoRARequest")
    return name


def _check_has(endpoint: str, adapter: str) -> None:
    if adapter not in {model["id"] for model in openai.models(endpoint)}:
        hint = "list it in engines.vllm.adapters; each adapter applies to the base in its adapter_config.json"
        raise Unsupported(f"this model's engine has no adapter {adapter!r}", hint=hint)


def _one_each(given: object | Sequence[object] | None, count: int) -> list[dict[str, Any]]:
    several = list(given) if isinstance(given, Sequence) else [given] * count
    if len(several) != count:
        raise InvalidArgument(
            f"{len(several)} sampling parameters for {count} prompts", hint="pass one, or one for each prompt"
        )
    return [sampling.parameters(one) for one in several]
