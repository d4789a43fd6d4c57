# SPDX-License-Identifier: Apache-2.0
"""Finds what a path that does not exist was meant to be."""

from __future__ import annotations

import difflib
import os
from itertools import islice
from pathlib import Path

from flashd.legible import legible

_MOST_ENTRIES = 2000  # of a folder; in a larger one the best name may be missed
_MOST_NEAR = 3


def exists(path: Path) -> bool:
    """Tells whether there is something at this path that can be reached, also if its name is too long for one."""
    return os.access(path, os.F_OK)


def why_missing(path: Path) -> str:
    """Describes a path that does not exist: `modle does not exist; did you mean model?`."""
    near = [legible(str(each)) for each in _near(path)]
    asked = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{legible(str(path))} does not exist{asked}"


def _near(path: Path) -> list[Path]:
    """Returns paths that exist and differ in one part: the first part of `path` that does not exist."""
    missing = next((part for part in (*reversed(path.parents), path) if not os.path.lexists(part)), path)
    rest = path.relative_to(missing)
    try:
        with os.scandir(missing.parent) as entries:
            names = [entry.name for entry in islice(entries, _MOST_ENTRIES)]
    except OSError:
        return []
    lowered = {name.lower(): name for name in sorted(names)}
    close = difflib.get_close_matches(missing.name.lower(), lowered, _MOST_NEAR, 0.6)
    found = (missing.parent / lowered[name] / rest for name in close)
    return [each for each in found if exists(each)]
