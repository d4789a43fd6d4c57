# SPDX-License-Identifier: Apache-2.0
"""Loads weights from an arena into vLLM's model with the model's own `load_weights`, like vLLM's own loader.

    vllm serve MODEL --load-format flash

where MODEL is the folder of a model's source, or a name known to both flashd and the hub.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from flashd.errors import Unsupported
from flashd.workers.vllm import compat, completeness, extension, quantised, room, sources
from flashd.workers.vllm.sources import Source
from flashd.workers.vllm.weights import Wanted, weights

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

_OF_TARGET = ("embed_tokens", "lm_head", "shared_head")  # shared by a draft model and its target
_SOURCE = "flashd_source"  # attribute of a model: the source of its image, which must live as long
log = logging.getLogger("vllm.flashd")  # below vllm's own logger, so that its messages appear with vLLM's


class FlashLoader(BaseModelLoader):  # type: ignore[misc]
    """The loader for `--load-format flash`."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self._is_image = False
        self._wanted = Wanted.parse(load_config.model_loader_extra_config)

    def download_model(self, model_config: ModelConfig) -> None:
        """Does nothing, because the model is in flashd."""

    def get_external_weight_memory(self, vllm_config: VllmConfig) -> int:
        """Returns the part of vLLM's share of the GPU that is taken by another server's image of the weights.

        Called by vLLM 0.32 and newer before it sizes the KV cache. Older versions measure only their own memory, which
        does not include the image.
        """
        if self._wanted.handover:
            return 0
        found = sources.shared(self._wanted, vllm_config)
        held_bytes = found.size_bytes if found else 0
        if found is not None:
            found.close()
        if compat.is_cuda():
            room.fit(vllm_config.cache_config, *torch.cuda.mem_get_info(), held_bytes=held_bytes)
        return held_bytes

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, *arguments: object, **options: object
    ) -> nn.Module:
        """Loads like vLLM's own loader, but on a GPU the result is an image.

        An existing image is mapped without loading; otherwise the loaded weights become an image, which is published. A
        draft model for speculative decoding is loaded from its own folder, or, if it is a part of this checkpoint, from
        the same weights.
        """
        compat.keep_adapters_apart(vllm_config)
        if compat.is_draft(model_config):
            is_part = compat.is_part_of_target(model_config, vllm_config)
            load = super().load_model if is_part else compat.own_loader(self.load_config).load_model
            return load(vllm_config, model_config, *arguments, **options)
        source = sources.source(self._wanted, vllm_config)
        if source is not None:
            compat.keep_untied(model_config)
        has_image = source is not None and bool(source.layout)
        # Each rank of a server has looked for its own part. An image can be used only if all parts exist.
        self._is_image = compat.all_agree(has_image)
        is_wanted = source is not None and (source.wants_image or has_image) and not self._is_image
        before = quantised.storages(torch.device("cuda", torch.cuda.current_device())) if is_wanted else None
        try:
            model: nn.Module = super().load_model(vllm_config, model_config, *arguments, **options)
            is_own = is_wanted and bool(quantised.why_own(model))
            why = _hindrance(model, vllm_config, before, source, is_own=is_own) if source and not self._is_image else ""
            makes_one = not self._is_image and compat.all_agree(is_wanted and not why)
            if source is None:
                pass
            elif self._is_image:
                extension.view(model, source)
            elif makes_one:
                extension.make(model, source, is_own=is_own)
            elif compat.is_cuda():
                others = (
                    "another rank makes no image"
                    if is_wanted
                    else "the GPU has no room for it and the weights at once, or ranks are pipeline or data parallel"
                )
                log.warning("no image is made of these weights: %s", why or others)
            setattr(model, _SOURCE, source)
            return model
        finally:
            if source is not None:
                source.loaded()

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Loads weights. Raises CorruptCheckpoint if weights of a parameter, or of a part of one, are missing."""
        if self._is_image:
            return
        started = time.perf_counter()
        may_lack = _OF_TARGET if compat.is_draft(model_config) else ()
        completeness.load(model, model_config, self.get_all_weights(model_config, model), may_lack)
        log.info("weights came from flashd's arena in %.2f s", time.perf_counter() - started)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields all weights, also for vLLM's `reload_weights`. The arena is released at the end of the iterator."""
        if getattr(model, "secondary_weights", ()):
            hint = "serve it with vLLM's own loader: --load-format auto"
            raise Unsupported(f"{model_config.model} takes weights from several repositories", hint=hint)
        is_unused: Callable[[str], bool] = getattr(model, "is_unused_checkpoint_weight", None) or (lambda name: False)
        with weights(self._wanted, model_config.model) as tensors:
            yield from ((name, tensor) for name, tensor in tensors.items() if not is_unused(name))


def _hindrance(
    model: nn.Module, config: VllmConfig, before: Collection[int] | None, source: Source, *, is_own: bool
) -> str:
    """Explains why no image can be made of a model; empty if one can."""
    if compat.has_draft(config):
        return "images cannot contain the weights of its draft model"
    if compat.moves_experts(config):
        return "experts move between ranks while it serves, but images are read-only"
    if is_own and not source.takes_own:
        return quantised.why_own(model)
    return quantised.hindrance(model, before, with_kernels=is_own)
