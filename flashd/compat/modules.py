# SPDX-License-Identifier: Apache-2.0
"""How does a model of the daemon's become a transformers model in this process?

Of whichever class its config.json names, if that is one of transformers' own: language and vision-language models,
Whisper, encoders. The weights are the daemon's pages, mapped privately: nothing is read and nothing copied until
somebody writes to a parameter, and then only that page. On a GPU they are copied there.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashd import tensors
from flashd.client import Client
from flashd.errors import InvalidArgument, TransferFailed, Unavailable, Unsupported

_HINT = "a newer transformers may have it; code that comes with a model is never run"


def load(client: Client, model: str, folder: Path, *, dtype: str | None, device_map: object) -> Any:
    """The transformers model, in evaluation mode. `folder` has its configuration, and need not have weights.

    `dtype` is torch's name of one, by default what is stored; another costs a copy. `device_map` is a device for all of
    it, by default the first accelerator if there is one. Raises Unavailable if torch or transformers is not installed,
    Unsupported for a class that transformers does not have.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed here", hint="pip install 'flashd[torch]'") from None
    device = _device(device_map)
    cls = _class_of(folder)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with client.lease(model) as lease:
        weights = tensors.torch_tensors(tensors.private_bytes_tensor(lease.fd, lease.size_bytes), lease.layout)
    stored = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    wanted = _dtype(dtype) or (stored.pop() if len(stored) == 1 else getattr(config, "dtype", None) or torch.float32)
    module = cls.from_pretrained(None, config=config, state_dict=weights, dtype=wanted)
    if (folder / "generation_config.json").is_file() and module.can_generate():
        module.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return module.to(device).eval()


def release_unused() -> None:
    """Gives back the GPU memory that this process's torch keeps and nothing uses, if it has imported torch."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _class_of(folder: Path) -> Any:
    import transformers

    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        hint = "the daemon's store is to be readable for you; flash show MODEL says what it was made of"
        raise TransferFailed(f"{folder / 'config.json'} cannot be read: {error}", hint=hint) from None
    names = config.get("architectures") if isinstance(config, dict) else None
    name = names[0] if isinstance(names, list) and names else ""
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise Unsupported(f"transformers {transformers.__version__} has no architecture {name!r}", hint=_HINT)
    return cls


def _dtype(name: str | None) -> Any:
    import torch

    if name is None or name == "auto":
        return None
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise InvalidArgument(f"{name!r} is no dtype of torch", hint="for example bfloat16")
    return found


def _device(device_map: object) -> Any:
    import torch

    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise Unsupported("a model goes to one device here", hint='use device_map={"": 0}, or accelerate')
        device_map = device_map[""]
    if device_map is None or device_map == "auto" or isinstance(device_map, int):
        if not torch.accelerator.is_available():
            return torch.device("cpu")
        device_map = device_map if isinstance(device_map, int) else 0
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"{device_map!r} is no device: {error}", hint="use 0, cuda:0 or cpu") from None
