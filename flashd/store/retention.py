# SPDX-License-Identifier: Apache-2.0
"""Which old versions of a model stay?"""

from __future__ import annotations

from collections.abc import Collection, Sequence


def versions_to_keep(previous: Sequence[str], keep: int, in_use: Collection[str]) -> tuple[str, ...]:
    """The newest `keep` of the older versions (given newest first), and all that somebody uses."""
    return tuple(version for age, version in enumerate(previous) if age < keep or version in in_use)
