# SPDX-License-Identifier: Apache-2.0
"""Reads untrusted JSON within limits, with errors that name its file.

All JSON of a source is read here: headers of safetensors files, indexes, configurations, adapters. Stricter than a JSON
parser, it refuses duplicate names, of which a parser picks one, and documents that need a hundred times their size in
memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NoReturn

from flashd.errors import InvalidSource

# Python needs up to 300 bytes for a JSON value of two bytes: 64 MiB of `[],[],` would take 2 GB of memory.
# A tensor takes eight of these, so a quarter of a million tensors pass.
MAX_JSON_VALUES = 2_000_000
MAX_DEPTH = 100
_AGAIN = "get this file from the model's origin again"
_INFINITIES = {"Infinity": float("inf"), "-Infinity": float("-inf")}


class _Strange(ValueError):
    """Raised for JSON that the parser accepts but we do not, with the reason."""


def strict_json(raw: bytes, what: str, *, constants: bool = False) -> Any:
    """Parses the document `raw`, in UTF-8. Raises InvalidSource, which names `what`, for malformed JSON.

    `constants` allows Infinity, which Python writes although it is not JSON: Mamba's time_step_limit is
    [0.0, Infinity].
    """
    try:
        return _parsed(raw.decode("utf-8"), what, constants=constants)
    except UnicodeDecodeError as error:
        raise InvalidSource(f"{what} is not UTF-8 (byte {error.start})", hint=_AGAIN) from None


def read_json(raw: bytes, what: str, *, constants: bool = False) -> Any:
    """Parses a file like `strict_json`, but also UTF-16 and byte order marks, which some editors write."""
    document = _parsed(_text_of(raw, what), what, constants=constants)
    if _is_deep(document):
        raise InvalidSource(f"{what} is nested too deeply", hint=_AGAIN)
    return document


def _is_deep(document: object) -> bool:
    """Tells whether a document is nested so deeply that writing or comparing it might fail."""
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [part for node in level if isinstance(node, dict | list) for part in _parts(node)]
        if not level:
            return False
    return True


def _parts(node: dict[str, object] | list[object]) -> Iterable[object]:
    return node.values() if isinstance(node, dict) else node


def as_utf8(raw: bytes, what: str) -> bytes:
    """Converts a file to UTF-8 without a byte order mark. Raises InvalidSource."""
    return raw if json.detect_encoding(raw) == "utf-8" else _text_of(raw, what).encode()


def _text_of(raw: bytes, what: str) -> str:
    encoding = json.detect_encoding(raw)
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        named = encoding.removesuffix("-sig").upper()
        raise InvalidSource(f"{what} is not text in {named} (byte {error.start})", hint=_AGAIN) from None


def _parsed(text: str, what: str, *, constants: bool) -> Any:
    if sum(text.count(mark) for mark in "[{,") > MAX_JSON_VALUES:
        raise InvalidSource(f"{what} contains more than {MAX_JSON_VALUES} values")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_infinity if constants else _no_constant)
    except RecursionError:
        raise InvalidSource(f"{what} is nested too deeply", hint=_AGAIN) from None
    except (json.JSONDecodeError, _Strange) as error:
        raise InvalidSource(f"{what} is not valid JSON: {error}", hint=_AGAIN) from None
    except ValueError:  # Python does not parse integers of more than sys.get_int_max_str_digits() digits
        raise InvalidSource(f"{what} is not valid JSON: it contains a number of thousands of digits") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for name, value in pairs:
        if name in result:
            raise _Strange(f"the name {name[:80]!r} occurs twice")
        result[name] = value
    return result


def _infinity(name: str) -> float:
    return _INFINITIES[name] if name in _INFINITIES else _no_constant(name)


def _no_constant(name: str) -> NoReturn:
    raise _Strange(f"{name} is not JSON")
