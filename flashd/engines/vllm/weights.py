# SPDX-License-Identifier: Apache-2.0
"""Where does the loader get a model's weights? From a running flashd by lease, or handed over by the engine it is in.

Either way they are tensors over a mapped arena, and no file is read. They are mapped privately: a model that changes
what it is given while it loads (some permute or scale in place) changes its own copy of that page, as it would with
vLLM's own loader, and never the arena.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import flashd
from flashd.checkpoint import header
from flashd.client import Client, Model
from flashd.engines.control import close_all
from flashd.engines.vllm import handover
from flashd.errors import InvalidArgument, NotFound
from flashd.tensors import private_bytes_tensor, torch_tensors

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `--model-loader-extra-config` may say: which of flashd's models, where its daemon is, and on which of
    its devices the lease is to be. `handover` is the socket of the engine that runs this loader, if one does."""

    model: str = ""
    bus: str = ""
    device: str = "host"
    handover: str = ""

    @classmethod
    def parse(cls, options: object) -> Wanted:
        """Raises InvalidArgument for anything else."""
        known = cls.__dataclass_fields__
        hint = f"it may have {', '.join(name for name in known if name != 'handover')}"
        if not isinstance(options, dict) or not all(isinstance(value, str) for value in options.values()):
            raise InvalidArgument("model_loader_extra_config is to be a JSON object of texts", hint=hint)
        if unknown := sorted(set(options) - set(known)):
            raise InvalidArgument(f"model_loader_extra_config has {unknown[0]!r}, which means nothing here", hint=hint)
        return cls(**options)


@contextlib.contextmanager
def weights(wanted: Wanted, model: str) -> Iterator[Tensors]:
    """All tensors of a model by name, tied ones under all their names. `model` is what vLLM was asked to serve.

    They are gone from memory when the context has ended and nothing refers to them. Raises NotFound if flashd has no
    such model, Unavailable if there is no flashd.
    """
    if wanted.handover:
        yield handed_over(Path(wanted.handover))
        return
    with flashd.connect(wanted.bus or None) as client:
        name = wanted.model or name_of(client, model)
        with client.lease(name, wanted.device) as lease:
            if lease.memory == "host" and lease.device == "host":
                yield torch_tensors(private_bytes_tensor(lease.fd, lease.size_bytes), lease.layout)
            else:
                yield lease.tensors()


def handed_over(path: Path) -> Tensors:
    """What the engine around us was last told to hold (flashd/engines/vllm/handover.py)."""
    frame = handover.ask(path, rank=0)  # all ranks read one checkpoint, each what it needs of it
    try:
        return arena_tensors(frame.fds[0], frame.content)
    finally:
        close_all(frame.fds)


def arena_tensors(fd: int, binding: Mapping[str, Any]) -> Tensors:
    """Tensors over the host arena that a Binding came with; `fd` stays the caller's."""
    size_bytes = int(binding["arena_bytes"])
    layout = header.parse(binding["layout"].encode(), data_bytes=size_bytes, path="the layout")
    return torch_tensors(private_bytes_tensor(fd, size_bytes), layout)


def name_of(client: Client, model: str) -> str:
    """flashd's name for what vLLM calls a model: a name or alias of ours, or the folder that one was made from."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return client.model(model).name
    found: list[Model] = [
        ours for ours in client.models() if ours.source and Path(ours.source).resolve() == folder.resolve()
    ]
    if not found:
        hint = (
            f"flash import {model}, or --model-loader-extra-config '{{\"model\": NAME}}' if it is known by another name"
        )
        raise NotFound(f"no model of flashd was made from {folder}", hint=hint)
    return found[0].name
