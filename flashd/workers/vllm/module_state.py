# SPDX-License-Identifier: Apache-2.0
"""Finds what the objects of a model keep: tensors, also those of kernels and quantisation methods, and plain values.

Quantisation methods keep more of the weights than parameters: permutations beside them, scales in the configuration of
a kernel, numbers that were tensors. All of it is reached from the modules, through objects of vLLM's model code.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator, MutableMapping, MutableSequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_DEEPEST = 8
# Code whose objects are looked into. Others, such as configurations, come from the same files for all weights.
_OF_MODELS = ("vllm.model_executor.", "vllm.v1.attention.", "compressed_tensors.")
_OF_ADAPTERS = "vllm.lora."  # modules that wrap others as `base_layer`, and keep only adapters
# Attributes of modules that say nothing about weights; the last ones are notes of vLLM about loading itself.
_MACHINERY = vars(nn.Module()).keys() | {
    "kv_cache", "_do_torchao_reload", "_original_do_torchao_reload", "_already_called_process_weights_after_loading",
}  # fmt: skip
_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor, and who keeps it under `key`: a mapping of attributes, or a list; or a tuple, in which it must stay."""

    tensor: torch.Tensor
    keeper: object
    key: Any

    @property
    def may_be_put(self) -> bool:
        return isinstance(self.keeper, MutableMapping | MutableSequence)

    def put(self, tensor: torch.Tensor) -> None:
        """Puts another tensor into its place, if it may be put."""
        assert isinstance(self.keeper, MutableMapping | MutableSequence)
        self.keeper[self.key] = tensor


@dataclass(frozen=True, slots=True)
class ModuleState:
    """Tensors and plain values by their path from the model, such as `layers.0.qkv.quant_method.kernel.workspace`.

    An object reached by several paths has the first of them. Paths are those without adapters. Buffers, empty tensors
    and adapters are left out.
    """

    tensors: dict[str, Kept] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)


def module_state(model: nn.Module) -> ModuleState:
    """Reads the state of all modules, on the model's device."""
    state = ModuleState()
    modules = {
        path.replace(".base_layer", ""): module
        for path, module in model.named_modules()
        if not type(module).__module__.startswith(_OF_ADAPTERS)
    }
    device = next(model.parameters()).device
    seen = {id(module) for module in model.modules()}
    own = [
        _Found(f"{path}.{name}" if path else name, value, keeper, name, 0)
        for path, module in modules.items()
        for keeper in (module._parameters, vars(module))
        for name, value in keeper.items()
        if name not in _MACHINERY
    ]
    # Modules' own tensors first, so that these have the names by which models know them. Then whatever is nearer, so
    # that the limit of depth does not depend on the way to an object.
    left = deque(sorted(own, key=lambda one: not isinstance(one.value, torch.Tensor)))
    while left:
        one = left.popleft()
        if isinstance(one.value, torch.Tensor):
            if _is_on(one.value, device):
                state.tensors[one.path] = Kept(one.value, one.keeper, one.key)
        elif isinstance(one.value, _PLAIN):
            state.values[one.path] = repr(one.value)
        elif id(one.value) not in seen:
            seen.add(id(one.value))
            state.values[one.path] = type(one.value).__qualname__
            if one.depth < _DEEPEST:
                left.extend(
                    _Found(f"{one.path}.{name}", part, inside, name, one.depth + 1)
                    for name, part, inside in _parts(one.value)
                )
    return state


@dataclass(frozen=True, slots=True)
class _Found:
    path: str
    value: object
    keeper: object
    key: Any
    depth: int


def _parts(value: object) -> Iterator[tuple[Any, object, object]]:
    """Yields what an object consists of, by key, with what keeps it."""
    if isinstance(value, dict):
        yield from ((key, part, value) for key, part in list(value.items()) if isinstance(key, str | int))
    elif isinstance(value, list | tuple):
        yield from ((index, part, value) for index, part in enumerate(value))
    elif type(value).__module__.startswith(_OF_MODELS):
        if isinstance(value, nn.Module):  # one that the model does not list
            yield from ((name, part, value._parameters) for name, part in list(value._parameters.items()))
        attributes = getattr(value, "__dict__", {})
        yield from (
            (name, part, attributes)
            for name, part in list(attributes.items())
            if not (isinstance(value, nn.Module) and name in _MACHINERY)
        )


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """Leaves out empty tensors, and a few scalars that models keep on the CPU."""
    return bool(tensor.device == device and tensor.untyped_storage().nbytes())
