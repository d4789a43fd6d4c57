# SPDX-License-Identifier: Apache-2.0
"""Builds a transformers model from exactly the given tensors: none is invented, and none is left out.

transformers itself initialises missing weights at random, ignores unknown ones, and only warns. Here both are errors
that name the tensors, unless the tensors are known to have no effect on answers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from flashd.errors import EngineFailed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

OTHER_CONFIG = "replace it with the config.json that belongs to the weights"
_INCOMPLETE = "save or download the complete model again, with its config.json"
_MOST_NAMES = 5
_MOST_TIMES = 2  # parameters per value of the checkpoint, because quantised values are packed, with 4 or 8 in a byte
_PACKED = 8
# Buffers of older versions, of quantisation for a KV cache, and of trainers, which are not weights.
_HARMLESS = re.compile(
    r"rotary_(pos_)?emb\.|inv_freq$|(^|\.)(masked_bias|position_ids|num_batches_tracked)$|\.[qkv]_scale$"
)


def load(cls: type[PreTrainedModel], config: PretrainedConfig, tensors: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Builds the model, which uses `tensors` in place as far as possible. Raises EngineFailed if they do not match."""
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else getattr(config, "dtype", None) or torch.float32
    _check_parameters(cls, config, tensors)
    try:
        module, report = cls.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that mismatches are reported by name
        )
    except RuntimeError as error:
        if "conversion" not in str(error):
            raise
        raise EngineFailed(f"transformers cannot assemble its weights: {error}", hint=_INCOMPLETE) from None
    if others := report["mismatched_keys"]:
        said = (f"{name} has {list(stored)}, but should have {list(wanted)}" for name, stored, wanted in others)
        raise EngineFailed(f"its config.json is of other weights: {_some(said)}", hint=OTHER_CONFIG)
    if missing := report["missing_keys"]:
        raise EngineFailed(f"the checkpoint has no weights for {_some(missing)}", hint=_INCOMPLETE)
    _check_unused(module, config, {name: tensors.get(name) for name in report["unexpected_keys"]})
    if module.can_generate():
        module.generation_config = GenerationConfig()  # its defaults would apply to requests
    return module.eval().requires_grad_(False)


def _check_parameters(
    cls: type[PreTrainedModel], config: PretrainedConfig, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Checks the model's size. Raises EngineFailed if it is far larger than the checkpoint, because memory for all of
    it would be allocated before missing weights are noticed.
    """
    try:
        with torch.device("meta"):
            wanted = sum(parameter.numel() for parameter in cls(config).parameters())
    except (RuntimeError, OverflowError) as error:  # the product of the sizes is too large for torch
        raise EngineFailed(f"config.json describes a model that cannot be built: {error}", hint=OTHER_CONFIG) from None
    is_quantised = getattr(config, "quantization_config", None) is not None
    stored = sum(tensor.numel() for tensor in tensors.values()) * (_PACKED if is_quantised else 1)
    if wanted > _MOST_TIMES * stored:
        why = f"config.json describes {wanted} parameters, but the checkpoint has {stored}"
        raise EngineFailed(f"its config.json is of other weights: {why}", hint=OTHER_CONFIG)


def _check_unused(module: PreTrainedModel, config: PretrainedConfig, unused: Mapping[str, torch.Tensor | None]) -> None:
    """Checks tensors that the model does not use.

    Raises EngineFailed for tensors inside its layers, or of additional layers, because without them it would answer,
    but not as trained. Heads for other tasks are ignored and logged.
    """
    lists = [name for name, part in module.named_modules() if isinstance(part, torch.nn.ModuleList) and len(part)]
    inside = re.compile(r"(?:^|\.)(?:" + "|".join(map(re.escape, lists)) + r")\.(\d+)\.") if lists else None
    further = _layers_of(config)
    wrong = []
    for name, tensor in unused.items():
        found = inside.search(name) if inside else None
        is_ahead = found is not None and int(found[1]) in further
        if found and not is_ahead and not _HARMLESS.search(name) and (tensor is None or _counts(tensor)):
            wrong.append(name)
    if wrong:
        said = f"its architecture {type(module).__name__} does not use {_some(wrong)}"
        raise EngineFailed(said, hint=OTHER_CONFIG)
    if unused:
        print(f"not used by {type(module).__name__}: {_some(unused)}", file=sys.stderr, flush=True)


def _counts(tensor: torch.Tensor) -> bool:
    """Tells whether a tensor may be a weight, unlike attention masks and the zero biases of quantisation tools."""
    return tensor.dim() <= 2 and tensor.is_floating_point() and bool(torch.any(tensor != 0))


def _layers_of(config: PretrainedConfig) -> Collection[int]:
    """Returns the numbers of layers for multi-token prediction, which some checkpoints have after the others."""
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", 0) or 0
    return range(layers, layers + (getattr(text, "num_nextn_predict_layers", 0) or 0))


def _some(names: Iterable[str]) -> str:
    """Formats the first few names, and the number of others."""
    known = sorted(names)
    more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return ", ".join(name[:200] for name in known[:_MOST_NAMES]) + more
