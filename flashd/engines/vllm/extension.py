# SPDX-License-Identifier: Apache-2.0
"""What does the engine have vLLM's workers do? Let go of the weights, and take others, in place.

vLLM mixes this class into its own worker, in the process of each rank (`--worker-extension-cls`), and calls it by
`collective_rpc`.

On a processor vLLM keeps weights packed for its kernels, so they are copies; parking gives their memory back, and
whoever takes weights again packs anew, by vLLM's own in-place reload, from the arena. On a GPU the addresses in
captured graphs must stay: there parking keeps the memory for now, and taking weights copies into it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flashd.engines.vllm import handover
from flashd.engines.vllm.weights import handed_over


class Extension:
    """Mixed into vLLM's worker: `model_runner` and `device` are its attributes."""

    model_runner: Any
    device: torch.device
    _emptied: list[tuple[torch.UntypedStorage, int]]

    def flashd_take(self) -> int:
        """Takes the weights that the engine hands over; returns their bytes. Whatever it raises, nothing may be
        answered before another call of it has succeeded."""
        for storage, size_bytes in getattr(self, "_emptied", ()):
            storage.resize_(size_bytes)
        self._emptied = []
        tensors = handed_over(Path(handover.SOCKET))
        packed = list(self._unpack())
        self.model_runner.reload_weights(weights_iterator=iter(tensors.items()))
        for module in packed:
            if module.cpu_linear is None:
                # Tied to another module's weight, so that nothing was loaded into it, and vLLM left it as it was.
                module.quant_method.process_weights_after_loading(module)
        return sum(tensor.nbytes for tensor in tensors.values())

    def flashd_park(self) -> int:
        """Gives memory back; returns the bytes of weights and KV cache that went."""
        if self.device.type != "cpu":
            return 0
        sizes = {storage.data_ptr(): (storage, storage.nbytes()) for storage in self._storages() if storage.nbytes()}
        self._emptied = list(sizes.values())
        for storage, _ in self._emptied:
            storage.resize_(0)
        list(self._unpack())
        return sum(size_bytes for _, size_bytes in self._emptied)

    def _unpack(self) -> Iterator[torch.nn.Module]:
        """Drops the packed copies of weights that the processor's kernels read; tells whose they were.

        Experts are packed when their kernel is made, which vLLM does once, so that after a reload the old kernel would
        read new weights that are not packed: without one, it makes another.
        """
        for module in self.model_runner.get_model().modules() if self.device.type == "cpu" else ():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None
            if hasattr(module, "cpu_linear"):
                module.cpu_linear = None
                yield module

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """Of parameters and KV cache: tensors keep their shapes, and only the memory behind them goes. Buffers stay:
        some are computed once and not in any checkpoint (rotary tables)."""
        for parameter in self.model_runner.get_model().parameters():
            yield parameter.data.untyped_storage()
        for cache in _tensors(self.model_runner.kv_caches):
            yield cache.untyped_storage()


def _tensors(nested: Any) -> Iterator[torch.Tensor]:
    """vLLM holds a tensor a layer, or several (state-space models)."""
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, list | tuple):
        for part in nested:
            yield from _tensors(part)
