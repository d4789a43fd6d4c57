# SPDX-License-Identifier: Apache-2.0
"""Entries of a models folder that are no sources, and why: an empty folder, a stray file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from flashd.checkpoint.source.downloads import is_unfinished
from flashd.checkpoint.source.reader import is_part_of_a_model


@dataclass(frozen=True, slots=True)
class Stray:
    """An entry of a models folder that is no source. It may become one: a copy of it may have only begun."""

    path: Path
    why: str


def stray(entry: os.DirEntry[str]) -> Stray:
    """Describes an entry in which no source was found. Raises OSError if it cannot be read."""
    return Stray(Path(entry.path), _why(entry))


def _why(entry: os.DirEntry[str]) -> str:
    if is_unfinished(entry.name, is_folder=entry.is_dir(follow_symlinks=False)):
        return "a download that has not finished"
    if entry.is_dir():
        with os.scandir(entry.path) as entries:
            return "a folder without weights" if any(entries) else "an empty folder"
    if entry.is_symlink() and not entry.is_file():
        return "a link that leads nowhere"
    if is_part_of_a_model(entry.name):
        return "a file that belongs into the folder of its model"
    return "not a file of weights"
