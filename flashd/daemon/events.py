# SPDX-License-Identifier: Apache-2.0
"""Events of the daemon, by which its parts inform each other without depending on each other."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, ParamSpec

if TYPE_CHECKING:
    from flashd.checkpoint.files import Checkpoint
    from flashd.daemon.job import Job
    from flashd.memory.arena import Arena
    from flashd.memory.device_cache import DeviceCache
    from flashd.memory.lease import Lease
    from flashd.store.catalog import Model
    from flashd.swap.weights import Target

P = ParamSpec("P")


class Event(Generic[P]):
    """An event. Calling it calls all subscribers, in the order of their subscriptions."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[P, object]] = []

    def subscribe(self, subscriber: Callable[P, object]) -> None:
        self._subscribers.append(subscriber)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        for subscriber in self._subscribers:
            subscriber(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Events:
    """All events, on one event loop."""

    peer_left: Event[[str]] = field(default_factory=Event)
    """A connection left the bus; its unique name."""

    job_changed: Event[[Job]] = field(default_factory=Event)
    """A job is new, made progress or ended."""
    job_ended: Event[[Job]] = field(default_factory=Event)
    """A job ended, after its last change was announced."""
    job_forgotten: Event[[Job]] = field(default_factory=Event)

    inbox_changed: Event[[bool]] = field(default_factory=Event)
    """The list of inbox items changed; whether it has any."""
    source_removed: Event[[str]] = field(default_factory=Event)
    """The source of a model was removed from the inbox; the name of the model."""

    model_published: Event[[Model]] = field(default_factory=Event)
    """A model is new, or has a new version."""
    model_changed: Event[[str]] = field(default_factory=Event)
    """Properties of a model changed: it was used, pinned or renamed."""
    audience_changed: Event[[str]] = field(default_factory=Event)
    """A model became private or public."""
    model_removed: Event[[Model]] = field(default_factory=Event)
    model_asked: Event[[str]] = field(default_factory=Event)
    """A swap to a model was requested."""

    checkpoint_changed: Event[[str]] = field(default_factory=Event)
    """A checkpoint or image was loaded or evicted, or its holds changed; its id."""
    host_resident: Event[[Arena]] = field(default_factory=Event)
    """An arena of the host's memory is filled and sealed."""
    image_made: Event[[Checkpoint, DeviceCache]] = field(default_factory=Event)
    """An image exists on a device only."""
    lease_began: Event[[Lease]] = field(default_factory=Event)
    lease_ended: Event[[Lease]] = field(default_factory=Event)
    device_changed: Event[[str]] = field(default_factory=Event)
    """The memory use of other programs on a device changed; its name."""

    engines_changed: Event[[]] = field(default_factory=Event)
    """Engines were added, removed or rebound, or a swap entered its next state."""
    engine_changed: Event[[int]] = field(default_factory=Event)
    """What an engine does or takes changed; its number."""
    engine_lost: Event[[Target, bool]] = field(default_factory=Event)
    """An engine that served ended unasked: its model, and whether that was the active one."""
    engine_idle: Event[[Target]] = field(default_factory=Event)
    """A model that serves was asked nothing for as long as its idle timeout."""
    rest_began: Event[[Target]] = field(default_factory=Event)
    """The active model is to be parked until a request wakes it. Announced before its engine stops answering."""
    rest_ended: Event[[]] = field(default_factory=Event)
    """Requests can no longer wake the resting model."""
    connection_passed_on: Event[[socket.socket, bytes, int | None]] = field(default_factory=Event)
    """A connection of a client came to an engine that no longer serves; with the bytes read of its request, and the
    number of the engine, or None if it is known to have come for the active model."""

    settings_changed: Event[[]] = field(default_factory=Event)
    """A setting was changed that takes effect at once."""
    problems_changed: Event[[]] = field(default_factory=Event)
    manager_changed: Event[[]] = field(default_factory=Event)
    default_engine_changed: Event[[]] = field(default_factory=Event)
    """Another property of the manager changed, such as the state of the daemon."""
