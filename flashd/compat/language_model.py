# SPDX-License-Identifier: Apache-2.0
"""What does `load_model` return for a language model? Something that is asked as vllm.LLM is, and runs in an engine of
the daemon's.

It could have been a vllm.LLM in this process, fed by our loader. But then each `load_model` would start an engine,
which takes tens of seconds, and each would keep its memory; an engine of the daemon's is woken or rebound in
milliseconds, and all programs share it. So what is returned is small, there can be a hundred of them, and each is
swapped to when it is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flashd import inference
from flashd.client import Client
from flashd.compat import sampling
from flashd.compat.sampling import Prompt, RequestOutput
from flashd.errors import Busy, EngineFailed, FlashdError, NotFound, Unavailable

_AT_ONCE = 32  # requests: more than an engine batches on the machines this is for
_ROUNDS = 5
_PAUSE_S = 0.2
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
        use_tqdm: bool = False,  # noqa: ARG002 -- of vLLM's interface; there is no bar
    ) -> list[RequestOutput]:
        """One output a prompt, in order. `sampling_params` are vllm.SamplingParams: one, or one for each prompt.

        Swaps to the model first, and again if another program swaps away meanwhile. Raises InvalidArgument for what the
        engine refuses, EngineFailed, Busy if others keep swapping away.
        """
        asked = sampling.prompts(prompts)
        bodies = [
            {"prompt": prompt, "return_token_ids": True, **parameters}
            for prompt, parameters in zip(asked, _one_each(sampling_params, len(asked)), strict=True)
        ]
        answers = self._answers("/v1/completions", bodies)
        return [sampling.output(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: object | Sequence[object] | None = None,
        *,
        use_tqdm: bool = False,  # noqa: ARG002
    ) -> list[RequestOutput]:
        """Like `generate`, for one conversation or several, with the model's chat template."""
        several = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        bodies = [
            {"messages": list(conversation), "return_token_ids": True, **parameters}
            for conversation, parameters in zip(several, _one_each(sampling_params, len(several)), strict=True)
        ]
        return [sampling.output(None, answer) for answer in self._answers("/v1/chat/completions", bodies)]

    def __repr__(self) -> str:
        return f"LanguageModel({self.model!r})"

    def activate(self) -> str:
        """Makes it the active model; returns the endpoint where it answers."""
        with self._connect() as client:
            return client.swap(self.model, engine=self._engine).endpoint

    def _answers(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        answers: dict[int, Mapping[str, Any]] = {}
        for round_ in range(_ROUNDS):
            missing = [index for index in range(len(bodies)) if index not in answers]
            if not missing:
                break
            if round_:
                time.sleep(_PAUSE_S * round_)
            endpoint = self.activate()
            with ThreadPoolExecutor(min(_AT_ONCE, len(missing))) as pool:
                asked = [pool.submit(_ask, endpoint, path, {**bodies[index], "model": self.model}) for index in missing]
            found = dict(zip(missing, (future.result() for future in asked), strict=True))
            failures = [error for error in found.values() if isinstance(error, FlashdError)]
            if failures and round_ + 1 == _ROUNDS:
                raise failures[0]
            answers |= {index: answer for index, answer in found.items() if not isinstance(answer, FlashdError)}
        return [answers[index] for index in range(len(bodies))]


def _ask(endpoint: str, path: str, body: Mapping[str, Any]) -> Mapping[str, Any] | FlashdError:
    try:
        return inference.ask(endpoint, path, body)
    except _SWAPPED_AWAY as error:
        return error


def _one_each(given: object | Sequence[object] | None, count: int) -> list[dict[str, Any]]:
    several = list(given) if isinstance(given, Sequence) else [given] * count
    return [sampling.parameters(one) for one in several]
