# SPDX-License-Identifier: Apache-2.0
"""Finds all files of weights in several numbered files, from the names of the existing ones.

`model-00002-of-00003.safetensors` is one of three, and so is `model_2_of_3.bin`; `model.00-of-02.pth` counts from zero.
If names do not tell the total (`consolidated.01.pth`), all numbers below the highest one are expected.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from flashd.errors import InvalidSource

_OF = re.compile(r"(.*?)(\d{1,6})([-_. ]?of[-_. ]?)(\d{1,6})(\D.*)", re.IGNORECASE)
# Numbered by Meta from 0, and by torchtune from 1.
_OPEN_ENDED = (
    (re.compile(r"(consolidated[.-])(\d{2,5})()()(\.\w+)"), 0),
    (re.compile(r"(hf_model_)(\d{4})()()(_\d+\.pt)"), 1),
)


@dataclass(frozen=True, slots=True)
class _Series:
    """The common part of the names of a series. `total` is empty if they do not tell it."""

    prefix: str
    of: str
    total: str
    suffix: str
    first: int


def whole_series(names: Collection[str], *, limit: int) -> set[str]:
    """Returns the names of all files of the series to which `names` belong.

    Raises InvalidSource if they imply more than `limit` files.
    """
    numbers: dict[_Series, dict[int, str]] = defaultdict(dict)
    for name in names:
        if (found := _series_of(name)) is not None:
            series, spelled = found
            numbers[series][int(spelled)] = spelled
    whole: set[str] = set()
    for series, there in numbers.items():
        wanted = _wanted(series, there, limit)
        if len(whole) + len(wanted) > limit:
            raise InvalidSource(f"the names of the shards imply more than {limit} files")
        width = max((len(spelled) for spelled in there.values() if spelled.startswith("0")), default=0)
        for number in wanted:
            spelled = there.get(number, str(number).zfill(width))
            whole.add(f"{series.prefix}{spelled}{series.of}{series.total}{series.suffix}")
    return whole


def is_one_of_several(name: str) -> bool:
    """Tells by its name whether a file is a part of a series."""
    found = _series_of(name)
    return found is not None and (not found[0].total or int(found[0].total) > 1)


def _series_of(name: str) -> tuple[_Series, str] | None:
    if (match := _OF.fullmatch(name)) and int(match[4]):
        return _Series(match[1], match[3], match[4], match[5], 1), match[2]
    for pattern, first in _OPEN_ENDED:
        if match := pattern.fullmatch(name):
            return _Series(match[1], "", "", match[5], first), match[2]
    return None


def _wanted(series: _Series, there: Collection[int], limit: int) -> range:
    if series.total:
        first = 0 if 0 in there else series.first
        last = first + int(series.total) - 1
    else:
        first, last = series.first, max(there)
    if last - first >= limit:
        raise InvalidSource(f"the names of the shards imply more than {limit} files")
    return range(first, last + 1)
