# SPDX-License-Identifier: Apache-2.0
"""Generates text from a prompt, piece by piece: one generation at a time, in a thread other than the server's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flashd.workers.torch import templates
from flashd.workers.torch.model import Model
from flashd.workers.torch.requests import BadRequest, GenerationRequest, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Emit = Callable[[str], None]
_MOST_CHARACTERS = 500  # characters of a template's refusal
# As in vLLM: below the first, sampling takes the likeliest token; between both, numbers overflow.
_GREEDY_BELOW, _COLDEST = 1e-5, 1e-2
NO_TOKENIZER = "this model has no tokenizer, so it cannot read text: add the tokenizer of its base to the source"


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a generation: its reason (stop, length or cut), the tokens of prompt and answer, and the stop text
    that ended it, if one did."""

    reason: str
    prompt: list[int]
    tokens: list[int]
    stopped_by: str

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens)


def prompt_tokens(model: Model, request: GenerationRequest) -> list[int]:
    """Tokenises the prompt. Raises BadRequest if the model cannot take it."""
    if model.tokenizer is None:
        raise BadRequest(NO_TOKENIZER)
    if isinstance(request.prompt, list):
        tokens = request.prompt
    elif request.messages:
        tokens = _chat_tokens(model, request)
    else:
        tokens = list(model.tokenizer(request.prompt, add_special_tokens=request.add_special_tokens)["input_ids"])
    param = "messages" if request.messages else "prompt"
    check_tokens(model, tokens, param)
    if len(tokens) >= model.max_positions:
        raise BadRequest(
            f"the prompt has {len(tokens)} tokens, but this model reads at most {model.max_positions}, the answer"
            " included",
            param=param,
            code="context_length_exceeded",
        )
    return tokens


def check_tokens(model: Model, tokens: list[int], param: str) -> None:
    """Checks that there are tokens, and that the model has an embedding for each, since its tokenizer may have more.

    Raises BadRequest.
    """
    if not tokens:
        raise BadRequest(f"{param} has no tokens", param=param)
    rows = model.embedding_rows
    if max(tokens) >= rows:
        message = f"{param} has token {max(tokens)}, but this model has only the token ids 0 to {rows - 1}"
        raise BadRequest(message, param=param)


def generate(
    model: Model, request: GenerationRequest, tokens: list[int], default_tokens: int, emit: Emit, cut: threading.Event
) -> Ended:
    """Generates until the model, a stop text, a limit or `cut` ends it, and calls `emit` with each piece of text.

    `default_tokens` is the limit if neither the request nor the model has one.
    """
    sampling = _merged(request.sampling, model.defaults.sampling)
    is_apart = bool(model.module.config.is_encoder_decoder)  # its output does not continue the prompt
    start = 1 if is_apart else len(tokens)
    limit = max(1, min(sampling.max_tokens or default_tokens, model.max_positions - start))
    ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else model.defaults.ends)
    output = _Output(model.tokenizer, emit, sampling)
    torch.manual_seed(sampling.seed) if sampling.seed is not None else torch.seed()
    inputs = torch.tensor([tokens])
    with torch.inference_mode():
        model.module.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=_config(model, sampling, limit, ends),
            logits_processor=LogitsProcessorList(_processors(sampling, start, ends)),
            streamer=output,
            stopping_criteria=StoppingCriteriaList([_Stop(output, cut)]),
        )
    if cut.is_set():
        reason = "cut"
    elif output.stopped or (output.tokens and output.tokens[-1] in ends):
        reason = "stop"
    else:
        reason = "length"
    return Ended(reason, tokens, output.tokens, output.stopped_by)


class _Output(TextStreamer):  # type: ignore[misc]
    """Emits finished text, holding back text that may become a stop text, and keeps the tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Emit, sampling: Sampling) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=sampling.skip_special_tokens)
        self._emit = emit
        self._stops = sampling.stop
        self._unsaid = {*sampling.stop_token_ids, tokenizer.eos_token_id}
        self._earliest = sampling.min_tokens
        self._held = ""
        self.tokens: list[int] = []
        self.stopped_by = ""

    @property
    def stopped(self) -> bool:
        return bool(self.stopped_by)

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens.append(int(value.reshape(-1)[-1]))
            if self.tokens[-1] in self._unsaid:
                return
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.stopped:
            return
        self._held += text
        may_stop = len(self.tokens) > self._earliest
        cuts = [(at, stop) for stop in self._stops if may_stop and (at := self._held.find(stop)) >= 0]
        if cuts:
            at, self.stopped_by = min(cuts)
            self._pass_on(at)
        else:
            self._pass_on(len(self._held) - (0 if stream_end else self._undecided()))

    def _undecided(self) -> int:
        """Returns the number of characters at the end of the text that may begin a stop text."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        ends = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in ends if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)

    def _pass_on(self, length: int) -> None:
        if length:
            self._emit(self._held[:length])
        self._held = self._held[length:]


class _Stop(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, output: _Output, cut: threading.Event) -> None:
        self._output = output
        self._cut = cut

    def __call__(self, *_: object, **__: object) -> torch.Tensor:
        return torch.tensor([self._output.stopped or self._cut.is_set()])


def _chat_tokens(model: Model, request: GenerationRequest) -> list[int]:
    template = templates.chosen(model.tokenizer.chat_template)
    messages = templates.prepared(request.messages, template)
    try:
        text = model.tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False, **request.template_options
        )
    except Exception as error:  # noqa: BLE001 -- all exceptions of a template are its refusals
        said = str(error)[:_MOST_CHARACTERS]
        raise BadRequest(f"the model's chat template refuses these messages: {said}", param="messages") from None
    return list(model.tokenizer(text, add_special_tokens=request.add_special_tokens)["input_ids"])


def _merged(asked: Sampling, own: Sampling) -> Sampling:
    """Merges the sampling of a request with the model's defaults. Stop texts and stop tokens of both apply."""
    unsaid = [name for name in Sampling.__dataclass_fields__ if getattr(asked, name) is None]
    return replace(asked, **{name: getattr(own, name) for name in unsaid}, stop=(*asked.stop, *own.stop))


def _config(model: Model, sampling: Sampling, limit: int, ends: frozenset[int]) -> GenerationConfig:
    """Makes a config without transformers' own sampling defaults, because `_processors` does the sampling."""
    temperature = 1.0 if sampling.temperature is None else sampling.temperature
    return GenerationConfig(
        **model.defaults.options,
        max_new_tokens=limit,
        do_sample=temperature >= _GREEDY_BELOW,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_beams=1,
        eos_token_id=sorted(ends) or None,
        pad_token_id=model.tokenizer.pad_token_id or 0,
    )


def _processors(sampling: Sampling, start: int, ends: frozenset[int]) -> Iterator[LogitsProcessor]:
    """Yields the logits processors in vLLM's order."""
    if sampling.logit_bias:
        yield _Bias(sampling.logit_bias)
    if sampling.min_tokens and ends:
        yield MinNewTokensLengthLogitsProcessor(start, sampling.min_tokens, sorted(ends))
    if (penalty := sampling.repetition_penalty or 1.0) != 1.0:
        yield RepetitionPenaltyLogitsProcessor(penalty)
    presence, frequency = sampling.presence_penalty or 0.0, sampling.frequency_penalty or 0.0
    if presence or frequency:
        yield _Penalties(start, presence, frequency)
    temperature = 1.0 if sampling.temperature is None else sampling.temperature
    if temperature < _GREEDY_BELOW:
        return
    if temperature != 1.0:
        yield TemperatureLogitsWarper(max(temperature, _COLDEST))
    if sampling.min_p:
        yield MinPLogitsWarper(sampling.min_p)
    if (sampling.top_k or 0) > 0:
        yield TopKLogitsWarper(sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        yield TopPLogitsWarper(sampling.top_p)


class _Bias(LogitsProcessor):  # type: ignore[misc]
    """Adds to the logits of some tokens, and ignores tokens that the model does not have."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._bias = bias

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        known = {token: amount for token, amount in self._bias.items() if token < scores.shape[-1]}
        scores = scores.clone()
        scores[:, list(known)] += torch.tensor(list(known.values()), dtype=scores.dtype)
        return scores


class _Penalties(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's penalties, for presence and frequency of tokens in the answer. The prompt does not count."""

    def __init__(self, start: int, presence: float, frequency: float) -> None:
        self._start = start
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, self._start :], minlength=scores.shape[-1])[: scores.shape[-1]]
        return scores - self._presence * (counts > 0) - self._frequency * counts
