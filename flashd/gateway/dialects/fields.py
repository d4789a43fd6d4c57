# SPDX-License-Identifier: Apache-2.0
"""Tables of the fields of requests.

A field that is not in its table is refused by name, because it might change the answer. A null field counts as absent.
A field that cannot be translated is in the table with the values that have no effect, and refused with others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flashd.errors import InvalidArgument
from flashd.json_values import JsonObject, Read, WrongValue

MAX_INT32 = (1 << 31) - 1
MAX_INT64 = (1 << 63) - 1
_SHOWN = 80  # characters of a name that a client made up


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a request. `becomes` names the field of OpenAI's request that gets its value, if one does."""

    name: str
    read: Read
    becomes: str = ""
    does: str = ""


def table(fields: Iterable[Field]) -> Mapping[str, Field]:
    return {field.name: field for field in fields}


def read_fields(content: Mapping[str, object], known: Mapping[str, Field], where: str) -> JsonObject:
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
            raise InvalidArgument(f"{name} {error}", hint=error.hint) from None
    return found


def translated(read: Mapping[str, Any], known: Mapping[str, Field]) -> JsonObject:
    """Returns the values that belong into OpenAI's request, by the names that they have there."""
    return {known[name].becomes: value for name, value in read.items() if known[name].becomes and value is not None}


def texts(value: object) -> list[str]:
    """Reads a text or a list of texts."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise WrongValue("must be a text or a list of texts")
    return found


def objects(value: object) -> list[JsonObject]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise WrongValue("must be a list of objects")
    return value


def mapping(value: object) -> JsonObject:
    if not isinstance(value, dict):
        raise WrongValue("must be an object")
    return value
