# SPDX-License-Identifier: Apache-2.0
"""Converts frozen dataclasses to JSON objects and back, and checks all types and bounds on the way back.

The JSON comes from an untrusted process, or from another version of flashd. So unknown fields are ignored, missing
fields get their defaults, and all other mismatches raise an error that describes them.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, dataclass
from enum import StrEnum
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from flashd.errors import EngineFailed

T = TypeVar("T")

_SHOWN = 60  # characters of a quoted value
_HINT = "the process may be of another version of flashd"


class Misunderstood(EngineFailed):
    """Raised for data from a process that is not a valid message."""


@dataclass(frozen=True, slots=True)
class Range:
    """Inclusive bounds of a number: `Annotated[int, Range(1, 10)]`. Numbers without a Range have default bounds."""

    least: float
    most: float


_INTEGERS = Range(-(1 << 63), (1 << 63) - 1)
_FLOATS = Range(-1e18, 1e18)

# Keys of a field's metadata: its name in JSON, and whether the fields of its dataclass are inlined there.
WIRE_NAME = "wire_name"
FLAT = "flat"


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    wire_name: str
    type: object
    is_flat: bool
    is_required: bool


def to_json(value: object) -> dict[str, object]:
    """Converts a dataclass to a JSON object."""
    content: dict[str, object] = {}
    for field in _fields(cast(Hashable, type(value))):
        part = getattr(value, field.name)
        if field.is_flat:
            content |= to_json(part)
        else:
            content[field.wire_name] = _plain(part)
    return content


def from_json(kind: type[T], content: object, what: str = "a message") -> T:
    """Converts a JSON object to a dataclass. Raises Misunderstood, which calls the object `what`."""
    made: T = _object(kind, content, what)
    return made


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return value


@functools.cache
def _fields(kind: Hashable) -> tuple[_Field, ...]:
    assert isinstance(kind, type) and dataclasses.is_dataclass(kind)
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        _Field(
            name=field.name,
            wire_name=field.metadata.get(WIRE_NAME, field.name),
            type=hints[field.name],
            is_flat=field.metadata.get(FLAT, False),
            is_required=field.default is MISSING and field.default_factory is MISSING,
        )
        for field in dataclasses.fields(kind)
    )


def _object(kind: Any, content: object, what: str) -> Any:
    if not isinstance(content, dict):
        raise _refusal(what, "an object", content)
    values = {}
    for field in _fields(kind):
        if field.is_flat:
            values[field.name] = _object(field.type, content, what)
        elif field.wire_name in content:
            values[field.name] = _value(field.type, content[field.wire_name], f"{field.wire_name} in {what}")
        elif field.is_required:
            raise Misunderstood(f"{what} has no {field.wire_name}", hint=_HINT)
    return kind(**values)


def _value(kind: Any, value: object, what: str) -> object:  # noqa: PLR0911 -- one for each type
    if get_origin(kind) is not None:
        return _composed(kind, value, what)
    if kind is object:
        return value
    if kind is str:
        return _text(value, what)
    if kind is bool:
        if not isinstance(value, bool):
            raise _refusal(what, "true or false", value)
        return value
    if kind is int or kind is float:
        return _number(kind, value, _INTEGERS if kind is int else _FLOATS, what)
    if issubclass(kind, StrEnum):
        if not isinstance(value, str) or value not in set(kind):
            raise _refusal(what, f"one of: {', '.join(kind)}", value)
        return kind(value)
    return _object(kind, value, what)


def _composed(kind: object, value: object, what: str) -> object:
    """Converts a value of a compound type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        number, bounds = arguments
        return _number(number, value, bounds, what)
    if origin in {Union, types.UnionType}:
        return None if value is None else _value(arguments[0], value, what)
    if origin is tuple:
        if not isinstance(value, list):
            raise _refusal(what, "a list", value)
        return tuple(_value(arguments[0], part, f"an entry of {what}") for part in value)
    assert origin is Mapping, kind
    if not isinstance(value, dict):
        raise _refusal(what, "an object", value)
    named = f"an entry of {what}"
    return {_text(name, what): _value(arguments[1], part, named) for name, part in value.items()}


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise _refusal(what, "a text", value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            raise _refusal(what, "a text of Unicode characters", value) from None
    return value


def _number(kind: type[int] | type[float], value: object, bounds: Range, what: str) -> int | float:
    is_number = type(value) is int or (kind is float and type(value) is float)
    if not is_number:
        raise _refusal(what, "a whole number" if kind is int else "a number", value)
    assert isinstance(value, int | float)
    if not bounds.least <= value <= bounds.most:  # refuses NaN too
        raise _refusal(what, f"from {bounds.least:g} to {bounds.most:g}", value)
    return value if kind is int else float(value)


def _refusal(what: str, wanted: str, value: object) -> Misunderstood:
    match value:
        case dict():
            shown = "an object"
        case list():
            shown = "a list"
        case str():
            shown = ascii(value[:_SHOWN])
        case _:
            shown = ascii(value)[:_SHOWN]
    return Misunderstood(f"{what} should be {wanted}, but is {shown}", hint=_HINT)
