# SPDX-License-Identifier: Apache-2.0
"""The weights of a model for the loader: leased from a running flashd, or from the process of its engine.

In both cases they are tensors over a mapped arena, and no file is read. The mapping is private: a model that modifies
its tensors while loading (some permute or scale in place) changes only its own copy of a page, as with vLLM's own
loader, and never the arena.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from flashd.checkpoint import header
from flashd.client.client import Client, connect
from flashd.client.results import Model
from flashd.engines.control import Parcel
from flashd.engines.messages import RankShare
from flashd.errors import InvalidArgument, NotFound
from flashd.tasks import close_all
from flashd.tensors import private_bytes_tensor, torch_tensors
from flashd.workers.vllm import rank_server

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The options of `--model-loader-extra-config`: the name of the model in flashd, the address of the daemon, and the
    device for the lease. `handover` is the socket of the engine that runs this loader, if any.
    """

    model: str = ""
    bus: str = ""
    device: str = "host"
    handover: str = ""

    @classmethod
    def parse(cls, options: object) -> Wanted:
        """Parses the options. Raises InvalidArgument for other values."""
        known = cls.__dataclass_fields__
        hint = f"choose from: {', '.join(name for name in known if name != 'handover')}"
        if not isinstance(options, dict) or not all(isinstance(value, str) for value in options.values()):
            raise InvalidArgument("model_loader_extra_config must be a JSON object of texts", hint=hint)
        if unknown := sorted(set(options) - set(known)):
            raise InvalidArgument(f"model_loader_extra_config has the unknown key {unknown[0]!r}", hint=hint)
        return cls(**options)


@contextlib.contextmanager
def weights(wanted: Wanted, model: str) -> Iterator[Tensors]:
    """Yields all tensors of a model by name, tied ones under all their names. `model` is vLLM's argument.

    Their memory is unmapped when the context has ended and no references are left. Raises NotFound if flashd does not
    have the model, or Unavailable if no daemon is running.
    """
    if wanted.handover:
        yield handed_over(Path(wanted.handover))
        return
    with connect(wanted.bus or None) as client:
        name = wanted.model or name_of(client, model)
        with client.lease(name, wanted.device) as lease:
            if lease.memory == "host" and lease.device == "host":
                yield torch_tensors(private_bytes_tensor(lease.fd, lease.size_bytes), lease.layout)
            else:
                yield lease.tensors()


def handed_over(path: Path) -> Tensors:
    """Returns tensors over the engine's current weights (flashd/workers/vllm/rank_server.py)."""
    given = rank_server.ask(path, rank=0)  # all ranks read one checkpoint, and each takes its part
    try:
        return arena_tensors(given)
    finally:
        close_all(given.fds)


def arena_tensors(given: Parcel[RankShare]) -> Tensors:
    """Returns tensors over a rank's host arena. The caller closes the descriptor."""
    size_bytes = given.message.arena_bytes
    layout = header.parse(given.message.layout.encode(), data_bytes=size_bytes, path="the layout")
    return torch_tensors(private_bytes_tensor(given.fds[0], size_bytes), layout)


def name_of(client: Client, model: str) -> str:
    """Returns flashd's name for vLLM's argument: a name or alias in flashd, or the folder of a model's source."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return client.model(model).name
    found: list[Model] = [
        ours for ours in client.models() if ours.source and Path(ours.source).resolve() == folder.resolve()
    ]
    if not found:
        hint = f"flash import {model}, or --model-loader-extra-config '{{\"model\": NAME}}' if its name is another"
        raise NotFound(f"flashd has no model made from {folder}", hint=hint)
    return found[0].name
