# SPDX-License-Identifier: Apache-2.0
"""Recognises unfinished downloads by the names that browsers and download programs give them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_ENDINGS = (
    ".part", ".partial", ".incomplete", ".tmp", ".temp", ".filepart", ".aria2", ".aria2__temp",
    ".crdownload", ".download", ".opdownload", ".downloading",  # Chromium, Safari, Opera, others
    ".!qb", ".!ut", ".bc!", ".fdmdownload", ".xltd", ".td",  # qBittorrent and the like
)  # fmt: skip


def is_unfinished(name: str, *, is_folder: bool = False) -> bool:
    """Tells whether a file, or a folder made by Safari, of this name is an unfinished download."""
    return name.lower().endswith(".download" if is_folder else _ENDINGS)


def unfinished_twin(name: str, beside: Iterable[str]) -> str | None:
    """Returns the name of an unfinished download in the same folder that will become `name`; None if there is none.

    Firefox inserts a few random characters before the ending: x.safetensors is first x.aB3dE-_z.safetensors.part.
    """
    stem, _, ending = name.rpartition(".")
    firefox = re.compile(rf"{re.escape(stem)}\.[\w-]{{1,16}}\.{re.escape(ending)}")
    for other in beside:
        if is_unfinished(other):
            target = other[: other.rindex(".")]
            if target in {name, stem} or firefox.fullmatch(target):
                return other
    return None
