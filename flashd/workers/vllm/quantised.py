# SPDX-License-Identifier: Apache-2.0
"""Decides what image can be made of a quantised model: one for all processes, its process's own, or none.

An image for all contains the parameters, plain tensors and checkpoint buffers of modules. Quantisation methods may keep
more: Python numbers that were tensors, tensors inside kernels. So a method must be known to keep nothing else, by its
own declaration in vLLM 0.32 and newer (`supports_pre_processed_weights`), or by the list below. Otherwise the image is
the process's own, which includes what kernels keep (flashd/workers/vllm/module_state.py).

In any case, loading may not leave tensors to which the modules do not lead.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Collection, Iterator

import torch
from torch import nn

from flashd.workers.vllm.module_state import module_state

_PLAIN = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "UnquantizedFusedMoEMethod"}
# Checked in vLLM 0.22 and 0.23: they keep everything that they make of weights as parameters of the layer.
_SOUND = _PLAIN | {
    "Fp8LinearMethod", "Fp8OnlineLinearMethod", "Fp8PerTensorOnlineLinearMethod", "Fp8PerBlockOnlineLinearMethod",
    "Fp8KVCacheMethod",
}  # fmt: skip
# Methods, schemes and kernels that keep no addresses of weights, as read in vLLM 0.23 and 0.32. tests/gpu compares the
# methods and schemes of 0.23 with vLLM alone, in groups of 32, for which vLLM does not choose Machete.
_SEEN = {
    "AWQMarlinLinearMethod", "AutoAWQMarlinLinearMethod", "AutoGPTQLinearMethod",
    "CompressedTensorsLinearMethod", "CompressedTensorsW8A8Int8", "CompressedTensorsWNA16",
    "MarlinLinearKernel", "MacheteLinearKernel", "CutlassInt8ScaledMMLinearKernel",
}  # fmt: skip
# Factors of checkpoints for a quantised KV cache. Kernels get them as Python numbers, so only 1 is safe.
_FACTORS = ("_q_scale_float", "_k_scale_float", "_v_scale_float", "_prob_scale_float")


def storages(device: torch.device) -> set[int]:
    """Returns the addresses of all storages on a device that tensors of this process view."""
    return {address for address, _ in _tensors(device)}


def why_own(model: nn.Module) -> str:
    """Returns why only the process that makes an image of a model can map it; empty if all can."""
    for name, method in sorted(_methods(model).items()):
        own_word = getattr(method, "supports_pre_processed_weights", None)
        if not (name in _SOUND if own_word is None else own_word or name in _PLAIN):
            return f"{name} keeps state of the weights outside its tensors"
    return ""


def _untested(model: nn.Module) -> str:
    """Names a method, scheme or kernel of a model that is not known to keep no addresses of weights."""
    found = [
        *_methods(model).values(),
        *(scheme for module in model.modules() if (scheme := vars(module).get("scheme"))),
    ]
    found += [kernel for each in found if (kernel := getattr(each, "kernel", None)) is not None]
    return next((name for name in sorted({type(each).__name__ for each in found}) if name not in _SOUND | _SEEN), "")


def hindrance(model: nn.Module, before: Collection[int] | None, *, with_kernels: bool) -> str:
    """Explains why no image can be made of a model that was just loaded; empty if one can.

    `before` are the `storages` before the load; without them, only the knowledge about its methods counts.
    `with_kernels`: the image is to include what kernels keep.
    """
    if _methods(model).keys() <= _PLAIN:
        return ""
    for name, module in model.named_modules():
        if any(getattr(module, factor, 1.0) != 1.0 for factor in _FACTORS):
            return f"{name} has its own factors for a quantised KV cache"
    if with_kernels and (name := _untested(model)):
        return f"{name} was not tested with images"
    if before is None:
        return ""
    device = next(model.parameters()).device
    own = {tensor.untyped_storage().data_ptr() for tensor in _kept(model)}
    if with_kernels:
        own |= {kept.tensor.untyped_storage().data_ptr() for kept in module_state(model).tensors.values()}
    gc.collect()
    strays = [tensor for address, tensor in _tensors(device) if address not in own and address not in before]
    if strays:
        of = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.") for tensor in strays[:3])
        return f"{len(strays)} tensors were created outside its modules: {of}"
    return ""


def _methods(model: nn.Module) -> dict[str, object]:
    return {type(method).__name__: method for module in model.modules() if (method := _method_of(module))}


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
