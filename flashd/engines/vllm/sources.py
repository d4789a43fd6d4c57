# SPDX-License-Identifier: Apache-2.0
"""Where does a rank of vLLM's find the image of its weights, if there is one, and who gets the one that it makes?

In an engine of flashd's the daemon has decided both, and the engine's process hands them over. A server that a user
started asks the daemon whether one of theirs with the same settings has published an image, and publishes its own: so
they share one copy of the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, Protocol

import torch

import flashd
from flashd import cuda
from flashd.checkpoint import header as headers
from flashd.client import Client, Lease
from flashd.engines.control import close_all
from flashd.engines.vllm import IMAGE_FORMAT, handover, versions
from flashd.engines.vllm.images import ImageWeights
from flashd.engines.vllm.weights import Wanted, name_of
from flashd.errors import AlreadyExists, FlashdError

log = logging.getLogger("vllm.flashd")


class Source(Protocol):
    """`layout` is that of the image behind `fd`; empty if there is none. It stays alive with the model."""

    fd: int
    layout: str
    wants_image: bool

    def hand_on(self, weights: ImageWeights) -> None:
        """What was made is for others too."""

    def loaded(self) -> None:
        """The model is complete: what only loading needed is let go of."""


class OfEngine:
    """Of the engine that this rank belongs to."""

    def __init__(self, socket: Path, rank: int) -> None:
        self._rank = rank
        self._socket = socket
        self._frame = handover.ask(socket, rank)
        self.fd = self._frame.fds[0]
        self.layout: str = self._frame.content["layout"] if self._frame.content["is_image"] else ""
        self.wants_image: bool = self._frame.content["wants_image"]

    def hand_on(self, weights: ImageWeights) -> None:
        hand_on(weights, self._socket, self._rank)

    def loaded(self) -> None:
        close_all(self._frame.fds)


class OfUser:
    """Of the other servers that this user has started. Nothing that fails here keeps a server from starting."""

    def __init__(self, client: Client, name: str, build: str, device: str) -> None:
        self._client = client  # leases end with it
        self._name = name
        self._build = build
        self._device = device
        self._lease = self._found()
        self.fd = self._lease.fd if self._lease else -1
        self.layout = headers.as_json(self._lease.layout) if self._lease else ""
        self.wants_image = self._lease is None

    @property
    def size_bytes(self) -> int:
        """Of the image that there is."""
        return self._lease.mapped_bytes if self._lease else 0

    def hand_on(self, weights: ImageWeights) -> None:
        fd = weights.take_made()
        assert fd is not None
        try:
            layout, size_bytes = weights.layout_json, weights.header.data_bytes
            self._client.publish_image(self._name, self._build, self._device, fd, layout, size_bytes)
            log.info("the weights of %s are shared from here on: %d bytes", self._name, size_bytes)
        except AlreadyExists:  # another server was quicker
            if lease := self._found():
                self._lease = lease
                weights.check(headers.as_json(lease.layout))
                torch.cuda.synchronize()
                weights.show(lease.fd)
                weights.restore_buffers()
        except FlashdError as error:
            log.warning("the weights of %s are not shared: %s", self._name, error)
        finally:
            os.close(fd)

    def loaded(self) -> None:
        pass

    def close(self) -> None:
        self._client.close()

    def _found(self) -> Lease | None:
        with contextlib.suppress(FlashdError):
            return self._client.lease_image(self._name, self._build, self._device)
        return None


def hand_on(weights: ImageWeights, socket: Path, rank: int) -> None:
    """To the engine's process, which tells the daemon."""
    fd = weights.take_made()
    if fd is not None:
        content = {"size_bytes": weights.header.data_bytes, "layout": weights.layout_json}
        handover.tell_made(socket, rank, content, fd)
        os.close(fd)


def source(wanted: Wanted, config: Any) -> Source | None:
    """None where the weights are to be vLLM's own."""
    if wanted.handover:
        return OfEngine(Path(wanted.handover), config.parallel_config.rank)
    return shared(wanted, config)


def shared(wanted: Wanted, config: Any) -> OfUser | None:
    """None where nothing can be shared: not on a GPU that the daemon has, or not if weights are written to."""
    if not versions.is_cuda() or versions.writes_weights(config):
        return None
    with contextlib.suppress(FlashdError), contextlib.ExitStack() as on_error:  # whoever loads the model hears of it
        client = flashd.connect(wanted.bus or None)
        on_error.callback(client.close)
        name = wanted.model or name_of(client, config.model_config.model)
        uuids = {gpu.uuid for gpu in cuda.gpus() if gpu.ordinal == torch.cuda.current_device()}
        device = next((found.name for found in client.devices() if found.uuid in uuids and found.kind == "cuda"), "")
        if device:
            parts = {
                **versions.weights_depend_on(config),
                "checkpoint": client.model(name).checkpoint,
                "format": IMAGE_FORMAT,
            }
            build = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
            found = OfUser(client, name, build, device)
            on_error.pop_all()
            return found
    return None
