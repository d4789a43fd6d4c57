# SPDX-License-Identifier: Apache-2.0
"""Decodes the arguments of method calls within the limits of each argument."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dbus_next import Variant

from flashd.dbus.messages import FIXED_BYTES, MAX_BODY_BYTES, Head
from flashd.dbus.values import Decoder, Type, types
from flashd.errors import InvalidArgument

_IN_VARIANTS = frozenset({"y", "b", "n", "q", "i", "u", "x", "t", "d", "s", "o", "g", "as", "ao"})


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a method, with its limits: bytes of each text, entries of all arrays and dictionaries together,
    and the largest number. A limit is None if it does not apply to the argument's type.
    """

    name: str
    signature: str
    max_length: int | None = None
    max_items: int | None = None
    max_value: int | None = None


class Arguments:
    """The arguments of one method, and the decoder for its calls."""

    def __init__(self, method: str, arguments: Sequence[Argument], *, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.method = method
        self.arguments = tuple(arguments)
        self.signature = "".join(argument.signature for argument in arguments)
        self._types = [types(argument.signature)[0] for argument in arguments]
        self.max_body_bytes = sum(
            FIXED_BYTES + argument.max_length if argument.signature in {"s", "o"} and argument.max_length else
            max_body_bytes if of.token in {"a", "v", "s", "o", "("} else FIXED_BYTES
            for argument, of in zip(arguments, self._types, strict=True)
        )  # fmt: skip

    def decode(self, head: Head, body: bytes, fds: Sequence[int]) -> tuple[Any, ...]:
        """Returns the values, with descriptors in place of their indexes. `body` may be cut at `max_body_bytes`.

        Raises InvalidArgument, which names the argument and its limit.
        """
        decoder = _LimitedDecoder(self.method, head.order, body, fds)
        values = []
        try:
            for argument, of in zip(self.arguments, self._types, strict=True):
                values.append(decoder.argument(of, argument))
        except (struct.error, IndexError, ValueError):
            if len(body) == head.body_bytes:
                raise InvalidArgument(f"the arguments of {self.method} cannot be read") from None
        if len(body) < head.body_bytes:
            said = f"the arguments of {self.method} take {head.body_bytes} bytes; the limit is {self.max_body_bytes}"
            raise InvalidArgument(said, hint="send less in one call")
        return tuple(values)


class _LimitedDecoder(Decoder):
    """A decoder that raises at the first argument beyond its limit."""

    _argument: Argument

    def __init__(self, method: str, order: str, body: bytes, fds: Sequence[int]) -> None:
        super().__init__(order, body, fds)
        self._method = method
        self._items = 0  # those of the argument that is being read

    def argument(self, of: Type, argument: Argument) -> Any:
        self._argument, self._items = argument, 0
        return self.value(of)

    def _check_entry(self) -> None:
        self._items += 1
        most = self._argument.max_items
        if most is not None and self._items > most:
            raise self._beyond(f"has more than {most} entries", most, "have")

    def _checked_number(self, value: Any) -> Any:
        most = self._argument.max_value
        if most is not None and not value <= most:
            raise self._beyond(f"is {value}", most, "be")
        return value

    def _checked_text(self, length: int) -> str:
        most = self._argument.max_length
        if most is not None and length > most:
            raise self._beyond(f"has a text of {length} bytes", most, "have texts of")
        return self._text(length)

    def _variant(self, signature: str) -> Variant:
        if signature not in _IN_VARIANTS:
            name = self._argument.name
            raise InvalidArgument(f"argument {name!r} of {self._method} has a value of type {signature!r}")
        return Variant(signature, super()._variant(signature))

    def _beyond(self, what: str, limit: int, may: str) -> InvalidArgument:
        said = f"argument {self._argument.name!r} of {self._method} {what}, but may {may} at most {limit}"
        return InvalidArgument(said, hint="busctl introspect shows the limits of all arguments")
