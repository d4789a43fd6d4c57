# SPDX-License-Identifier: Apache-2.0
"""Of which quantised models can an image be made? Of those of which it would have everything that came from weights.

An image has what modules keep: parameters, plain tensors, buffers of the checkpoint. Methods of quantisation may keep
more: numbers in Python that were tensors, tensors inside kernels. So a method must be known to keep nothing else, by
its own word where vLLM has one (0.32 and newer: `supports_pre_processed_weights`), by the list below before that; and
whatever it says, no tensor may have come to be elsewhere while the model was loaded.

AWQ, GPTQ and compressed-tensors are not among them. Such a model takes the ordinary path, fed from the arena: it is
stopped where others are parked.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Collection, Iterator

import torch
from torch import nn

_PLAIN = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "UnquantizedFusedMoEMethod"}
# Read in vLLM 0.22 and 0.23: what they make of weights they keep as parameters of the layer.
_SOUND = _PLAIN | {
    "Fp8LinearMethod", "Fp8OnlineLinearMethod", "Fp8PerTensorOnlineLinearMethod", "Fp8PerBlockOnlineLinearMethod",
    "Fp8KVCacheMethod",
}  # fmt: skip
# Factors that checkpoints may have for a quantised KV cache. Kernels get them as Python's numbers: only 1 is safe.
_FACTORS = ("_q_scale_float", "_k_scale_float", "_v_scale_float", "_prob_scale_float")


def storages(device: torch.device) -> set[int]:
    """Addresses of all memory on a device that some tensor of this process views."""
    return {address for address, _ in _tensors(device)}


def hindrance(model: nn.Module, before: Collection[int] | None) -> str:
    """Why no image can be made of a model that was just loaded; empty if one can. `before` are the `storages` that
    there were before it was; without them only what is said of its methods counts."""
    methods = {type(method).__name__: method for module in model.modules() if (method := _method_of(module))}
    if methods.keys() <= _PLAIN:
        return ""
    for name, method in sorted(methods.items()):
        own_word = getattr(method, "supports_pre_processed_weights", None)
        if not (name in _SOUND if own_word is None else own_word or name in _PLAIN):
            return f"{name} keeps more of the weights than its tensors"
    for name, module in model.named_modules():
        if any(getattr(module, factor, 1.0) != 1.0 for factor in _FACTORS):
            return f"{name} has factors of its own for a quantised KV cache"
    if before is None:
        return ""
    device = next(model.parameters()).device
    own = {tensor.untyped_storage().data_ptr() for tensor in _kept(model)}
    gc.collect()
    strays = [tensor for address, tensor in _tensors(device) if address not in own and address not in before]
    if strays:
        of = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.") for tensor in strays[:3])
        return f"{len(strays)} tensors came to be outside its modules: {of}"
    return ""


def _method_of(module: nn.Module) -> object:
    return getattr(module, "quant_method", None)


def _kept(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        for kept in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(kept, torch.Tensor) and kept.device.type != "meta":
                yield kept


def _tensors(device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    for candidate in gc.get_objects():
        if issubclass(type(candidate), torch.Tensor):
            with contextlib.suppress(RuntimeError, NotImplementedError):  # some have no storage
                if candidate.device == device and (address := candidate.untyped_storage().data_ptr()):
                    yield address, candidate
