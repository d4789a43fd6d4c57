# SPDX-License-Identifier: Apache-2.0
"""Parses TOML from untrusted files, and reports all faults as one type of error."""

from __future__ import annotations

import tomllib
from typing import Any

MAX_DEPTH = 32
_INTEGERS = range(-(2**63), 2**63)  # TOML 1.0: an integer that does not fit into 64 bits is an error


def parse(text: str) -> dict[str, Any]:
    """Parses a document. Raises ValueError with a message of one line, for all three exceptions of tomllib."""
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # an integer of more than 4,300 digits, the 31st of February
        raise ValueError(str(error).split(";")[0]) from None
    _check(document)
    return document


def _check(document: dict[str, object]) -> None:
    """Refuses values that could not be written again or sent over a bus.

    Dotted keys can nest deeply without recursion in tomllib.
    """
    level: list[object] = [document]
    for _ in range(MAX_DEPTH):
        if any(isinstance(value, int) and value not in _INTEGERS for value in level):
            raise ValueError("it has an integer of more than 64 bits")
        tables = [value.values() for value in level if isinstance(value, dict)]
        lists = [value for value in level if isinstance(value, list)]
        level = [value for values in (*tables, *lists) for value in values]
        if not level:
            return
    raise ValueError("it is nested too deeply")
