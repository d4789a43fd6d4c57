# SPDX-License-Identifier: Apache-2.0
"""Encodes and decodes values in D-Bus messages, by signature.

The layout is that of the D-Bus specification, "Marshaling (Wire Format)".
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from flashd.errors import InvalidArgument

_NUMBERS = {"y": ("B", 1), "n": ("h", 2), "q": ("H", 2), "i": ("i", 4), "u": ("I", 4), "x": ("q", 8), "t": ("Q", 8),
            "d": ("d", 8), "h": ("I", 4)}  # fmt: skip
_ALIGNMENTS = {**{token: size for token, (_, size) in _NUMBERS.items()}, "b": 4, "s": 4, "o": 4, "g": 1,
               "a": 4, "v": 1, "(": 8, "{": 8}  # fmt: skip
_MOST_DEPTH = 64  # the specification allows 32 nested arrays and 32 nested structs


class Type(NamedTuple):
    """A complete type: its first letter, and the types inside an array, struct or dictionary entry."""

    token: str
    inner: tuple[Type, ...] = ()


class Variant(NamedTuple):
    """A value with its type."""

    signature: str
    value: object


@functools.lru_cache(1000)
def types(signature: str) -> tuple[Type, ...]:
    """Splits a signature into complete types. Raises ValueError."""
    found = []
    offset = 0
    while offset < len(signature):
        one, offset = _type(signature, offset, 0)
        found.append(one)
    return tuple(found)


def _type(signature: str, offset: int, depth: int) -> tuple[Type, int]:
    token = signature[offset : offset + 1]
    offset += 1
    if depth > _MOST_DEPTH or token not in _ALIGNMENTS:
        raise ValueError(f"{signature!r} is not a D-Bus signature")
    if token == "a":
        item, offset = _type(signature, offset, depth + 1)
        return Type(token, (item,)), offset
    if token not in "({":
        return Type(token), offset
    inner = []
    while signature[offset : offset + 1] != {"(": ")", "{": "}"}[token]:
        one, offset = _type(signature, offset, depth + 1)
        inner.append(one)
    if token == "{" and len(inner) != 2:
        raise ValueError(f"the signature {signature!r} has a dictionary entry that is not a pair")
    return Type(token, tuple(inner)), offset + 1


def encoded(signature: str, values: Sequence[object]) -> bytes:
    """Encodes a body, little-endian. Raises ValueError, TypeError or struct.error for values of wrong types."""
    encoder = _Encoder()
    for one, value in zip(types(signature), values, strict=True):
        encoder.add(one, value)
    return bytes(encoder.written)


class _Encoder:
    def __init__(self) -> None:
        self.written = bytearray()

    def add(self, of: Type, value: Any) -> None:
        match of.token:
            case "s" | "o":
                self._text("I", 4, value)
            case "g":
                self._text("B", 1, value)
            case "b":
                if not isinstance(value, bool):
                    raise TypeError(f"{value!r} is not True or False")
                self._number("I", 4, int(value))
            case "v":
                if not isinstance(value, Variant):
                    raise TypeError(f"{value!r} is not a variant")
                (inner,) = types(value.signature)
                self._text("B", 1, value.signature)
                self.add(inner, value.value)
            case "a":
                self._array(of.inner[0], value)
            case "(" | "{":
                self._align(8)
                for inner, item in zip(of.inner, value, strict=True):
                    self.add(inner, item)
            case token:
                self._number(*_NUMBERS[token], value)

    def _array(self, of: Type, value: Any) -> None:
        items = value.items() if of.token == "{" else value
        self._number("I", 4, 0)
        length_at = len(self.written) - 4
        self._align(_ALIGNMENTS[of.token])
        begin = len(self.written)
        if isinstance(items, bytes) and of.token == "y":
            self.written += items
        elif isinstance(items, str | bytes):
            raise TypeError(f"{items!r} is not a list")
        else:
            for item in items:
                self.add(of, item)
        struct.pack_into("<I", self.written, length_at, len(self.written) - begin)

    def _text(self, form: str, size: int, value: object) -> None:
        if not isinstance(value, str):
            raise TypeError(f"{value!r} is not a text")
        if "\0" in value:
            raise ValueError("D-Bus strings cannot contain NUL")
        data = value.encode()
        self._number(form, size, len(data))
        self.written += data + b"\0"

    def _number(self, form: str, size: int, value: object) -> None:
        self._align(size)
        self.written += struct.pack("<" + form, value)

    def _align(self, size: int) -> None:
        self.written += bytes(-len(self.written) % size)


def decoded(signature: str, order: str, body: bytes, fds: Sequence[int] = ()) -> tuple[Any, ...]:
    """Decodes a body, with variants unwrapped and descriptors in place of their indexes.

    Raises InvalidArgument, ValueError, IndexError or struct.error if it does not match the signature.
    """
    decoder = Decoder(order, body, fds)
    return tuple(decoder.value(one) for one in types(signature))


class Decoder:
    """Decodes one body. Derived classes may add limits."""

    def __init__(self, order: str, body: bytes, fds: Sequence[int]) -> None:
        self._order = order
        self._body = body
        self._fds = fds
        self._offset = 0

    def value(self, of: Type) -> Any:
        value: Any
        match of.token:
            case "s" | "o":
                value = self._checked_text(self._unpacked("I", 4))
            case "g":
                value = self._checked_text(self._unpacked("B", 1))
            case "b":
                value = bool(self._unpacked("I", 4))
            case "h":
                value = self._descriptor(self._unpacked("I", 4))
            case "a":
                value = self._array(of.inner[0])
            case "v":
                value = self._variant(self._text(self._unpacked("B", 1)))
            case "(":
                self._align(8)
                value = [self.value(inner) for inner in of.inner]
            case token:
                value = self._checked_number(self._unpacked(*_NUMBERS[token]))
        return value

    def _array(self, of: Type) -> Any:
        length = self._unpacked("I", 4)
        self._align(_ALIGNMENTS[of.token])
        end = self._offset + length
        is_dictionary = of.token == "{"
        entries: list[Any] = []
        while self._offset < end:
            self._check_entry()
            if is_dictionary:
                self._align(8)
                key = self.value(of.inner[0])
                entries.append((key, self.value(of.inner[1])))
            else:
                entries.append(self.value(of))
        return dict(entries) if is_dictionary else entries

    def _check_entry(self) -> None:
        """Checks that one more entry of an array or dictionary may be read."""

    def _checked_number(self, value: Any) -> Any:
        return value

    def _checked_text(self, length: int) -> str:
        return self._text(length)

    def _variant(self, signature: str) -> Any:
        (inner,) = types(signature)
        return self.value(inner)

    def _text(self, length: int) -> str:
        start = self._offset
        self._offset += length + 1
        if self._offset > len(self._body):
            raise IndexError("a text is longer than its message")
        return self._body[start : start + length].decode()

    def _descriptor(self, index: int) -> int:
        if index >= len(self._fds):
            raise InvalidArgument("a file descriptor was announced but not sent")
        return self._fds[index]

    def _unpacked(self, form: str, size: int) -> Any:
        self._align(size)
        (number,) = struct.unpack_from(self._order + form, self._body, self._offset)
        self._offset += size
        return number

    def _align(self, size: int) -> None:
        self._offset += -self._offset & (size - 1)
