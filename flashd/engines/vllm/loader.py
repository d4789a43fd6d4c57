# SPDX-License-Identifier: Apache-2.0
"""How do weights get from an arena into vLLM's model? By the model's own `load_weights`, as with vLLM's own loader.

    vllm serve MODEL --load-format flash

where MODEL is a folder that flashd made a model from, or a name that both flashd and the hub know.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from flashd.engines.control import Frame, close_all
from flashd.engines.vllm import extension, handover
from flashd.engines.vllm.weights import Wanted, weights
from flashd.errors import CorruptCheckpoint, Unsupported

log = logging.getLogger("vllm.flashd")  # below vllm's own, so that it is shown where vLLM's words are


class FlashLoader(BaseModelLoader):  # type: ignore[misc]
    """Registered for `--load-format flash`."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self._is_image = False
        self._wanted = Wanted.parse(load_config.model_loader_extra_config)

    def download_model(self, model_config: Any) -> None:
        """Nothing to do: flashd has it, or there is no such model."""

    def load_model(self, vllm_config: Any, model_config: Any, *arguments: Any, **options: Any) -> nn.Module:
        """As vLLM's, but that on a GPU the weights are an image in the end: one that was made before, in which case
        nothing is loaded, or one that is made of what was loaded, to be handed on."""
        given = self._given() if self._wanted.handover else None
        self._is_image = given is not None and given.content["is_image"]
        try:
            model: nn.Module = super().load_model(vllm_config, model_config, *arguments, **options)
            if given is not None and (self._is_image or given.content["wants_image"]):
                extension.share(model, given)
            return model
        finally:
            close_all(given.fds if given is not None else ())

    def _given(self) -> Frame:
        return handover.ask(Path(self._wanted.handover))

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Raises CorruptCheckpoint if a parameter is left without its weights."""
        if self._is_image:
            return
        started = time.perf_counter()
        named = {name for name, _ in model.named_parameters()}
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
