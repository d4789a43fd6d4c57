# SPDX-License-Identifier: Apache-2.0
"""Sources of images for a rank of vLLM, which also receive the images that it makes.

In flashd's own engines, the daemon decides, and the engine's process passes images on. A server started by a user asks
the daemon for an image published by another server of the same user with the same settings, and publishes its own, so
that these servers share one copy of the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from flashd.checkpoint import header as headers
from flashd.client.client import Client, Lease, connect
from flashd.engines.control import VLLM_IMAGE_FORMAT
from flashd.engines.messages import RankImage
from flashd.errors import AlreadyExists, FlashdError
from flashd.io import cuda
from flashd.tasks import close_all
from flashd.workers.vllm import compat, rank_server
from flashd.workers.vllm.images import ImageWeights
from flashd.workers.vllm.weights import Wanted, name_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

log = logging.getLogger("vllm.flashd")


class Source(Protocol):
    """A source of an image. `layout` is that of the image behind `fd`; empty if there is none. Lives as long as the
    model. `takes_own`: images that no other process can map are of use, too.
    """

    fd: int
    layout: str
    wants_image: bool
    takes_own: bool

    def hand_on(self, weights: ImageWeights) -> None:
        """Publishes the image that was made."""

    def loaded(self) -> None:
        """Releases resources that only loading needed."""


class OfEngine:
    """The source for a rank of one of flashd's engines."""

    takes_own = True

    def __init__(self, socket: Path, rank: int) -> None:
        self._rank = rank
        self._socket = socket
        given = rank_server.ask(socket, rank)
        self._fds = given.fds
        self.fd = given.fds[0]
        self.layout = given.message.layout if given.message.is_image else ""
        self.wants_image = given.message.wants_image

    def hand_on(self, weights: ImageWeights) -> None:
        hand_on(weights, self._socket, self._rank)

    def loaded(self) -> None:
        close_all(self._fds)


class OfUser:
    """The source for servers started by a user. Failures here never keep a server from starting."""

    takes_own = False

    def __init__(self, client: Client, name: str, build: str, device: str) -> None:
        self._client = client  # leases end with this client
        self._name = name
        self._build = build
        self._device = device
        self._lease = self._found()
        self.fd = self._lease.fd if self._lease else -1
        self.layout = headers.as_json(self._lease.layout) if self._lease else ""
        self.wants_image = self._lease is None

    @property
    def size_bytes(self) -> int:
        """Size of the existing image."""
        return self._lease.mapped_bytes if self._lease else 0

    def hand_on(self, weights: ImageWeights) -> None:
        fd = weights.take_made()
        assert fd is not None
        try:
            layout, size_bytes = weights.layout_json, weights.header.data_bytes
            self._client.publish_image(self._name, self._build, self._device, fd, layout, size_bytes)
            log.info("the weights of %s are shared from now on: %d bytes", self._name, size_bytes)
        except AlreadyExists:  # another server was faster
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
    """Passes an image to the engine's process, which passes it to the daemon."""
    fd = weights.take_made()
    if fd is not None:
        image = RankImage(weights.header.data_bytes, weights.layout_json, is_own=weights.is_own)
        rank_server.tell_made(socket, rank, image, fd)
        os.close(fd)


def source(wanted: Wanted, config: VllmConfig) -> Source | None:
    """Returns the source; None if the weights shall be in vLLM's own memory."""
    if wanted.handover:
        return OfEngine(Path(wanted.handover), config.parallel_config.rank)
    return shared(wanted, config)


def shared(wanted: Wanted, config: VllmConfig) -> OfUser | None:
    """Returns a source to share; None if the daemon does not have the GPU, or the server writes to its weights."""
    if not compat.is_cuda() or compat.writes_weights(config):
        return None
    with contextlib.suppress(FlashdError), contextlib.ExitStack() as on_error:  # loading the model reports the error
        client = connect(wanted.bus or None)
        on_error.callback(client.close)
        name = wanted.model or name_of(client, config.model_config.model)
        uuids = {gpu.uuid for gpu in cuda.gpus() if gpu.ordinal == torch.cuda.current_device()}
        device = next((found.name for found in client.devices() if found.uuid in uuids and found.kind == "cuda"), "")
        if device:
            parts = {
                **compat.weights_depend_on(config),
                "checkpoint": client.model(name).checkpoint,
                "format": VLLM_IMAGE_FORMAT,
            }
            build = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
            found = OfUser(client, name, build, device)
            on_error.pop_all()
            return found
    return None
