# SPDX-License-Identifier: Apache-2.0
"""The fields of a form, in a body that is passed on as it is (multipart/form-data, RFC 7578).

Engines read forms with the same library, through Starlette, so what a field says here is what it says there. Where a
form could be read in two ways, such as two fields of one name, it is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from flashd.errors import InvalidArgument
from flashd.units import KiB

_MOST_PARTS = 1000  # as Starlette has it
_MOST_HEADER_BYTES = 8 * KiB  # of a part
_MOST_VALUE_BYTES = 4 * KiB  # of a field that is read
_PIECE_BYTES = 256 * KiB  # the parser keeps other threads waiting for so long at most
_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii"})


@dataclass(frozen=True, slots=True)
class Field:
    """The value of a field, and its place in the body."""

    value: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Form:
    """A body, and those of its fields that were asked for."""

    body: bytes
    boundary: bytes
    fields: Mapping[str, Field]

    def value(self, name: str) -> str:
        """The value of a field; empty if there is none."""
        return self.fields[name].value if name in self.fields else ""

    def with_value(self, name: str, value: str) -> bytes:
        """The body with another value in a field. Nothing else changes; a field that is missing comes first.

        Raises InvalidArgument if the field is there and empty."""
        if (field := self.fields.get(name)) is None:
            head = f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
            return b"--" + self.boundary + b"\r\n" + head + self.body
        if not field.value:  # its place is not known
            raise InvalidArgument(f"`{name}` is empty", hint="leave it out, or give it a value")
        if field.value == value:
            return self.body
        return self.body[: field.begin] + value.encode() + self.body[field.end :]


def parse_form(content_type: str, body: bytes, wanted: Collection[str]) -> Form:
    """Reads the `wanted` fields, which are texts. Raises InvalidArgument for what is no form, or has no end."""
    kind, parameters = parse_options_header(content_type)
    boundary = parameters.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidArgument("the body is not a form", hint="send multipart/form-data with a boundary")
    if (charset := parameters.get(b"charset", b"utf-8").decode("latin-1").lower()) not in _CHARSETS:
        raise InvalidArgument(f"the form's charset is {charset[:40]!r}", hint="send it as utf-8")
    try:
        reader = _Reader(boundary, wanted)
        for at in range(0, len(body), _PIECE_BYTES):
            reader.feed(body[at : at + _PIECE_BYTES], at)
    except FormParserError as error:
        raise InvalidArgument(f"the body is not a form: {error}") from None
    if not reader.has_ended:
        raise InvalidArgument("the form has no end", hint="its last boundary is missing")
    fields = {}
    for name, (begin, value) in reader.found.items():
        if body[begin : begin + len(value)] != value:  # it begins with what might have been a boundary
            raise InvalidArgument(f"`{name}` is not a plain text")
        try:
            fields[name] = Field(value.decode(), begin, begin + len(value))
        except UnicodeDecodeError:
            raise InvalidArgument(f"`{name}` is not utf-8") from None
    return Form(body, boundary, fields)


class _Reader:
    """Keeps the wanted fields while the parser goes through the body."""

    def __init__(self, boundary: bytes, wanted: Collection[str]) -> None:
        self.found: dict[str, tuple[int, bytes]] = {}  # where a value begins, and what it is
        self.has_ended = False
        self._wanted = wanted
        self._at = 0
        self._parts = 0
        self._name: str | None = None  # of the part, if it is wanted
        self._value = bytearray()
        self._begin = 0
        self._header, self._header_value, self._disposition = bytearray(), bytearray(), b""
        self._header_bytes = 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": lambda data, start, end: self._add_header(self._header, data[start:end]),
                "on_header_value": lambda data, start, end: self._add_header(self._header_value, data[start:end]),
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._data,
                "on_part_end": self._part_ends,
                "on_end": self._ends,
            },
        )

    def feed(self, piece: bytes, at: int) -> None:
        """Goes on with a piece of the body that begins `at` this place. Raises FormParserError or InvalidArgument."""
        self._at = at
        self._parser.write(piece)

    def _part_begins(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise InvalidArgument(f"the form has more than {_MOST_PARTS} parts")
        self._disposition, self._header_bytes = b"", 0

    def _add_header(self, to: bytearray, piece: bytes) -> None:
        self._header_bytes += len(piece)
        if self._header_bytes > _MOST_HEADER_BYTES:
            raise InvalidArgument(f"a part of the form has more than {_MOST_HEADER_BYTES >> 10} KiB of headers")
        to += piece

    def _header_ends(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode(errors="replace")
        self._name = name if name in self._wanted else None
        if self._name is None:
            return
        if b"filename" in options:
            raise InvalidArgument(f"`{name}` is a file in this form, and not a text")
        if name in self.found:
            raise InvalidArgument(f"the form has two fields `{name}`")
        self._value.clear()
        self._begin = -1

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            return
        if self._begin < 0:
            self._begin = self._at + start
        self._value += data[start:end]
        if len(self._value) > _MOST_VALUE_BYTES:
            raise InvalidArgument(f"`{self._name}` is longer than {_MOST_VALUE_BYTES >> 10} KiB")

    def _part_ends(self) -> None:
        if self._name is not None:
            self.found[self._name] = (max(self._begin, 0), bytes(self._value))

    def _ends(self) -> None:
        self.has_ended = True
