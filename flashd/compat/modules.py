# SPDX-License-Identifier: Apache-2.0
"""Makes a transformers model in this process from a model in the daemon.

The class is the one in config.json, if it is transformers' own: language and vision-language models, Whisper, encoders.
The weights are the daemon's pages, mapped privately: nothing is read or copied, except pages of parameters that are
written to. For a GPU, they are copied there.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashd import tensors
from flashd.client.client import Client
from flashd.errors import InvalidArgument, TransferFailed, Unavailable, Unsupported

_HINT = "a newer transformers may support it; code that comes with a model is never run"


def load(client: Client, model: str, folder: Path, *, dtype: str | None, device_map: object) -> Any:
    """Returns the transformers model in evaluation mode. `folder` has its configuration, and need not have weights.

    `dtype` is torch's name of a dtype, by default the stored one; another one costs a copy. `device_map` is one device
    for the whole model, by default the first accelerator, if any. Raises Unavailable if torch or transformers is not
    installed, or Unsupported for a class that transformers lacks.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Unavailable(
            f"{error.name} is not installed in this environment", hint="pip install 'flashd[torch]'"
        ) from None
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
    """Frees unused GPU memory in torch's cache, if this process has imported torch."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _class_of(folder: Path) -> Any:
    import transformers

    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        hint = "you need permission to read the daemon's store; flash show MODEL shows the model's source"
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
        raise InvalidArgument(f"{name!r} is not a dtype of torch", hint="for example bfloat16")
    return found


def _device(device_map: object) -> Any:
    import torch

    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise Unsupported("a model can only be put on one device", hint='use device_map={"": 0}, or accelerate')
        device_map = device_map[""]
    if device_map is None or device_map == "auto" or isinstance(device_map, int):
        if not torch.accelerator.is_available():
            return torch.device("cpu")
        device_map = device_map if isinstance(device_map, int) else 0
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"{device_map!r} is not a device: {error}", hint="use 0, cuda:0 or cpu") from None
