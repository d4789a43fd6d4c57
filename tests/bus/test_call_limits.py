# SPDX-License-Identifier: Apache-2.0
"""The limits of arguments, which the interface XML states for every method.

A call beyond one of them is refused before anything is done for it, and the daemon answers other callers meanwhile."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import Daemon, Remote
from dbus_next import Variant
from raw import NO_REPLY, Raw, error_text, marshalled, text
from waiting import eventually

from flashd.dbus import messages, wire
from flashd.dbus.arguments import Argument, Arguments
from flashd.dbus.object_tree import MOST_READING, Caller, ObjectTree, _arguments
from flashd.dbus.private_bus import PrivateBus
from flashd.dbus.wire import PROPERTIES
from flashd.errors import InvalidArgument, LimitExceeded

METHODS = sorted((interface, member) for interface, member in _arguments() if interface)
# A value of each type that is within all limits.
SMALL: dict[str, Any] = {
    "s": "x", "o": "/x", "b": True, "t": 1, "u": 1, "h": 0, "v": Variant("s", "x"), "as": [], "a{sh}": {}, "a{sv}": {},
}  # fmt: skip


def beyond(argument: Argument) -> list[Any]:
    """Values of an argument that are one beyond one of its limits, in each place where that can be."""
    found: list[Any] = []
    long = "x" * ((argument.max_length or 0) + 1)
    many = (argument.max_items or 0) + 1
    match argument.signature:
        case "s":
            found = [long]
        case "o":
            found = ["/" + long[1:]]
        case "u" | "t":
            assert argument.max_value is not None
            found = [argument.max_value + 1]
        case "as":
            found = [[long], ["x"] * many]
        case "a{sh}":
            found = [{long: 0}, {f"x{n}": 0 for n in range(many)}]
        case "v":
            assert argument.max_value is not None
            found = [Variant("s", long), Variant("as", ["x"] * many), Variant("t", argument.max_value + 1)]
        case "a{sv}":
            assert argument.max_value is not None
            number = Variant("t", argument.max_value + 1)
            found = [{long: Variant("s", "")}, {"x": Variant("s", long)}, {"x": Variant("as", [long])}, {"x": number}]
            found += [{"x": Variant("as", ["x"] * many)}, {f"x{n}": Variant("b", True) for n in range(many)}]
            found += [{"x": Variant("as", ["x"] * (many // 2)), "y": Variant("as", ["x"] * (many // 2))}]  # together
    return found


def limits(argument: Argument) -> set[str]:
    given = {"MaxLength": argument.max_length, "MaxItems": argument.max_items, "MaxValue": argument.max_value}
    return {name for name, limit in given.items() if limit is not None}


@pytest.mark.parametrize(("interface", "member"), METHODS)
def test_every_argument_has_the_limits_that_its_type_needs(interface: str, member: str) -> None:
    for argument in _arguments()[interface, member].arguments:
        needed = {"MaxLength"} if set(argument.signature) & set("sogv") else set()
        needed |= {"MaxItems"} if set(argument.signature) & set("av") else set()
        needed |= {"MaxValue"} if set(argument.signature) & set("nqiuxtdv") else set()
        assert limits(argument) == needed, f"{member}: {argument}"


def test_members_of_one_name_have_one_meaning_where_no_interface_is_named() -> None:
    by_member: dict[str, set[tuple[Argument, ...]]] = {}
    for (_, member), arguments in _arguments().items():
        by_member.setdefault(member, set()).add(arguments.arguments)
    assert [member for member, all_arguments in by_member.items() if len(all_arguments) > 1] == []


async def test_a_call_beyond_a_limit_is_refused_and_names_argument_and_limit(remote: Remote) -> None:
    tried = 0
    for interface, member in METHODS:
        arguments = _arguments()[interface, member]
        for index, argument in enumerate(arguments.arguments):
            for value in beyond(argument):
                values = [SMALL[other.signature] for other in arguments.arguments]
                values[index] = value
                fds = [0] if any("h" in other.signature for other in arguments.arguments) else []
                with pytest.raises(InvalidArgument) as caught:
                    await remote.call(member, arguments.signature, *values, interface=interface, fds=fds)
                said = caught.value.message
                assert f"argument {argument.name!r} of {member}" in said, said
                assert any(str(n) in said for n in (argument.max_length, argument.max_items, argument.max_value)), said
                tried += 1
    assert tried > 85
    assert await remote.call("ListModels")


async def test_what_is_at_its_limits_is_let_through(remote: Remote) -> None:
    with pytest.raises(Exception, match="there is no model 'xxx") as caught:
        await remote.call("FindModel", "s", "x" * 1024)
    assert "argument" not in str(caught.value)


async def test_a_large_message_passes_through_and_costs_nobody_anything(
    remote: Remote, daemon: Daemon, bus: PrivateBus
) -> None:
    """31 MB to FindModel took 22 seconds, in which nobody was answered, and 1.3 GB."""
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status")

    def peak_bytes() -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) << 10

    before = peak_bytes()
    large = text("a" * 31_000_000)
    raw = Raw(bus.address)
    manager = (wire.BUS_NAME, wire.ROOT_PATH, wire.MANAGER)
    bodies = [
        (("FindModel", "s"), large, "has a text of 31000000 bytes, but may have texts of at most"),
        (("Swap", "sa{sv}"), marshalled("sa{sv}", "x", {"x": Variant("s", "a" * 9_000_000)}), "'opt"),
        (("NoSuchMethod", "s"), large, "has no method"),
        (("Swap", "s"), large, "takes 'sa{sv}'"),
    ]
    for (member, signature), body, words in bodies:
        kind, said = await asyncio.to_thread(raw.call, *manager, member, signature, body=body)
        assert kind == 3 and words in error_text(said), error_text(said)
        assert await remote.call("ListModels")
    sig = "org.freedesktop.DBus.Properties"
    kind, said = await asyncio.to_thread(
        raw.call, wire.BUS_NAME, wire.ROOT_PATH, sig, "Get", "ss", body=marshalled("ss", "x" * 9_000_000, "y")
    )
    assert kind == 3 and "argument 'interface' of Get" in error_text(said)
    kind, said = await asyncio.to_thread(raw.call, wire.BUS_NAME, "/" + "a" * 9_000_000, wire.MANAGER, "ListModels")
    assert kind == 3 and len(said) < 10_000, "a path that long names nothing"
    for kind, flags in ((4, 0), (1, NO_REPLY)):  # a unicast signal, and a call without a reply
        await asyncio.to_thread(raw.send, raw.message(*manager, "FindModel", "s", large, kind=kind, flags=flags))
    assert await remote.call("ListModels")
    assert peak_bytes() - before < 64 << 20
    raw.close()


async def test_descriptors_of_what_is_not_served_are_closed(remote: Remote, daemon: Daemon, tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    fd = os.open(sent, os.O_RDWR | os.O_CREAT)
    for _ in range(5):
        await remote.call("Ping", interface="org.freedesktop.DBus.Peer", fds=[fd] * 16)
        await remote.call("GetAll", "s", wire.MANAGER, interface=PROPERTIES, fds=[fd] * 16)
        for member, signature, *body in (("NoSuchMethod", "h", 0), ("FindModel", "s", "x" * 5000)):
            with pytest.raises(InvalidArgument):
                await remote.call(member, signature, *body, fds=[fd] * 16)
    os.close(fd)
    await eventually(lambda: not daemon.open_files()[str(sent)])


async def test_a_peer_says_that_it_is_there_and_where(remote: Remote) -> None:
    peer = "org.freedesktop.DBus.Peer"
    assert await remote.call("Ping", interface=peer) == ()
    (machine,) = await remote.call("GetMachineId", interface=peer)
    assert isinstance(machine, str)


async def test_those_who_ask_too_much_at_once_wait_and_others_do_not(
    remote: Remote, daemon: Daemon, bus: PrivateBus
) -> None:
    """A flood of one connection is answered one call at a time, in turn with the others'."""
    raw = Raw(bus.address)
    asks = (wire.BUS_NAME, wire.ROOT_PATH, PROPERTIES, "GetAll", "s", text(wire.MANAGER))
    await asyncio.to_thread(raw.send, b"".join(raw.message(*asks) for _ in range(6_000)))
    answered = 0

    def read() -> list[int]:
        nonlocal answered
        kinds = []
        for kind, _ in raw.answers(6_000):
            kinds.append(kind)
            answered += 1
        return kinds

    reading = asyncio.create_task(asyncio.to_thread(read))
    await remote.call("ListModels")
    assert answered < 5_000, "it had its turn, and did not wait for all of them"
    assert (await reading).count(2) >= MOST_READING
    raw.close()


def test_how_many_calls_of_a_user_wait_is_bounded() -> None:
    class Serving:
        def serve(self, *_: object) -> None: ...

    async def nobody(*_: object) -> Any: ...

    asked: list[tuple[str, int, int]] = []
    connection: Any = Serving()
    tree = ObjectTree(
        connection, identify=nobody, authorize=nobody, known=lambda peer: Caller(peer, 1000),
        check_calls=lambda caller, of_peer, of_user: asked.append((caller.peer, of_peer, of_user)),
    )  # fmt: skip
    assert tree.group(":1.1") == tree.group(":1.2") == 1000
    reading = messages.Head(messages.CALL, 0, 1, "<", 0, interface=PROPERTIES, member="Get", sender=":1.1")
    tree.check_room(reading, 1, MOST_READING - 1)
    with pytest.raises(LimitExceeded):
        tree.check_room(reading, 1, MOST_READING)
    tree.check_room(messages.Head(messages.CALL, 0, 1, "<", 0, interface=wire.MANAGER, sender=":1.1"), 3, 4)
    assert asked == [(":1.1", 3, 4)]


async def test_a_connection_that_stores_much_with_us_is_refused_more(remote: Remote, bus: PrivateBus) -> None:
    layout = "x" * 8_000_000
    calls = [
        remote.call("PublishImage", "ssshsta{sv}", "m", "b", "cuda:0", 0, layout, 1, {}, fds=[0]) for _ in range(6)
    ]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, Exception) for outcome in outcomes)
    assert await remote.call("ListModels")
    assert not [o for o in outcomes if "there is no model" not in str(o) and not isinstance(o, LimitExceeded)]


def test_bodies_that_are_no_values_are_refused() -> None:
    head = messages.Head(messages.CALL, 0, 1, "<", 8, signature="as")
    arguments = Arguments("M", [Argument("a", "as", 10, 10)])
    for body in (
        b"\xff\xff\xff\x7f\0\0\0\0",
        b"\4\0\0\0\xff\xff\xff\x7f",
        b"\6\0\0\0\1\0\0\0",
        b"\6\0\0\0\1\0\0\0\xff\0",
    ):
        head.body_bytes = len(body)
        with pytest.raises(InvalidArgument):
            arguments.decode(head, body, ())
    with pytest.raises(InvalidArgument, match="announced but not sent"):
        head.body_bytes = 4
        Arguments("M", [Argument("a", "h")]).decode(head, b"\1\0\0\0", (3,))


def test_all_types_are_read_as_they_were_written() -> None:
    signature = "ybnqiuxtdsogasa{sv}(si)v"
    values = [1, True, -2, 3, -4, 5, -6, 7, 0.5, "é", "/o", "as", ["a", "b"], {"k": Variant("as", ["v"])}, ["s", 9],
              Variant("x", -1)]  # fmt: skip
    body = marshalled(signature, *values)
    names = ["y", "b", "n", "q", "i", "u", "x", "t", "d", "s", "o", "g", "as", "a{sv}", "(si)", "v"]
    arguments = Arguments("M", [Argument(str(n), name) for n, name in enumerate(names)])
    head = messages.Head(messages.CALL, 0, 1, "<", len(body), signature=signature)
    assert list(arguments.decode(head, body, ())) == values


def test_the_shipped_xml_says_what_is_enforced() -> None:
    for interface in wire.INTERFACES:
        for method in ElementTree.fromstring(wire.interface_xml(interface)).iter("method"):
            for arg in method.findall("arg"):
                said = {a.get("name", "").removeprefix("org.flashd1.") for a in arg.findall("annotation")}
                assert (arg.get("direction") == "in") or not said & {"MaxLength", "MaxItems", "MaxValue"}
