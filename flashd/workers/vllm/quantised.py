# SPDX-License-Identifier: Apache-2.0
"""Decides whether an image can be made of a quantised model: only if all state derived from its weights is in it.

An image contains the parameters, plain tensors and checkpoint buffers of modules. Quantisation methods may keep more:
Python numbers that were tensors, tensors inside kernels. So a method must be known to keep nothing else, by its own
declaration in vLLM 0.32 and newer (`supports_pre_processed_weights`), or by the list below. In any case, no tensor may
have been created outside the modules while the model was loaded.

AWQ, GPTQ and compressed-tensors do not qualify. Such a model is loaded from the arena in the ordinary way, and its
engine is stopped instead of parked.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Collection, Iterator

import torch
from torch import nn

_PLAIN = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "UnquantizedFusedMoEMethod"}
# Checked in vLLM 0.22 and 0.23: they keep everything that they make of weights as parameters of the layer.
_SOUND = _PLAIN | {
    "Fp8LinearMethod", "Fp8OnlineLinearMethod", "Fp8PerTensorOnlineLinearMethod", "Fp8PerBlockOnlineLinearMethod",
    "Fp8KVCacheMethod",
}  # fmt: skip
# Factors of checkpoints for a quantised KV cache. Kernels get them as Python numbers, so only 1 is safe.
_FACTORS = ("_q_scale_float", "_k_scale_float", "_v_scale_float", "_prob_scale_float")


def storages(device: torch.device) -> set[int]:
    """Returns the addresses of all storages on a device that tensors of this process view."""
    return {address for address, _ in _tensors(device)}


def hindrance(model: nn.Module, before: Collection[int] | None) -> str:
    """Explains why no image can be made of a model that was just loaded; empty if one can.

    `before` are the `storages` before the load; without them, only the knowledge about its methods counts.
    """
    methods = {type(method).__name__: method for module in model.modules() if (method := _method_of(module))}
    if methods.keys() <= _PLAIN:
        return ""
    for name, method in sorted(methods.items()):
        own_word = getattr(method, "supports_pre_processed_weights", None)
        if not (name in _SOUND if own_word is None else own_word or name in _PLAIN):
            return f"{name} keeps state of the weights outside its tensors"
    for name, module in model.named_modules():
        if any(getattr(module, factor, 1.0) != 1.0 for factor in _FACTORS):
            return f"{name} has its own factors for a quantised KV cache"
    if before is None:
        return ""
    device = next(model.parameters()).device
    own = {tensor.untyped_storage().data_ptr() for tensor in _kept(model)}
    gc.collect()
    strays = [tensor for address, tensor in _tensors(device) if address not in own and address not in before]
    if strays:
        of = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.") for tensor in strays[:3])
        return f"{len(strays)} tensors were created outside its modules: {of}"
    return ""


def is_plain(module: nn.Module) -> bool:
    """Tells whether a module's parameters hold the checkpoint's tensors unchanged."""
    method = _method_of(module)
    return method is None or type(method).__name__ in _PLAIN


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
