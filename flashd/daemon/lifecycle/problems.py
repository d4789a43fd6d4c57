# SPDX-License-Identifier: Apache-2.0
"""Problems with the daemon's state that an administrator has to solve."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import starmap
from pathlib import Path

from flashd.daemon.events import Events
from flashd.durable import put_aside
from flashd.errors import FlashdError
from flashd.legible import legible
from flashd.store.catalog import Catalog
from flashd.tasks import Routine, Stop, in_thread

_LOOK_S = 2.0
_MOST_NAMED = 20  # most files that are named one by one
_REMEDY = "repair the file and restore its old name, or remove it; then restart flashd"


@dataclass(frozen=True, slots=True)
class _Seen:
    """The last result. `store` is the store's problem with its remedy, or empty; `missing` are the models folders that
    were missing then, with the reason.
    """

    store: tuple[str, ...]
    damaged: tuple[Path, ...]
    missing: tuple[tuple[Path, str], ...] = ()


class Problems(Routine):
    """Checks the disk every few seconds, in a thread, so that reading the result never waits for a hanging file system.

    Problems disappear once they are solved. `missing_folders` tells, without asking the disk, which models folders do
    not exist, and why.
    """

    def __init__(
        self,
        catalog: Catalog,
        state: Path,
        events: Events,
        *,
        missing_folders: Callable[[], Mapping[Path, str]] = dict,
        look_s: float = _LOOK_S,
    ) -> None:
        super().__init__("looking for problems", self._round)
        self._catalog = catalog
        self._state = state
        self._events = events
        self._missing_folders = missing_folders
        self._look_s = look_s
        self._seen = self._look()

    def all(self, *, with_names: bool) -> list[list[str]]:
        """Lists problems with their remedies. Files are named only `with_names`, because the name of a record is that
        of a model, which may be private.
        """
        of_the_store = [list(self._seen.store)] if self._seen.store else []
        return [
            *of_the_store,
            *starmap(_of_missing, self._missing_folders().items()),
            *self._of_files(with_names=with_names),
        ]

    async def _round(self) -> None:
        await asyncio.sleep(self._look_s)
        before, found = self._seen, await in_thread(self._look)
        self._seen = replace(found, missing=tuple(self._missing_folders().items()))
        if self._seen != before:
            self._events.problems_changed()

    def _look(self, _stop: Stop | None = None) -> _Seen:
        return _Seen(self._at_the_store(), (*put_aside(self._state), *self._catalog.damaged()))

    def _at_the_store(self) -> tuple[str, ...]:
        try:
            self._catalog.check_usable()
        except FlashdError as error:
            return (error.message, error.hint)
        return ()

    def _of_files(self, *, with_names: bool) -> list[list[str]]:
        damaged = self._seen.damaged
        named = damaged[:_MOST_NAMED] if with_names else ()
        found = [[f"{legible(str(path))} was damaged and is not used", _REMEDY] for path in named]
        if more := len(damaged) - len(named):
            where = legible(str(self._state))
            found.append([f"{more} damaged files were set aside below {where}; the log lists them", _REMEDY])
        return found


def _of_missing(folder: Path, why: str) -> list[str]:
    shown = legible(str(folder))
    remedy = f"make the folder (mkdir -p {shlex.quote(shown)}, or flash restart), or mount the disk that it is on"
    return [f"{shown}: {why}, so no model can be dropped there", remedy]
