# SPDX-License-Identifier: Apache-2.0
"""Limits on resources that each user may hold at once, so that no user can exhaust the daemon.

There is no separate account: existing resources are counted at each check, so that they stop counting at their end, in
whatever way they end. A connection may have half of its user's limit, so that one faulty program leaves room for the
user's others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Protocol

from flashd.config.settings import LimitsConfig
from flashd.errors import LimitExceeded


class Holder(Protocol):
    """A holder of a limited resource: a user on a bus connection. The daemon itself has no connection."""

    @property
    def peer(self) -> str: ...

    @property
    def uid(self) -> int: ...


class Scarce(StrEnum):
    """Limited resources, as in [limits]. The values complete "you have 3 ..."."""

    CALLS = "calls waiting for their answer"
    JOBS = "unfinished jobs"
    LEASES = "leases"
    IMPORTS = "imports waiting for files"
    DESCRIPTORS = "open files of imports"
    MODELS = "models"


_REMEDIES = {
    Scarce.CALLS: "wait for their answers",
    Scarce.JOBS: "wait until some have ended, or cancel them: flash jobs",
    Scarce.LEASES: "release some leases",
    Scarce.IMPORTS: "send their files, or cancel them: flash jobs",
    Scarce.DESCRIPTORS: "wait until these imports are converted, or drop the source into the models folder",
    Scarce.MODELS: "remove some models: flash rm",
}


class Limits:
    """Checks limits with the current configuration."""

    def __init__(self, config: Callable[[], LimitsConfig]) -> None:
        self._config = config

    def check(self, what: Scarce, asker: Holder, held: Iterable[Holder], more: int = 1) -> None:
        """Checks that `asker` may have `more` of a resource, given all its current holders. Raises LimitExceeded."""
        theirs = [holder for holder in held if holder.uid == asker.uid]
        self.check_counts(what, asker, sum(holder.peer == asker.peer for holder in theirs), len(theirs), more)

    def check_counts(self, what: Scarce, asker: Holder, by_connection: int, by_user: int, more: int = 1) -> None:
        """Checks like `check`, with the counts of this connection and this user. Raises LimitExceeded."""
        if not asker.peer:
            return
        setting = what.name.lower()
        most = getattr(self._config(), setting)
        for whose, count, limit in (
            ("this connection has", by_connection, most if what is Scarce.MODELS else -(-most // 2)),
            (f"user {asker.uid} has", by_user, most),
        ):
            if count + more > limit:
                hint = f"{_REMEDIES[what]}; or ask an administrator to raise limits.{setting}"
                raise LimitExceeded(f"{whose} {count} {what.value}; the limit is {limit}", hint=hint)
