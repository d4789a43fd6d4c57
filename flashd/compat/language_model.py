# SPDX-License-Identifier: Apache-2.0
"""What does `load_model` return for a language model? Something that is asked as vllm.LLM is, and runs in an engine of
the daemon's.

It could have been a vllm.LLM in this process, fed by our loader. But then each `load_model` would start an engine,
which takes tens of seconds, and each would keep its memory; an engine of the daemon's is woken or rebound in
milliseconds, and all programs share it. So what is returned is small, there can be a hundred of them, and each is
swapped to when it is asked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flashd import inference
from flashd.client import Client
from flashd.compat import sampling
from flashd.compat.sampling import Prompt, RequestOutput
from flashd.errors import Busy, EngineFailed, FlashdError, InvalidArgument, NotFound, Unavailable, Unsupported

_AT_ONCE = 32  # requests: more than an engine batches on the machines this is for
_PATIENCE_S = 120.0  # with others who swap away
_PAUSE_S = 0.05, 0.6
_NO_LIMIT = 1 << 20  # tokens, for engines that stop by themselves where there is no more room
_CRASHES = 3  # an engine may be ended by a swap, but not again and again
# What a request meets when somebody swaps to another model meanwhile.
_SWAPPED_AWAY = (Busy, NotFound, Unavailable, EngineFailed)

Message = Mapping[str, Any]


class LanguageModel:
    """A model of the daemon's, asked as vLLM is. Keeps nothing open; may be used from several threads."""

    def __init__(self, connect: Callable[[], Client], model: str, engine: str = "") -> None:
        """`engine` is the kind that is to run it, torch or vllm; by default what is configured."""
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
        """One output a prompt, in order. `sampling_params` are vllm.SamplingParams: one, or one for each prompt.

        `lora_request` is a vllm.lora.request.LoRARequest for one of `engines.vllm.adapters`, whose name counts, and not
        its path: a program opens no files for an engine.

        Swaps to the model first, and again if another program swaps away meanwhile. Raises InvalidArgument for what the
        engine refuses, Unsupported for an adapter that it does not have, EngineFailed, Busy if others keep swapping
        away.
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
        """Like `generate`, for one conversation or several, with the model's chat template."""
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
        """Makes it the active model; returns the endpoint where it answers."""
        with self._connect() as client:
            return client.swap(self.model, engine=self._engine).endpoint

    def _answers(self, path: str, bodies: Sequence[Mapping[str, Any]], adapter: str) -> list[Mapping[str, Any]]:
        """All answers, in order; those that a swap cut or kept away are asked for again."""
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
                time.sleep(random.uniform(*_PAUSE_S))  # as long as others: they would meet again and again
        return [answers[index] for index in range(len(bodies))]


def _ask(endpoint: str, path: str, body: Mapping[str, Any]) -> Mapping[str, Any] | FlashdError:
    try:
        if body.get("max_tokens", 0) is None:  # as many as there is room for, says vLLM; over HTTP it would say 16
            room = [model.get("max_model_len") or _NO_LIMIT for model in inference.models(endpoint)]
            body = {**body, "max_tokens": min(room, default=_NO_LIMIT)}
        return inference.ask(endpoint, path, body)
    except _SWAPPED_AWAY as error:
        return error


def _adapter(lora_request: object | None) -> str:
    name = "" if lora_request is None else getattr(lora_request, "lora_name", None)
    if not isinstance(name, str) or (lora_request is not None and not name):
        raise InvalidArgument(f"{lora_request!r} is no LoRARequest", hint="vllm.lora.request has them")
    return name


def _check_has(endpoint: str, adapter: str) -> None:
    if adapter not in {model["id"] for model in inference.models(endpoint)}:
        hint = "engines.vllm.adapters says what vLLM applies, each to the base in its adapter_config.json"
        raise Unsupported(f"this model's engine has no adapter {adapter!r}", hint=hint)


def _one_each(given: object | Sequence[object] | None, count: int) -> list[dict[str, Any]]:
    several = list(given) if isinstance(given, Sequence) else [given] * count
    if len(several) != count:
        raise InvalidArgument(
            f"{len(several)} sampling parameters for {count} prompts", hint="give one, or one for each"
        )
    return [sampling.parameters(one) for one in several]
