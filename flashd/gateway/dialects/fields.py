# SPDX-License-Identifier: Apache-2.0
"""Tables of fields of requests, and readers of their values.

A field that is not in its table is refused by name, because it might change the answer. A null field counts as absent.
A field that cannot be translated is in the table with the values that have no effect, and refused with others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flashd.errors import InvalidArgument

MAX_INT32 = (1 << 31) - 1
MAX_INT64 = (1 << 63) - 1
_SHOWN = 80  # characters of a name that a client made up
_MOST_SHOWN_VALUES = 8


class WrongValue(Exception):
    """Raised with a message about the values that a field accepts."""


Read = Callable[[object], Any]  # returns the value to use; raises WrongValue


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a request. `becomes` names the field of OpenAI's request that gets its value, if one does."""

    name: str
    read: Read
    becomes: str = ""
    does: str = ""


def table(fields: Iterable[Field]) -> Mapping[str, Field]:
    return {field.name: field for field in fields}


def read_fields(content: Mapping[str, object], known: Mapping[str, Field], where: str) -> dict[str, Any]:
    """Returns the values of the fields that are not null. Raises InvalidArgument for unknown fields and values.

    `where` names the object in messages.
    """
    found = {}
    for name, value in content.items():
        if value is None:
            continue
        if (field := known.get(name)) is None:
            hint = "leave it out: it would be ignored, and might change the answer"
            raise InvalidArgument(f"{name[:_SHOWN]!r} is not known in {where}", hint=hint)
        try:
            found[name] = field.read(value)
        except WrongValue as error:
            raise InvalidArgument(f"{name} {error}") from None
    return found


def translated(read: Mapping[str, Any], known: Mapping[str, Field]) -> dict[str, Any]:
    """Returns the values that belong into OpenAI's request, by the names that they have there."""
    return {known[name].becomes: value for name, value in read.items() if known[name].becomes and value is not None}


def number(low: float, high: float) -> Read:
    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise WrongValue(f"must be a number from {low:g} to {high:g}")
        return value

    return read


def whole(low: int, high: int) -> Read:
    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise WrongValue(f"must be a whole number from {low} to {high}")
        return value

    return read


def flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise WrongValue("must be true or false")
    return value


def text(value: object) -> str:
    if not isinstance(value, str):
        raise WrongValue("must be a text")
    return value


def texts(value: object) -> list[str]:
    """Reads a text or a list of texts."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise WrongValue("must be a text or a list of texts")
    return found


def objects(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise WrongValue("must be a list of objects")
    return value


def mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WrongValue("must be an object")
    return value


def only(*values: object) -> Read:
    """Returns a reader that accepts only values that have no effect."""
    allowed = [json.dumps(value, sort_keys=True) for value in values]

    def read(value: object) -> None:
        if json.dumps(value, sort_keys=True) not in allowed:
            raise WrongValue("can only be " + " or ".join(allowed[:_MOST_SHOWN_VALUES]) + " here")

    return read


def anything(value: object) -> None:
    """Accepts all values, because the field has no effect on the answer."""
