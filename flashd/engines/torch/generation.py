# SPDX-License-Identifier: Apache-2.0
"""How does a prompt become text, a piece at a time? One generation at once, in a thread that is not the server's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer

from flashd.engines.torch.model import Model
from flashd.engines.torch.requests import BadRequest, GenerationRequest, Sampling

Emit = Callable[[str], None]
_NO_TOKENIZER = (
    "this model came without a tokenizer, so it cannot read text: copy its base's tokenizer beside the weights"
)


@dataclass(frozen=True, slots=True)
class Ended:
    """Why the text ended: stop, length or cut; and how many tokens went in and came out."""

    reason: str
    prompt_tokens: int
    completion_tokens: int


def prompt_tokens(model: Model, request: GenerationRequest) -> list[int]:
    """Raises BadRequest where the model cannot take the prompt."""
    if model.tokenizer is None:
        raise BadRequest(_NO_TOKENIZER)
    if isinstance(request.prompt, list):
        tokens = request.prompt
        if max(tokens) >= model.module.get_input_embeddings().num_embeddings:
            raise BadRequest("prompt has token ids that this model does not know", param="prompt")
    elif request.messages:
        tokens = _chat_tokens(model, request)
    else:
        tokens = model.tokenizer(request.prompt)["input_ids"]
    if len(tokens) >= model.max_positions:
        raise BadRequest(
            f"the prompt has {len(tokens)} tokens, and this model reads at most {model.max_positions}",
            code="context_length_exceeded",
        )
    return list(tokens)


def generate(model: Model, request: GenerationRequest, tokens: list[int], emit: Emit, cut: threading.Event) -> Ended:
    """Generates until the model, a stop text, a limit or `cut` ends it; `emit` gets the text as it grows."""
    sampling = request.sampling
    limit = min(sampling.max_tokens, model.max_positions - len(tokens))
    output = _Output(model.tokenizer, emit, sampling.stop)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    inputs = torch.tensor([tokens])
    with torch.inference_mode():
        generated = model.module.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=_config(model, sampling, limit),
            streamer=output,
            stopping_criteria=StoppingCriteriaList([_Stop(output, cut)]),
        )
    count = generated.shape[1] - len(tokens)
    if cut.is_set():
        reason = "cut"
    elif output.stopped or count < limit or int(generated[0, -1]) in _end_tokens(model):
        reason = "stop"
    else:
        reason = "length"
    return Ended(reason, len(tokens), count)


def embed(model: Model, texts: list[str]) -> tuple[list[list[float]], int]:
    """One vector a text: the mean of the last hidden states of its tokens, of length 1. Also the tokens read."""
    if model.tokenizer is None:
        raise BadRequest(_NO_TOKENIZER)
    vectors, count = [], 0
    backbone = getattr(model.module, model.module.base_model_prefix, model.module)
    for text in texts:
        batch = model.tokenizer(text, return_tensors="pt", truncation=True, max_length=model.max_positions)
        with torch.inference_mode():
            hidden = backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mean = hidden[0].float().mean(dim=0)
        vectors.append(torch.nn.functional.normalize(mean, dim=0).tolist())
        count += int(batch["input_ids"].shape[1])
    return vectors, count


class _Output(TextStreamer):  # type: ignore[misc]
    """Passes text on as it is finished, holding back what may become a stop text."""

    def __init__(self, tokenizer: Any, emit: Emit, stops: tuple[str, ...]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._emit = emit
        self._stops = stops
        self._held = ""
        self.stopped = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.stopped:
            return
        self._held += text
        cuts = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            self._pass_on(min(cuts))
        else:
            self._pass_on(len(self._held) - (0 if stream_end else self._undecided()))

    def _undecided(self) -> int:
        """How much of the end of the text could be the beginning of a stop text."""
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

    def __call__(self, *_: Any, **__: Any) -> torch.Tensor:
        return torch.tensor([self._output.stopped or self._cut.is_set()])


def _chat_tokens(model: Model, request: GenerationRequest) -> list[int]:
    if not model.tokenizer.chat_template:
        raise BadRequest("this model has no chat template: ask it by /v1/completions", param="messages")
    try:
        text = model.tokenizer.apply_chat_template(
            list(request.messages), add_generation_prompt=True, tokenize=False, **request.template_options
        )
    except Exception as error:  # noqa: BLE001 -- the template is its author's program: what it raises is its refusal
        raise BadRequest(f"the model's chat template refuses these messages: {error}", param="messages") from None
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def _config(model: Model, sampling: Sampling, limit: int) -> GenerationConfig:
    config = GenerationConfig.from_dict(model.generation.to_dict())
    config.max_new_tokens = limit
    config.max_length = None
    if sampling.temperature is not None:
        config.do_sample = sampling.temperature > 0
        config.temperature = sampling.temperature or None
    for name in ("top_p", "top_k", "repetition_penalty"):
        if (value := getattr(sampling, name)) is not None:
            setattr(config, name, value)
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    if config.pad_token_id is None:
        config.pad_token_id = model.tokenizer.pad_token_id or 0
    return config


def _end_tokens(model: Model) -> set[int]:
    ends = model.generation.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])
