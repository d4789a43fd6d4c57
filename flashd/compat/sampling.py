# SPDX-License-Identifier: Apache-2.0
"""Converts requests of vLLM's Python interface to HTTP, and the answers to objects of that interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashd.errors import InvalidArgument, Unsupported

_EVERYWHERE = ("temperature", "top_p", "max_tokens", "repetition_penalty", "seed", "stop")
# Sent only if they differ from their defaults, because engines other than vLLM do not know them.
_VLLM = {
    "n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0, "min_tokens": 0, "ignore_eos": False,
    "skip_special_tokens": True, "spaces_between_special_tokens": True, "include_stop_str_in_output": False,
    "stop_token_ids": [], "bad_words": [], "logit_bias": None, "allowed_token_ids": None, "logprobs": None,
    "prompt_logprobs": None, "structured_outputs": None, "truncate_prompt_tokens": None,
}  # fmt: skip
_CANNOT_TRAVEL = ("logits_processors", "extra_args")
_ANY_TOP_K = 1 << 20  # more tokens than any vocabulary has
_LOGPROBS_ARE_IDS = "token_id:"

Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log probability of one token, with its rank if the engine reports it."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """An answer, with vLLM's names. Token ids are empty if the engine does not report them."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its answers, with vLLM's names."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True


def parameters(sampling: object | None) -> dict[str, Any]:
    """Returns a request's parameters from vllm.SamplingParams, or an object with such attributes.

    Without them, the model's own defaults apply, and the limit is 16 tokens, as in vLLM. Raises Unsupported for
    parameters that cannot be sent to another process, such as a logits processor.
    """
    if sampling is None:
        return {"max_tokens": 16}
    for name in _CANNOT_TRAVEL:
        if getattr(sampling, name, None):
            hint = "use vllm.LLM with load_format='flash' in this process instead"
            raise Unsupported(f"{name} cannot be passed to an engine in another process", hint=hint)
    found = {name: getattr(sampling, name) for name in _EVERYWHERE if hasattr(sampling, name)}
    top_k = getattr(sampling, "top_k", 0)
    found["top_k"] = top_k if top_k > 0 else _ANY_TOP_K
    for name, default in _VLLM.items():
        value = getattr(sampling, name, default)
        if value is not None and value != default:
            found[name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
    if "logprobs" in found:
        found["return_tokens_as_token_ids"] = True
    return {name: value for name, value in found.items() if value is not None or name == "max_tokens"}


def prompts(given: Prompt | Sequence[Prompt]) -> list[str | list[int]]:
    """Converts prompts in all forms that vLLM accepts to texts or lists of token ids."""
    if isinstance(given, str | Mapping) or (given and all(isinstance(token, int) for token in given)):
        return [_prompt(given)]
    return [_prompt(prompt) for prompt in given]


def _prompt(given: Any) -> str | list[int]:
    if isinstance(given, Mapping):
        extra = sorted(set(given) - {"prompt", "prompt_token_ids"})
        if extra:
            hint = 'load the model with backend="transformers" for other inputs than text'
            raise Unsupported(f"a prompt with {extra[0]} cannot be passed to an engine", hint=hint)
        given = given.get("prompt_token_ids") or given.get("prompt")
    if isinstance(given, str):
        return given
    if isinstance(given, Sequence) and given and all(isinstance(token, int) for token in given):
        return list(given)
    raise InvalidArgument(f"{given!r} is not a prompt", hint="use a text or a list of token ids")


def output(prompt: str | list[int] | None, answer: Mapping[str, Any]) -> RequestOutput:
    """Converts an answer of the HTTP interface to vLLM's output for a prompt."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    first = choices[0] if choices else {}
    prompt_ids = first.get("prompt_token_ids") or answer.get("prompt_token_ids")
    if prompt_ids is None and isinstance(prompt, list):
        prompt_ids = prompt
    return RequestOutput(
        request_id=str(answer.get("id", "")),
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=prompt_ids,
        prompt_logprobs=_prompt_logprobs(first.get("prompt_logprobs") or answer.get("prompt_logprobs")),
        outputs=[_completion(choice) for choice in choices],
    )


def _completion(choice: Mapping[str, Any]) -> CompletionOutput:
    text = choice["text"] if "text" in choice else choice["message"].get("content")
    told = choice.get("logprobs") or {}
    chosen = told.get("token_logprobs")
    return CompletionOutput(
        index=choice["index"],
        text=text or "",
        token_ids=list(choice.get("token_ids") or []),
        cumulative_logprob=sum(chosen) if chosen else None,
        logprobs=_logprobs(told) if chosen else None,
        finish_reason=choice.get("finish_reason"),
        stop_reason=choice.get("stop_reason"),
    )


def _logprobs(told: Mapping[str, Any]) -> list[dict[int, Logprob]]:
    found = []
    for token, logprob, others in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        every = {token: logprob, **(others or {})}
        found.append({int(name.removeprefix(_LOGPROBS_ARE_IDS)): Logprob(value) for name, value in every.items()})
    return found


def _prompt_logprobs(told: Any) -> list[dict[int, Logprob] | None] | None:
    if told is None:
        return None
    return [None if entry is None else {int(token): Logprob(**of) for token, of in entry.items()} for entry in told]
