# SPDX-License-Identifier: Apache-2.0
"""Decides which of several sources in the inbox with the same name becomes the model of that name.

`x/`, `x.safetensors`, `x ` and, in two Unicode normal forms, `é/` and `é/` may exist at the same time. Only the state
of the disk decides, so that the result is the same after every restart: a source in an earlier folder of
`inbox.folders` takes precedence over one in a later folder, a folder over a file, and then the first in the byte order
of names. The others are listed as unused until the first one is renamed or deleted; removing the model does not change
that.

Names that differ in case are different names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from flashd.checkpoint.source.reader import SourceFiles
from flashd.errors import InvalidArgument
from flashd.legible import legible
from flashd.store.names import check_name


class ItemState(StrEnum):
    """State of a source. REFUSED and UNUSED last until a source on the disk is renamed or removed."""

    SETTLING = "settling"
    INCOMPLETE = "incomplete"
    SETTLED = "settled"
    REFUSED = "failed"
    UNUSED = "unused"


@dataclass(frozen=True, slots=True)
class Item:
    """A source in a folder of the inbox: the folder or file at `path`. Its `fingerprint` changes with any of its files.

    `place` is the path that gives the source its name: `path`, or the folder of a training whose last checkpoint it is.
    `name` is the model's name, or legible text for an item that is unused or whose name is not valid for a model.
    """

    name: str
    path: Path
    fingerprint: str
    state: ItemState
    detail: str
    folder: Path
    place: Path
    is_folder: bool = True

    @property
    def is_used(self) -> bool:
        """True if the source is the one for the model `name`."""
        return self.state not in {ItemState.REFUSED, ItemState.UNUSED}

    @property
    def relative(self) -> str:
        """Path relative to its folder, spelled as on disk."""
        return str(self.place.relative_to(self.folder))

    def open(self) -> SourceFiles:
        """Opens its files, without following links inside the inbox's folder. Raises InvalidSource."""
        return SourceFiles.from_path(self.path, beneath=self.folder)


def claimed(items: Iterable[Item], folders: Sequence[Path]) -> list[Item]:
    """Assigns names to items. Items that get no name have a state and a message that say so."""
    order = {folder: number for number, folder in enumerate(folders)}
    by_rank = sorted(items, key=lambda i: (order[i.folder], not i.is_folder, os.fsencode(i.relative)))
    owners: dict[str, Item] = {}
    found = []
    for item in by_rank:
        state = ItemState.SETTLING if item.state is ItemState.UNUSED else item.state
        wanted = item.relative if item.is_folder else item.relative.rsplit(".", 1)[0]
        try:
            name = check_name(wanted)
        except InvalidArgument as error:
            found.append(replace(item, name=legible(item.relative), state=ItemState.REFUSED, detail=_renamed(error)))
            continue
        if state is ItemState.REFUSED:
            found.append(replace(item, name=legible(item.relative)))
        elif name in owners:
            detail = f"{name} is made from {legible(str(owners[name].place))}; rename one of the two"
            found.append(replace(item, name=legible(item.relative), state=ItemState.UNUSED, detail=detail))
        else:
            owners[name] = item
            found.append(replace(item, name=name, state=state))
    return found


def _renamed(error: InvalidArgument) -> str:
    return f"{error.message}\nrename it: {error.hint}"
