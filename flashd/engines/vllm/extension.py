# SPDX-License-Identifier: Apache-2.0
"""What does the engine have vLLM's workers do? Let go of the weights, and take others, in place.

vLLM mixes this class into its own worker, in the process of each rank (`--worker-extension-cls`), and calls it by
`collective_rpc`.

On a GPU the weights are an image in memory that is shown at addresses which stay, so that captured graphs stay valid:
parking hides it and has vLLM's sleep mode release the KV cache; waking and rebinding show an image, the same or
another. Where there is none yet, vLLM's own in-place reload fills fresh memory at these addresses, which is an image
then.

On a processor vLLM keeps weights packed for its kernels, so they are copies; parking gives their memory back, and
whoever takes weights again packs anew, by the same reload, from the arena.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashd.engines.control import Frame, close_all
from flashd.engines.vllm import handover
from flashd.engines.vllm.images import ATTRIBUTE, GpuMemory, ImageWeights
from flashd.engines.vllm.sources import Source, hand_on
from flashd.engines.vllm.weights import arena_tensors
from flashd.errors import Unsupported

_SLEEP_LEVEL = 2  # the KV cache goes, and the weights that vLLM has itself, of which none are left


def view(model: nn.Module, source: Source) -> None:
    """Has a model that was just made, and loaded nothing, view the image that there is."""
    _give(model, ImageWeights(model, _memory(), source.fd, source.layout))


def make(model: nn.Module, source: Source) -> None:
    """Makes an image of what a model has loaded, has it view that, and hands it on."""
    weights = ImageWeights(model, _memory())
    _give(model, weights)
    source.hand_on(weights)


def _memory() -> GpuMemory:
    return GpuMemory(torch.cuda.current_device())


def _give(model: nn.Module, weights: ImageWeights) -> None:
    setattr(model, ATTRIBUTE, weights)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what the weights were in before


class Extension:
    """Mixed into vLLM's worker: `model_runner`, `lora_config`, `rank`, `device`, `sleep` and `wake_up` are its."""

    model_runner: Any
    lora_config: Any
    rank: int
    device: torch.device
    sleep: Any
    wake_up: Any
    _is_asleep = False
    _emptied: list[tuple[torch.UntypedStorage, int]]

    def flashd_take(self) -> int:
        """Takes what the engine hands over; returns the bytes of its weights. Whatever it raises, nothing may be
        answered before another call of it has succeeded."""
        given = handover.ask(Path(handover.SOCKET), self.rank)
        try:
            weights = self._image_weights()
            if weights is None:
                return self._load_in_place(given)
            torch.cuda.synchronize()
            if given.content["is_image"]:
                weights.check(given.content["layout"])
                weights.show(given.fds[0])
                self._rise()
                weights.restore_buffers()
            else:
                weights.renew()
                self._rise()
                self._reload(given)
                weights.finish()
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # what layers were assembled in
                hand_on(weights, Path(handover.SOCKET), self.rank)
            return weights.header.data_bytes
        finally:
            close_all(given.fds)

    def flashd_park(self) -> int:
        """Gives memory back; returns the bytes of weights and, on a processor, KV cache that went.

        Raises Unsupported if the weights, or those of adapters, are in memory that vLLM has of a GPU: nothing could
        bring them back.
        """
        if self.device.type == "cpu":
            return self._empty()
        if self.lora_config is not None:
            raise Unsupported("adapters that vLLM applies cannot leave the GPU and come back")
        weights = self._image_weights()
        if weights is None:
            raise Unsupported("weights that are no image cannot leave the GPU and come back")
        torch.cuda.synchronize()
        self.sleep(_SLEEP_LEVEL)
        self._is_asleep = True
        weights.hide()
        return weights.header.data_bytes

    def _image_weights(self) -> ImageWeights | None:
        found: ImageWeights | None = getattr(self.model_runner.get_model(), ATTRIBUTE, None)
        return found

    def _rise(self) -> None:
        """The KV cache is there again, empty."""
        if self._is_asleep:
            self.wake_up()
            self._is_asleep = False

    def _reload(self, given: Frame) -> int:
        tensors = arena_tensors(given.fds[0], given.content)
        self.model_runner.reload_weights(weights_iterator=iter(tensors.items()))
        return sum(tensor.nbytes for tensor in tensors.values())

    def _load_in_place(self, given: Frame) -> int:
        """Into memory that vLLM has itself."""
        for storage, size_bytes in getattr(self, "_emptied", ()):
            storage.resize_(size_bytes)
        self._emptied = []
        packed = list(self._unpack())
        loaded_bytes = self._reload(given)
        for module in packed:
            if module.cpu_linear is None:
                # Tied to another module's weight, so that nothing was loaded into it, and vLLM left it as it was.
                module.quant_method.process_weights_after_loading(module)
        return loaded_bytes

    def _empty(self) -> int:
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
