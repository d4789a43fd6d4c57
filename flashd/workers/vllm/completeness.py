# SPDX-License-Identifier: Apache-2.0
"""Checks that vLLM has loaded every weight of a model. Otherwise vLLM would use uninitialised memory for missing ones.

vLLM's own checks depend on its version. No version checks quantised models, weights that are loaded in place, or parts:
a parameter fused from three tensors counts as loaded with the first of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from flashd.errors import CorruptCheckpoint
from flashd.workers.vllm import quantised

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_MOST_NAMES = 5
_FLOATS = {torch.float16, torch.bfloat16, torch.float32}


def load(
    model: nn.Module,
    model_config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    may_lack: Collection[str] = (),
) -> None:
    """Loads a model that was just built. Weights whose names contain an entry of `may_lack` may be missing.

    Raises CorruptCheckpoint if another weight is missing.
    """
    marked = {name: parameter for name, parameter in _markable(model) if not _is_among(name, may_lack)}
    for parameter in marked.values():
        _edge(parameter).fill_(math.nan)
    with watched(model, model_config, may_lack):
        model.load_weights(tensors)
    now = dict(model.named_parameters())
    _raise_for(name for name in marked if name in now and bool(_edge(now[name]).isnan().any()))


@contextlib.contextmanager
def watched(model: nn.Module, model_config: ModelConfig, may_lack: Collection[str] = ()) -> Iterator[None]:
    """Compares the weights that the model's `load_weights` reports as loaded in this context with those to be loaded.

    Raises CorruptCheckpoint at the end of the context.
    """
    wanted = {_of_base(name) for name, _ in model.named_parameters() if not _is_among(name, may_lack)}
    quantised_layers = {
        _of_base(name): [_of_base(f"{name}.{own}") for own, _ in module.named_parameters(recurse=False)]
        for name, module in model.named_modules()
        if not quantised.is_plain(module) and _holds_weights(module) and not _is_among(name, may_lack)
    }
    original: Callable[..., set[str] | None] = model.load_weights
    loaded: set[str] | None = set()

    def noted(*arguments: object, **options: object) -> set[str] | None:
        nonlocal loaded
        found = original(*arguments, **options)
        loaded = None if found is None or loaded is None else loaded | {_of_base(name) for name in found if name}
        return found

    object.__setattr__(model, "load_weights", noted)
    try:
        yield
    finally:
        object.__delattr__(model, "load_weights")
    if loaded is None:  # some models do not report it
        return
    if model_config.quantization is None:
        _raise_for(wanted - loaded)
    else:
        # The tensors of a quantised layer depend on its method, and scales may be missing, but not all of them.
        _raise_for(layer for layer, own in quantised_layers.items() if not loaded.intersection(own))


def _markable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields each parameter once that holds a checkpoint's weights unchanged."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False) if quantised.is_plain(module) else ():
            is_there = type(parameter).__name__ != "UninitializedParameter" and not parameter.is_meta
            if is_there and parameter.numel() and parameter.dtype in _FLOATS and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{name}" if prefix else name, parameter


def _edge(parameter: torch.Tensor) -> torch.Tensor:
    """Selects one value of each row, which shows at almost no cost which rows were loaded."""
    return parameter.data if parameter.dim() < 2 else parameter.data.select(-1, 0)


def _holds_weights(module: nn.Module) -> bool:
    """Tells whether a module has other parameters than factors for a KV cache."""
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def _of_base(name: str) -> str:
    """Returns the name that a weight would have without adapters.

    To apply adapters, vLLM wraps each layer in one that holds it as `base_layer`. `load_weights` then reports a weight
    under the wrapper's name if the wrapper loads it (vllm.lora.layers.BaseLayerWithLoRA), and under the inner layer's
    name if a model looks it up among its parameters, as for experts. Adapters' own tensors are not parameters.
    """
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _is_among(name: str, parts: Collection[str]) -> bool:
    return any(part in name for part in parts)


def _raise_for(missing: Iterable[str]) -> None:
    names = sorted(missing)
    if names:
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        hint = "save or download the complete model again, with its config.json"
        raise CorruptCheckpoint(f"the checkpoint lacks weights for {', '.join(names[:_MOST_NAMES])}{more}", hint=hint)
