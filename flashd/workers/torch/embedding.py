# SPDX-License-Identifier: Apache-2.0
"""Embeddings: pooled as the model declares, or else the mean of its last hidden states, normalised to length 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from flashd.workers.torch import generation
from flashd.workers.torch.model import Model
from flashd.workers.torch.requests import BadRequest, EmbeddingRequest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_NO_TEXT = "this model cannot embed texts"


def embed(model: Model, request: EmbeddingRequest) -> tuple[list[torch.Tensor], int]:
    """Returns one float32 vector for each input, and the number of tokens read. Raises BadRequest."""
    config = model.module.config
    backbone = getattr(model.module, model.module.base_model_prefix, model.module)
    if config.is_encoder_decoder and hasattr(backbone, "decoder"):
        raise BadRequest(f"{_NO_TEXT}: it has an encoder and a decoder")
    batches = [_tokens(model, one) for one in request.inputs]
    vectors = [_sized(_pooled(model, backbone, tokens), request.dimensions, config) for tokens in batches]
    return vectors, sum(map(len, batches))


def _tokens(model: Model, one: str | list[int]) -> list[int]:
    pooling = model.pooling
    if isinstance(one, str):
        if model.tokenizer is None:
            raise BadRequest(generation.NO_TOKENIZER)
        text = pooling.prompt + (one.lower() if pooling.lowercases else one)
        one = list(model.tokenizer(text)["input_ids"])
    generation.check_tokens(model, one, "input")
    most = min(model.max_positions, pooling.max_tokens or model.max_positions)
    if len(one) > most:
        message = f"an input has {len(one)} tokens, but this model reads at most {most}"
        raise BadRequest(message, param="input", code="context_length_exceeded")
    return one


def _pooled(model: Model, backbone: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    inputs = torch.tensor([tokens])
    with torch.inference_mode():
        output = backbone(input_ids=inputs, attention_mask=torch.ones_like(inputs))
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise BadRequest(_NO_TEXT)
    states = hidden[0].float()
    vector = torch.cat([_POOLED[mode](states) for mode in model.pooling.modes])
    return torch.nn.functional.normalize(vector, dim=0) if model.pooling.normalizes else vector


def _weighted_mean(states: torch.Tensor) -> torch.Tensor:
    """Returns the mean with larger weights for later tokens, which have seen more of the text."""
    weights = torch.arange(1, len(states) + 1, dtype=states.dtype).unsqueeze(1)
    return (states * weights).sum(dim=0) / weights.sum()


_POOLED = {
    "cls": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
    "max": lambda states: states.max(dim=0).values,
    "mean": lambda states: states.mean(dim=0),
    "mean_sqrt_len_tokens": lambda states: states.sum(dim=0) / len(states) ** 0.5,
    "weightedmean": _weighted_mean,
}


def _sized(vector: torch.Tensor, dimensions: int | None, config: PretrainedConfig) -> torch.Tensor:
    """Shortens a vector to its first `dimensions` numbers, for models trained for that (Matryoshka)."""
    if dimensions is None or dimensions == len(vector):
        return vector
    allowed = getattr(config, "matryoshka_dimensions", None)
    is_trained = allowed or getattr(config, "is_matryoshka", False)
    if not is_trained or dimensions > len(vector) or (isinstance(allowed, list) and dimensions not in allowed):
        also = f" or {allowed}"[:200] if isinstance(allowed, list) else ""
        raise BadRequest(f"dimensions can only be {len(vector)}{also} with this model", param="dimensions")
    return torch.nn.functional.normalize(vector[:dimensions], dim=0)
