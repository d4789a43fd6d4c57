# SPDX-License-Identifier: Apache-2.0
"""Compatibility of org.flashd1: programs written for it keep working. interfaces.json records what is on the bus today.

A failure means that somebody's program would break: the record may only grow. `python tests/bus/test_compatibility.py`
records additions; after any other change the tests still fail, as they should.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashd import errors
from flashd.dbus import wire
from flashd.dbus.object_tree import contract

RECORD = Path(__file__).with_name("interfaces.json")


def members() -> dict[str, dict[str, str]]:
    """Every member of every interface, and what of it a program depends on."""
    found = {}
    for interface in wire.INTERFACES:
        parsed = contract(interface)
        methods = {f"{m.name}()": f"{m.in_signature} -> {m.out_signature}" for m in parsed.methods}
        signals = {f"signal {s.name}": s.signature for s in parsed.signals}
        properties = {p.name: f"{p.signature} {p.access.value}" for p in parsed.properties}
        found[interface] = dict(sorted({**methods, **signals, **properties}.items()))
    found["errors"] = {name: str(cls.exit_status) for name, cls in error_classes().items()}
    return found


def error_classes() -> dict[str, type[errors.FlashdError]]:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.FlashdError)]
    return {cls.bus_name(): cls for cls in classes if cls is not errors.FlashdError}


def broken(recorded: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """What somebody relies on and is not there any more, or not as it was."""
    return [
        f"{interface}: {member} was {shape!r}, is {now.get(interface, {}).get(member, 'gone')!r}"
        for interface, shapes in recorded.items()
        for member, shape in shapes.items()
        if now.get(interface, {}).get(member) != shape
    ]


def test_whatever_was_promised_is_still_there() -> None:
    assert broken(json.loads(RECORD.read_text()), members()) == []


def test_what_is_new_is_promised_from_now_on() -> None:
    assert broken(members(), json.loads(RECORD.read_text())) == [], "run: python tests/bus/test_compatibility.py"


@pytest.mark.parametrize(
    "change",
    [{"Swap()": "s -> o"}, {"Swap()": None}, {"Version": "s readwrite"}, {"Version": "u read"}],
    ids=["another signature", "removed", "another access", "another type"],
)
def test_a_breach_is_seen(change: dict[str, str | None]) -> None:
    manager = {**members()[wire.MANAGER], **change}
    changed = {**members(), wire.MANAGER: {name: shape for name, shape in manager.items() if shape is not None}}
    (breach,) = broken(members(), changed)
    assert next(iter(change)) in breach


def test_additions_are_no_breach() -> None:
    assert broken(members(), {**members(), wire.MANAGER: {**members()[wire.MANAGER], "New()": "s -> s"}}) == []


if __name__ == "__main__":
    recorded = json.loads(RECORD.read_text() or "{}")
    merged = {name: {**shapes, **recorded.get(name, {})} for name, shapes in members().items()}
    RECORD.write_text(json.dumps({**recorded, **merged}, indent=1, sort_keys=True) + "\n")
