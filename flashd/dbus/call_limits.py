# SPDX-License-Identifier: Apache-2.0
"""The limits of the arguments of all methods, read from the interface XML.

    org.flashd1.MaxLength   bytes of each text in the argument
    org.flashd1.MaxItems    entries of all arrays and dictionaries in it together
    org.flashd1.MaxValue    the largest number

They are enforced while a call is decoded (flashd/dbus/arguments.py), before anything is done for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from xml.etree import ElementTree

from flashd.dbus.arguments import Argument, Arguments

_ANNOTATION = "org.flashd1."


def arguments_by_method(documents: Iterable[str]) -> Mapping[tuple[str, str], Arguments]:
    """Returns the arguments of each method by interface and member.

    Each method is also listed with an empty interface, because callers may leave that out.
    """
    found: dict[tuple[str, str], Arguments] = {}
    for document in documents:
        for interface in ElementTree.fromstring(document).iter("interface"):
            for method in interface.findall("method"):
                member = method.get("name", "")
                taken = [_argument(arg) for arg in method.findall("arg") if arg.get("direction", "in") == "in"]
                arguments = Arguments(member, taken)
                found[interface.get("name", ""), member] = arguments
                found.setdefault(("", member), arguments)
    return found


def _argument(element: ElementTree.Element) -> Argument:
    said = {a.get("name", ""): a.get("value", "") for a in element.findall("annotation")}
    length, items, value = (
        int(said[_ANNOTATION + name]) if _ANNOTATION + name in said else None
        for name in ("MaxLength", "MaxItems", "MaxValue")
    )
    return Argument(element.get("name", ""), element.get("type", ""), length, items, value)
