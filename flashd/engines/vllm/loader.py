# SPDX-License-Identifier: Apache-2.0
"""How do weights get from an arena into vLLM's model? By the model's own `load_weights`, as with vLLM's own loader.

    vllm serve MODEL --load-format flash

where MODEL is a folder that flashd made a model from, or a name that both flashd and the hub know.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from flashd.engines.vllm import extension, quantised, sources, versions
from flashd.engines.vllm.weights import Wanted, weights
from flashd.errors import CorruptCheckpoint, Unsupported

_OF_TARGET = ("embed_tokens", "lm_head", "shared_head")  # which a draft model has of the model it guesses for
_SOURCE = "flashd_source"  # of a model: where its image came from, alive as long as it is
log = logging.getLogger("vllm.flashd")  # below vllm's own, so that it is shown where vLLM's words are


class FlashLoader(BaseModelLoader):  # type: ignore[misc]
    """Registered for `--load-format flash`."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self._is_image = False
        self._wanted = Wanted.parse(load_config.model_loader_extra_config)

    def download_model(self, model_config: Any) -> None:
        """Nothing to do: flashd has it, or there is no such model."""

    def get_external_weight_memory(self, vllm_config: Any) -> int:
        """Asked by vLLM 0.32 and newer before it sizes the KV cache: what of its share of the GPU is taken already, by
        weights that other servers have made. Older ones measure what they take themselves, which is nothing then."""
        found = None if self._wanted.handover else sources.shared(self._wanted, vllm_config)
        if found is None:
            return 0
        try:
            return found.size_bytes
        finally:
            found.close()

    def load_model(self, vllm_config: Any, model_config: Any, *arguments: Any, **options: Any) -> nn.Module:
        """As vLLM's, but that on a GPU the weights are an image in the end: one that was made before, in which case
        nothing is loaded, or one that is made of what was loaded, to be handed on. A draft model, which guesses ahead
        (speculative decoding), comes from where it is, or, if it is a part of this one, out of the same weights."""
        if versions.is_draft(model_config):
            is_part = versions.is_part_of_target(model_config, vllm_config)
            load = super().load_model if is_part else versions.own_loader(self.load_config).load_model
            return load(vllm_config, model_config, *arguments, **options)
        source = sources.source(self._wanted, vllm_config)
        if source is not None:
            versions.keep_untied(model_config)
        has_image = source is not None and bool(source.layout)
        # Of a server's ranks each has asked by itself. A part of an image is of use only with all others.
        self._is_image = versions.all_agree(has_image)
        is_wanted = source is not None and (source.wants_image or has_image) and not self._is_image
        before = quantised.storages(torch.device("cuda", torch.cuda.current_device())) if is_wanted else None
        try:
            model: nn.Module = super().load_model(vllm_config, model_config, *arguments, **options)
            why = _hindrance(model, vllm_config, before) if source is not None and not self._is_image else ""
            makes_one = not self._is_image and versions.all_agree(is_wanted and not why)
            if source is None:
                pass
            elif self._is_image:
                extension.view(model, source)
            elif makes_one:
                extension.make(model, source)
            elif versions.is_cuda():
                others = "another rank makes none" if is_wanted else "pipeline and data parallel ranks make none"
                log.warning("no image is made of these weights, so they stay where they are: %s", why or others)
            setattr(model, _SOURCE, source)
            return model
        finally:
            if source is not None:
                source.loaded()

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Raises CorruptCheckpoint if a parameter is left without its weights."""
        if self._is_image:
            return
        started = time.perf_counter()
        named = {name for name, _ in model.named_parameters()}
        if versions.is_draft(model_config):
            named -= {name for name in named if any(shared in name for shared in _OF_TARGET)}
        loaded = model.load_weights(self.get_all_weights(model_config, model))
        if loaded is not None and model_config.quantization is None and (missing := sorted(named - loaded)):
            raise CorruptCheckpoint(f"{model_config.model} has no weights for {', '.join(missing[:5])}")
        log.info("weights came from flashd's arena in %.2f s", time.perf_counter() - started)

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Also what vLLM's `reload_weights` asks; the arena is let go of when the iterator has ended."""
        if getattr(model, "secondary_weights", ()):
            hint = "serve it with vLLM's own loader: --load-format auto"
            raise Unsupported(f"{model_config.model} takes weights from several repositories", hint=hint)
        is_unused: Callable[[str], bool] = getattr(model, "is_unused_checkpoint_weight", None) or (lambda name: False)
        with weights(self._wanted, model_config.model) as tensors:
            yield from ((name, tensor) for name, tensor in tensors.items() if not is_unused(name))


def _hindrance(model: nn.Module, config: Any, before: Collection[int] | None) -> str:
    """Why no image can be made of it; empty if one can."""
    if versions.has_draft(config):
        return "a draft model guesses ahead, whose weights are in none"
    if versions.moves_experts(config):
        return "experts move from rank to rank while it serves, and an image is not written to"
    return quantised.hindrance(model, before)
