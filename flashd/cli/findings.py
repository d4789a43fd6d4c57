# SPDX-License-Identifier: Apache-2.0
"""What is said of one thing that was looked at: good, slow or bad, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    GOOD = "good"
    SLOW = "slow"  # works, and could be faster or better
    BAD = "bad"  # something will fail


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: what was found, and, unless it is good, what to do."""

    subject: str
    verdict: Verdict
    found: str
    remedy: str = ""
