# SPDX-License-Identifier: Apache-2.0
"""Converts arguments of bus calls to the daemon's types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dbus_next import Variant

from flashd.daemon.job import Owner
from flashd.dbus.connection import plain
from flashd.dbus.object_tree import Caller
from flashd.errors import InvalidArgument


def checked_options(options: Mapping[str, Variant], **known: str) -> dict[str, Any]:
    """Converts options to plain values. Raises InvalidArgument for unknown names and values of other types."""
    for name, value in options.items():
        if name not in known:
            hint = f"choose one of: {', '.join(sorted(known))}" if known else "this method has no options yet"
            raise InvalidArgument(f"there is no option {name!r}", hint=hint)
        if value.signature != known[name]:
            raise InvalidArgument(f"option {name!r} is of type {known[name]!r}, not {value.signature!r}")
    return {name: plain(value) for name, value in options.items()}


def owner(caller: Caller) -> Owner:
    """Returns the caller as the owner of a job."""
    return Owner(caller.peer, caller.uid)


def number_in(path: str, path_of: Callable[[int], str]) -> int:
    """Returns the number at the end of one of our object paths. Raises InvalidArgument."""
    last = path.rpartition("/")[2]
    if not (last.isascii() and last.isdigit()) or path_of(int(last)) != path:
        raise InvalidArgument(
            f"{path} is not the path of an object of this kind",
            hint="use the path returned by the call that created the object",
        )
    return int(last)
