# SPDX-License-Identifier: Apache-2.0
"""The daemon as a pull sees it, so that the hub does not depend on the client, which depends on the hub."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

from flashd.errors import FlashdError


class PullJob(Protocol):
    """The job of a pull: `flashd.client.client.Job`."""

    subject: str
    error_name: str

    @property
    def finished(self) -> bool: ...
    def refresh(self) -> None: ...
    def cancel(self) -> None: ...
    def wait(self, on_progress: Callable[[Self], None] | None = None) -> Mapping[str, Any]: ...


J = TypeVar("J", bound=PullJob)


class PulledModel(Protocol):
    """A model, and where it came from."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...


class Machine(Protocol):
    """The machine, and where its store is."""

    @property
    def store_path(self) -> str: ...


class Receiver(Protocol[J]):
    """The taker of the files: `flashd.client.client.Client`, which documents these methods."""

    def model(self, name: str) -> PulledModel: ...
    def status(self) -> Machine: ...
    def begin_pull(self, origin: str, name: str, *, aliases: Sequence[str] = (), job: J | None = None) -> J: ...
    def feed_pull(self, job: J, files: Mapping[str, int], *, awaited: Collection[str] = ()) -> None: ...
    def tell_pull(self, job: J, done_bytes: int, total_bytes: int) -> None: ...
    def fail_pull(self, job: J, error: FlashdError) -> None: ...
