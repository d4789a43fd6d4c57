# SPDX-License-Identifier: Apache-2.0
"""The blocking connection to a bus, and values as it writes and reads them."""

from __future__ import annotations

import asyncio
import queue
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dbus_next
import pytest
from dbus_next._private.marshaller import Marshaller
from waiting import PATIENCE_S

from flashd import errors
from flashd.dbus import blocking, values
from flashd.dbus.blocking import BlockingConnection, Signal
from flashd.dbus.connection import Received, Reply
from flashd.dbus.connection import connect as connect_service
from flashd.dbus.private_bus import PrivateBus
from flashd.dbus.wire import DBUS, DBUS_PATH

NAME = "org.flashd1.Test"
BUS = (DBUS, DBUS_PATH, DBUS)
V = values.Variant


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[PrivateBus]:
    with PrivateBus(tmp_path) as running:
        yield running


@pytest.fixture
def connection(bus: PrivateBus) -> Iterator[BlockingConnection]:
    made = blocking.connect(bus.address)
    yield made
    made.close()


VALUES: list[tuple[str, list[Any]]] = [
    ("", []),
    ("ybnqiuxtd", [255, True, -2, 3, -4, 5, -6, 7, 0.5]),
    ("sog", ["häuser", "/a/b", "a{sv}"]),
    ("asaias", [["", "b"], [], ["c"]]),
    ("a{sa{sv}}", [{"a": {"b": ("x", 1), "c": ("as", ["d"])}, "e": {}}]),
    ("(ysa(dt))v", [[1, "a", [[0.25, 2], [1.0, 3]]], ("(yv)", [7, ("b", False)])]),
    ("yayx", [1, b"abc", -1]),
]


def dressed(value: Any, variant: Any) -> Any:
    """The value with its pairs of a signature and a value as this library's variants."""
    if isinstance(value, tuple):
        return variant(value[0], dressed(value[1], variant))
    if isinstance(value, dict):
        return {key: dressed(item, variant) for key, item in value.items()}
    return [dressed(item, variant) for item in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return plain(value[1])
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | bytes) else value


@pytest.mark.parametrize(("signature", "given"), VALUES, ids=[signature or "nothing" for signature, _ in VALUES])
def test_values_are_written_as_by_another_implementation_and_read_back(signature: str, given: list[Any]) -> None:
    written = values.encoded(signature, dressed(given, V))
    assert written == bytes(Marshaller(signature, dressed(given, dbus_next.Variant)).marshall())
    assert values.decoded(signature, "<", written) == tuple(plain(given))


@pytest.mark.parametrize(
    ("signature", "given"),
    [("s", [1]), ("s", ["a\0b"]), ("b", [1]), ("u", [-1]), ("as", ["ab"]), ("v", ["a"]), ("ss", ["a"]), ("z", [1])],
)
def test_what_has_no_form_is_refused(connection: BlockingConnection, signature: str, given: list[Any]) -> None:
    with pytest.raises(errors.InvalidArgument, match="GetId cannot be called with this"):
        connection.call(*BUS, "GetId", signature, given)
    assert connection.call(*BUS, "GetId")


@pytest.mark.parametrize("signature", ["(", "a", "{s}", "a{s}", "a" * 200 + "s", "é"])
def test_signatures_that_are_none(signature: str) -> None:
    with pytest.raises(ValueError, match="signature"):
        values.types(signature)


@pytest.mark.parametrize("body", [b"", b"\x05\0\0\0a", b"\xff\xff\xff\xffa\0", b"\x01\0\0\0\xff\0"])
def test_bodies_that_are_cut_or_no_text(body: bytes) -> None:
    with pytest.raises((ValueError, IndexError, struct.error)):
        values.decoded("s", "<", body)


def test_answers_errors_and_signals(bus: PrivateBus, connection: BlockingConnection) -> None:
    heard: queue.SimpleQueue[Signal] = queue.SimpleQueue()
    connection.listen(heard.put, lambda: None)
    connection.add_match(f"type='signal',sender='{DBUS}',member='NameOwnerChanged'")
    with pytest.raises(errors.InvalidArgument, match="NoSuch"):
        connection.call(*BUS, "NoSuch")
    with pytest.raises(errors.Unavailable, match="not running"):
        connection.call(NAME, "/", NAME, "Anything")
    with pytest.raises(errors.LimitExceeded, match="too large for the bus"):
        connection.call(*BUS, "NameHasOwner", "s", ["a" * (33 << 20)])
    (before,) = connection.call(*BUS, "ListNames")
    other = blocking.connect(bus.address)
    (names,) = connection.call(*BUS, "ListNames")
    (name,) = set(names) - set(before)
    _await(heard, [name, "", name])
    other.close()
    other.close()
    assert other.has_ended and not connection.has_ended
    _await(heard, [name, name, ""])
    with pytest.raises(errors.Unavailable, match="lost"):
        other.call(*BUS, "GetId")


def _await(heard: queue.SimpleQueue[Signal], body: list[Any]) -> None:
    """Returns when a signal with this body was heard; the bus tells of what came before the test, too."""
    while list(heard.get(timeout=PATIENCE_S).body) != body:
        pass


def test_many_threads_call_at_once(connection: BlockingConnection) -> None:
    wrong = []

    def ask(name: str) -> None:
        for _ in range(50):
            if connection.call(*BUS, "NameHasOwner", "s", [name]) != (name == DBUS,):
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in (DBUS, NAME) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not wrong


async def test_an_answer_that_does_not_come_and_a_bus_that_goes(bus: PrivateBus) -> None:
    service = await connect_service(bus.address)
    asked = asyncio.Event()

    async def never(_call: Received) -> Reply:
        asked.set()
        await asyncio.sleep(PATIENCE_S)
        return Reply()

    service.serve(never)
    await service.own(NAME)
    connection = await asyncio.to_thread(blocking.connect, bus.address)
    ended = threading.Event()
    connection.listen(lambda signal: None, ended.set)
    with pytest.raises(errors.Unavailable, match=r"did not answer in 0.1 s"):
        await asyncio.to_thread(connection.call, NAME, "/", NAME, "Never", timeout_s=0.1)
    asked.clear()
    waiting = asyncio.create_task(asyncio.to_thread(connection.call, NAME, "/", NAME, "Never"))
    await asked.wait()
    bus.stop()
    with pytest.raises(errors.Unavailable, match="has closed it"):
        await waiting
    assert ended.wait(PATIENCE_S) and connection.has_ended
    connection.close()
    await service.close()


async def test_a_program_that_serves_nothing_says_so(bus: PrivateBus, connection: BlockingConnection) -> None:
    (names,) = await asyncio.to_thread(connection.call, *BUS, "ListNames")
    asking = await connect_service(bus.address)
    for name in set(names) - {DBUS}:
        with pytest.raises(errors.InvalidArgument, match="serves nothing"):
            await asking.call(name, "/", "org.freedesktop.DBus.Peer", "Ping", timeout_s=PATIENCE_S)
    await asking.close()


def test_places_where_no_bus_is(tmp_path: Path) -> None:
    with pytest.raises(errors.Unavailable, match="No such file"):
        blocking.connect(f"unix:path={tmp_path}/none")
    with pytest.raises(errors.Unavailable, match="not a Unix socket"):
        blocking.connect("tcp:host=localhost")
