# SPDX-License-Identifier: Apache-2.0
"""The extension of vLLM's workers, which releases weights and takes others in place.

vLLM mixes this class into its own worker, in the process of each rank (`--worker-extension-cls`), and calls it by
`collective_rpc`.

On a GPU, the weights are an image mapped at fixed addresses, so that captured graphs stay valid. Parking unmaps it and
has vLLM's sleep mode release the KV cache; waking and rebinding map the same or another image. If there is no image
yet, vLLM's own in-place reload fills new memory at these addresses, which becomes an image. All that is in no image,
such as adapters and the scratch memory of kernels, stays where it is.

On a CPU, vLLM keeps copies of the weights, packed for its kernels. Parking frees their memory, and taking weights again
packs them from the arena, by the same reload.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashd.engines.control import Parcel
from flashd.engines.messages import RankShare
from flashd.errors import Unsupported
from flashd.tasks import close_all
from flashd.workers.vllm import completeness, rank_server
from flashd.workers.vllm.images import ATTRIBUTE, GpuMemory, ImageWeights
from flashd.workers.vllm.sources import Source, hand_on
from flashd.workers.vllm.weights import arena_tensors

_SLEEP_LEVEL = 2  # releases the KV cache, and has a copy of buffers; GpuWorker lets it have no weights
_BUFFERS, _CACHE = "weights", "kv_cache"  # as vLLM calls what it restores


def view(model: nn.Module, source: Source) -> None:
    """Makes a new model, into which nothing was loaded, use the existing image."""
    _give(model, ImageWeights(model, _memory(), source.fd, source.layout))


def make(model: nn.Module, source: Source, *, is_own: bool) -> None:
    """Makes an image of a loaded model's weights, makes the model use it, and publishes it."""
    weights = ImageWeights(model, _memory(), is_own=is_own)
    _give(model, weights)
    source.hand_on(weights)


def _memory() -> GpuMemory:
    return GpuMemory(torch.cuda.current_device())


def _give(model: nn.Module, weights: ImageWeights) -> None:
    setattr(model, ATTRIBUTE, weights)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the former memory of the weights


class Extension:
    """Mixin for vLLM's worker, which has `model_runner`, `lora_config`, `rank`, `device`, `sleep` and `wake_up`."""

    model_runner: Any
    lora_config: Any
    rank: int
    device: torch.device
    sleep: Any
    wake_up: Any
    _asleep: tuple[str, ...] = ()  # what vLLM has released
    _emptied: list[tuple[torch.UntypedStorage, int]]

    def flashd_take(self) -> int:
        """Takes weights from the engine's process, and returns their size in bytes.

        After an error, no request may be answered before another call has succeeded.
        """
        given = rank_server.ask(Path(rank_server.SOCKET), self.rank)
        try:
            weights = self._image_weights()
            if weights is None:
                return self._load_in_place(given)
            torch.cuda.synchronize()
            if given.message.is_image:
                weights.check(given.message.layout)
                weights.show(given.fds[0])
                self._rise(_BUFFERS, _CACHE)
                weights.restore_buffers()
            else:
                self._renew(weights, given, _BUFFERS, _CACHE)
            return weights.header.data_bytes
        finally:
            close_all(given.fds)

    def flashd_make_image(self) -> int:
        """Makes an image of weights from the engine's process while parked, and returns its size in bytes.

        The KV cache stays released. After an error, no other weights may be taken.
        """
        given = rank_server.ask(Path(rank_server.SOCKET), self.rank)
        try:
            weights = self._image_weights()
            if weights is None or given.message.is_image:
                raise Unsupported("only an engine with an image makes one of other weights")
            self._renew(weights, given, _BUFFERS)
            torch.cuda.synchronize()
            weights.hide()
            return weights.header.data_bytes
        finally:
            close_all(given.fds)

    def flashd_park(self) -> int:
        """Frees the memory of weights and, on a CPU, KV cache, and returns its size in bytes.

        Raises Unsupported, without any change, if weights or adapters are in vLLM's own GPU memory, or weights were
        written to, because they could not be brought back.
        """
        if self.device.type == "cpu":
            return self._empty()
        if self.lora_config is not None:
            raise Unsupported("adapters applied by vLLM cannot leave the GPU and come back")
        weights = self._image_weights()
        if weights is None:
            raise Unsupported("weights that are not an image cannot leave the GPU and come back")
        torch.cuda.synchronize()
        weights.check_unwritten()
        self.sleep(_SLEEP_LEVEL)
        self._asleep = (_BUFFERS, _CACHE)
        weights.hide()
        return weights.header.data_bytes

    def _image_weights(self) -> ImageWeights | None:
        found: ImageWeights | None = getattr(self.model_runner.get_model(), ATTRIBUTE, None)
        return found

    def _renew(self, weights: ImageWeights, given: Parcel[RankShare], *needed: str) -> None:
        """Loads a checkpoint into new memory, which becomes an image, and passes that on."""
        weights.renew()
        self._rise(*needed)
        self._reload(given)
        weights.finish()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # buffers in which layers were assembled
        hand_on(weights, Path(rank_server.SOCKET), self.rank)

    def _rise(self, *needed: str) -> None:
        """Allocates again what vLLM has released: its buffers with their values, and the KV cache, empty."""
        missing = [each for each in needed if each in self._asleep]
        if missing:
            self.wake_up(None if len(missing) == len(self._asleep) > 1 else missing)
            self._asleep = tuple(each for each in self._asleep if each not in missing)

    def _reload(self, given: Parcel[RankShare]) -> int:
        tensors = arena_tensors(given)
        with completeness.watched(self.model_runner.get_model(), self.model_runner.model_config):
            self.model_runner.reload_weights(weights_iterator=iter(tensors.items()))
        return sum(tensor.nbytes for tensor in tensors.values())

    def _load_in_place(self, given: Parcel[RankShare]) -> int:
        """Loads weights into vLLM's own memory."""
        for storage, size_bytes in getattr(self, "_emptied", ()):
            storage.resize_(size_bytes)
        self._emptied = []
        packed = list(self._unpack())
        loaded_bytes = self._reload(given)
        for module in packed:
            if module.cpu_linear is None:
                # Tied to another module's weight, so nothing was loaded into it, and vLLM did not process it.
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
        """Drops the packed copies of weights for CPU kernels, and yields their modules.

        Experts are packed when their kernel is made, which vLLM does only once: after a reload, the old kernel would
        read new weights that are not packed. Without a kernel, vLLM makes another one.
        """
        for module in self.model_runner.get_model().modules() if self.device.type == "cpu" else ():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None
            # Not hasattr, because a layer with adapters has the attributes of the layer that it wraps, and would be
            # packed as well (vllm.lora.layers.BaseLayerWithLoRA).
            if "cpu_linear" in vars(module):
                module.cpu_linear = None
                yield module

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """Yields the storages of parameters and KV cache, whose memory is freed while tensors keep their shapes.

        Buffers are kept, because some are computed once and are in no checkpoint (rotary tables).
        """
        for parameter in self.model_runner.get_model().parameters():
            yield parameter.data.untyped_storage()
        for cache in _tensors(self.model_runner.kv_caches):
            yield cache.untyped_storage()


def _tensors(nested: object) -> Iterator[torch.Tensor]:
    """Yields all tensors. vLLM has one for each layer, or several (state-space models)."""
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, list | tuple):
        for part in nested:
            yield from _tensors(part)
