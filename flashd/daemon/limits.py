# SPDX-License-Identifier: Apache-2.0
"""How much may one user have of us at once, so that nobody keeps the others out?

Nothing is booked: what somebody has is counted where it is, so that what ends, however it ends, counts no more. A
connection may have half of what its user may, so that one program that runs wild leaves the user's others room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Protocol

from flashd.config import LimitsConfig
from flashd.errors import LimitExceeded


class Holder(Protocol):
    """Who has something: a user, by a connection to the bus. The daemon itself has none."""

    @property
    def peer(self) -> str: ...

    @property
    def uid(self) -> int: ...


class Scarce(StrEnum):
    """What is limited, as in [limits]; the values are worded for "you have 3 ..."."""

    CALLS = "calls waiting for their answer"
    JOBS = "jobs under way"
    LEASES = "leases"
    IMPORTS = "imports waiting for files"
    DESCRIPTORS = "files of imports open"
    MODELS = "models"


_REMEDIES = {
    Scarce.CALLS: "wait for their answers",
    Scarce.JOBS: "wait until some have ended, or cancel them: flash jobs",
    Scarce.LEASES: "release some",
    Scarce.IMPORTS: "send their files, or cancel them: flash jobs",
    Scarce.DESCRIPTORS: "wait until these imports are converted, or drop the source into the models folder",
    Scarce.MODELS: "remove some: flash rm",
}


class Limits:
    """Compares with the configuration as it is now."""

    def __init__(self, config: Callable[[], LimitsConfig]) -> None:
        self._config = config

    def check(self, what: Scarce, asker: Holder, held: Iterable[Holder], more: int = 1) -> None:
        """Raises LimitExceeded if `asker` may not have so many `more` beside what everybody has of it, `held`."""
        if not asker.peer:
            return
        setting = what.name.lower()
        most = getattr(self._config(), setting)
        theirs = [holder for holder in held if holder.uid == asker.uid]
        by_connection = sum(holder.peer == asker.peer for holder in theirs)
        for whose, count, limit in (
            ("this connection has", by_connection, most if what is Scarce.MODELS else -(-most // 2)),
            (f"user {asker.uid} has", len(theirs), most),
        ):
            if count + more > limit:
                hint = f"{_REMEDIES[what]}; or ask an administrator to raise limits.{setting}"
                raise LimitExceeded(f"{whose} {count} {what.value}, and may have {limit}", hint=hint)
