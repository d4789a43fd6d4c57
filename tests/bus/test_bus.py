# SPDX-License-Identifier: Apache-2.0
"""Workarounds for the defects of dbus-next, between real connections on a real bus."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

import pytest
from waiting import PATIENCE_S, eventually

from flashd.dbus import private_bus, wire
from flashd.dbus.connection import Connection, Received, Reply, connect, plain
from flashd.dbus.object_tree import Caller, Exported, ObjectTree
from flashd.dbus.private_bus import PrivateBus
from flashd.dbus.wire import OBJECT_MANAGER, PROPERTIES
from flashd.errors import Busy, FlashdError, Internal, InvalidArgument, LimitExceeded, NotFound, Unavailable

NAME = "org.flashd1.Test"


class Service:
    """What each test calls, by the member's name."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.received: list[Received] = []
        self.raises: FlashdError = Busy("")
        self.says: object = ""

    async def answer(self, call: Received) -> Reply:
        match call.member:
            case "Sender":
                await asyncio.sleep(0.001 * (len(call.sender) % 3))
                return Reply("s", (call.sender,))
            case "Defect":
                raise ZeroDivisionError("secret detail")
            case "Raise":
                raise self.raises
            case "Refuse":
                raise Busy("not now", hint="try later")
            case "TakeFds":
                assert not any(os.get_inheritable(fd) for fd in call.fds)
                return Reply("u", (len(call.fds),))
            case "Say":
                return Reply("s", (self.says,))
            case "GiveFd":
                return Reply("h", (0,), (os.open("/dev/null", os.O_RDONLY),))
            case "Wait":
                await asyncio.sleep(3600)
        raise NotFound(call.member)


@pytest.fixture
async def service(bus: PrivateBus) -> AsyncIterator[Service]:
    connection = await connect(bus.address)
    made = Service(connection)
    connection.serve(made.answer)
    await connection.own(NAME)
    yield made
    await connection.close()


async def ask(
    connection: Connection, member: str, signature: str = "", *body: object, fds: tuple[int, ...] = ()
) -> Received:
    return await connection.call(NAME, "/", "org.flashd1.Test", member, signature, body, fds=fds)


async def test_a_flood_of_20_000_signals_arrives_whole_and_in_order(service: Service, connection: Connection) -> None:
    got: list[int] = []
    complete = asyncio.Event()

    def listen(signal: Received) -> None:
        if signal.member == "Tick":
            got.append(signal.body[0])
            if len(got) == 20_000:
                complete.set()

    connection.listen(listen)
    await connection.add_match("type='signal',interface='org.flashd1.Test'")
    for number in range(20_000):  # in one tick of the loop: the socket's buffer holds a few hundred
        service.connection.emit("/x", "org.flashd1.Test", "Tick", "us", [number, "x" * 200])
    assert (await ask(connection, "Sender")).body == (connection.unique_name,)
    await asyncio.wait_for(complete.wait(), PATIENCE_S)
    assert got == list(range(20_000))


async def test_what_is_told_does_not_wait_for_the_event_loop(service: Service, bus: PrivateBus) -> None:
    """Whoever waits for a swap of milliseconds hears of its end before the daemon does what else there is to do."""
    ready, heard = threading.Event(), threading.Event()

    async def listen() -> None:
        other = await connect(bus.address)
        other.listen(lambda signal: heard.set() if signal.member == "Tick" else None)
        await other.add_match("type='signal',interface='org.flashd1.Test'")
        ready.set()
        await asyncio.to_thread(heard.wait, 10)
        await other.close()

    listener = threading.Thread(target=lambda: asyncio.run(listen()))
    listener.start()
    try:
        assert await asyncio.to_thread(ready.wait, 10)
        service.connection.emit("/x", "org.flashd1.Test", "Tick", "u", [1])
        assert heard.wait(PATIENCE_S)  # and our event loop stands still
    finally:
        heard.set()
        await asyncio.to_thread(listener.join)


async def test_senders_stay_apart_in_400_interleaved_calls(service: Service, bus: PrivateBus) -> None:
    callers = [await connect(bus.address) for _ in range(20)]
    try:
        replies = await asyncio.gather(*(ask(caller, "Sender") for _ in range(20) for caller in callers))
        wanted = [caller.unique_name for _ in range(20) for caller in callers]
        assert [reply.body[0] for reply in replies] == wanted
    finally:
        for caller in callers:
            await caller.close()


async def test_a_defect_is_internal_and_its_traceback_stays_here(
    service: Service, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(Internal) as caught:
        await ask(connection, "Defect")
    assert "Traceback" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "secret detail" in caplog.text


async def test_errors_arrive_with_their_class_message_and_hint(service: Service, connection: Connection) -> None:
    with pytest.raises(Busy) as caught:
        await ask(connection, "Refuse")
    assert (caught.value.message, caught.value.hint) == ("not now", "try later")


def null() -> IO[str]:
    return Path("/dev/null").open()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


UNSENDABLE = {"not UTF-8": os.fsdecode(b"bad\xff"), "NUL": "a\0b", "a lone surrogate": "\ud800", "a number": 1}


@pytest.mark.parametrize("value", UNSENDABLE.values(), ids=UNSENDABLE)
async def test_a_reply_that_cannot_be_sent_is_an_error_to_its_caller_alone(
    service: Service, bus: PrivateBus, connection: Connection, value: object
) -> None:
    other = await connect(bus.address)
    try:
        service.says = value
        with pytest.raises(Internal):
            await asyncio.wait_for(ask(connection, "Say"), 10)
        service.says = "well"
        assert (await ask(other, "Say")).body == ("well",)
        assert (await ask(connection, "Say")).body == ("well",)
    finally:
        await other.close()


async def test_what_is_larger_than_the_bus_takes_is_an_error_and_ends_no_connection(
    service: Service, connection: Connection
) -> None:
    service.says = "x" * (33 << 20)
    with pytest.raises(LimitExceeded, match="too large for the bus"):
        await ask(connection, "Say")
    service.connection.emit("/x", "org.flashd1.Test", "Tick", "s", [service.says])
    with pytest.raises(LimitExceeded, match="too large for the bus"):
        await ask(connection, "Say", "s", service.says)
    service.says = "x" * (31 << 20)
    assert (await ask(connection, "Say")).body == (service.says,)


@pytest.mark.parametrize("value", UNSENDABLE.values(), ids=UNSENDABLE)
async def test_a_call_that_cannot_be_sent_is_an_error_in_words(
    service: Service, connection: Connection, value: object
) -> None:
    with pytest.raises(InvalidArgument, match="Say cannot be called with this"):
        await ask(connection, "Say", "s", value)


@pytest.mark.parametrize("value", UNSENDABLE.values(), ids=UNSENDABLE)
async def test_a_signal_that_cannot_be_sent_is_dropped_and_logged_once(
    service: Service, connection: Connection, caplog: pytest.LogCaptureFixture, value: object
) -> None:
    heard: asyncio.Queue[Received] = asyncio.Queue()
    connection.listen(lambda signal: heard.put_nowait(signal) if signal.member == "Tick" else None)
    await connection.add_match("type='signal',interface='org.flashd1.Test'")
    for said in (value, value, "well"):
        service.connection.emit("/x", "org.flashd1.Test", "Tick", "s", [said])
    assert (await asyncio.wait_for(heard.get(), 10)).body == ("well",)
    assert caplog.text.count("the signal Tick of /x cannot be sent") == 1


async def test_100_calls_with_descriptors_leak_none(service: Service, connection: Connection) -> None:
    with null() as file:
        fds = (file.fileno(),) * 3
        await ask(connection, "TakeFds", "ah", [0, 1, 2], fds=fds)
        (await ask(connection, "GiveFd")).close_fds()
        gc.collect()
        before = descriptors()
        for _ in range(100):
            assert (await ask(connection, "TakeFds", "ah", [0, 1, 2], fds=fds)).body == (3,)
            (await ask(connection, "GiveFd")).close_fds()
            with pytest.raises(Busy):
                await ask(connection, "Refuse", "ah", [0, 1, 2], fds=fds)
        await eventually(lambda: descriptors() == before)


async def test_descriptors_are_not_inherited_by_programs(service: Service, connection: Connection) -> None:
    with null() as file:
        await ask(connection, "TakeFds", "ah", [0], fds=(file.fileno(),))  # asserted there
    given = await ask(connection, "GiveFd")
    assert not os.get_inheritable(given.fds[0])
    given.close_fds()


async def test_a_descriptor_that_was_announced_and_not_sent_is_refused(
    service: Service, connection: Connection
) -> None:
    with null() as file, pytest.raises(InvalidArgument):
        await ask(connection, "TakeFds", "ah", [0, 7], fds=(file.fileno(),))


async def test_closing_answers_the_calls_under_way(service: Service, connection: Connection) -> None:
    waiting = asyncio.create_task(ask(connection, "Wait"))
    await ask(connection, "Sender")
    await service.connection.close()
    with pytest.raises(FlashdError) as caught:
        await waiting
    assert type(caught.value).__name__ == "Cancelled"


@pytest.mark.skipif(shutil.which("gdbus") is None, reason="needs gdbus: apt install libglib2.0-bin")
async def test_programs_on_glib_show_what_happened_and_what_to_do(bus: PrivateBus, service: Service) -> None:
    call = ("gdbus", "call", "--address", bus.address, "-d", NAME, "-o", "/", "-m", f"{NAME}.Refuse")
    shown = await asyncio.create_subprocess_exec(*call, stderr=subprocess.PIPE)
    _, words = await shown.communicate()
    assert shown.returncode == 1
    assert "org.flashd1.Error.Busy: not now\ntry later" in words.decode()


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [
        (Busy("not now", hint="try later\nor earlier"), Busy("not now", hint="try later\nor earlier")),
        (Busy("two\nlines"), Busy("two lines")),
        (Busy("", hint="only a hint"), Busy("only a hint")),
    ],
    ids=["hint of two lines", "message of two lines", "no message"],
)
async def test_message_and_hint_arrive_apart(
    service: Service, connection: Connection, raised: Busy, arrives: Busy
) -> None:
    service.raises = raised
    with pytest.raises(Busy) as caught:
        await connection.call(NAME, "/", NAME, "Raise")
    assert (caught.value.message, caught.value.hint) == (arrives.message, arrives.hint)


async def test_no_bus_is_unavailable(short_path: Path) -> None:
    with pytest.raises(Unavailable):
        await connect(f"unix:path={short_path}/nothing")
    with pytest.raises(Unavailable):
        await connect("nonsense")


async def test_a_bus_that_ends_under_a_question_is_an_error_and_no_wait(short_path: Path) -> None:
    with PrivateBus(short_path) as bus:
        made = await connect(bus.address)
    with pytest.raises((EOFError, ConnectionError)):
        await asyncio.wait_for(made.own(NAME), 10)
    await made.close()


async def test_a_service_that_ends_before_it_answers_is_unavailable(bus: PrivateBus, connection: Connection) -> None:
    """It was called a defect of flashd's."""
    other = await connect(bus.address)
    asked = asyncio.Event()

    async def leave(_: Received) -> Reply:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    other.serve(leave)
    await other.own(NAME)
    answer = asyncio.create_task(ask(connection, "Wait"))
    await asked.wait()
    other._bus._sock.shutdown(socket.SHUT_RDWR)  # like a killed process: closing would answer
    with pytest.raises(Unavailable, match="ended before it answered"):
        await answer
    await other.close()


async def test_nobody_there_is_unavailable(connection: Connection) -> None:
    with pytest.raises(Unavailable, match="not running"):
        await connection.call("org.flashd1", "/", "org.flashd1.Manager", "Park")


class Job(Exported):
    interface = wire.JOB

    def __init__(self, number: int, *, broken: bool = False) -> None:
        super().__init__(wire.job_path(number))
        self.done_bytes = 0
        self.phase: object = ""
        self.broken = broken

    def properties(self) -> dict[str, object]:
        if self.broken:
            raise ZeroDivisionError
        return {
            "Kind": "import", "Subject": "x", "State": "running", "Phase": self.phase, "DoneBytes": self.done_bytes,
            "TotalBytes": 9, "CreatedAt": 0.0, "FinishedAt": 0.0, "Result": {}, "Error": ["", "", ""],
        }  # fmt: skip

    async def cancel(self, caller: Caller) -> None: ...


@pytest.fixture
async def tree(service: Service) -> ObjectTree:
    async def identify(peer: str) -> Caller:
        return Caller(peer, os.getuid())

    async def authorize(caller: Caller, interface: str, member: str) -> None: ...

    made = ObjectTree(service.connection, identify=identify, authorize=authorize)
    made.add(Job(1), announce=False)
    return made


GIO = """
import gi, json, sys
gi.require_version("Gio", "2.0")
from gi.repository import Gio, GLib
address, name, root = sys.argv[1:]
flags = Gio.DBusConnectionFlags.AUTHENTICATION_CLIENT | Gio.DBusConnectionFlags.MESSAGE_BUS_CONNECTION
bus = Gio.DBusConnection.new_for_address_sync(address, flags, None, None)
new, flags = Gio.DBusObjectManagerClient.new_sync, Gio.DBusObjectManagerClientFlags.DO_NOT_AUTO_START
client = new(bus, flags, name, root, None, None, None)
def say(*words): print(json.dumps(words), flush=True)
say("there", sorted(o.get_object_path() for o in client.get_objects()))
def changed(client, object, proxy, values, invalidated): say("changed", object.get_object_path(), values.unpack())
client.connect("object-added", lambda c, o: say("added", o.get_object_path()))
client.connect("object-removed", lambda c, o: say("removed", o.get_object_path()))
client.connect("interface-proxy-properties-changed", changed)
GLib.MainLoop().run()
"""


async def test_gio_sees_objects_come_change_and_go(bus: PrivateBus, tree: ObjectTree) -> None:
    arguments = ["/usr/bin/python3", "-c", GIO, bus.address, NAME, wire.ROOT_PATH]
    gio = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE)
    assert gio.stdout is not None

    async def said() -> list[object]:
        return list(json.loads(await asyncio.wait_for(gio.stdout.readline(), 10)))

    try:
        assert await said() == ["there", [wire.job_path(1)]]
        second = Job(2)
        tree.add(second)
        assert await said() == ["added", wire.job_path(2)]
        for done_bytes in range(1, 6):
            second.done_bytes = done_bytes
            tree.changed(second.path)
        assert await said() == ["changed", wire.job_path(2), {"DoneBytes": 5}]  # five changes, one signal
        tree.remove(wire.job_path(1))
        assert await said() == ["removed", wire.job_path(1)]
    finally:
        gio.kill()
        await gio.wait()


async def managed(connection: Connection) -> dict[str, dict[str, object]]:
    reply = await connection.call(NAME, wire.ROOT_PATH, OBJECT_MANAGER, "GetManagedObjects")
    return {path: interfaces[wire.JOB] for path, interfaces in plain(reply.body[0]).items()}


@pytest.mark.parametrize("value", UNSENDABLE.values(), ids=UNSENDABLE)
async def test_a_bad_property_takes_nothing_else_along(
    tree: ObjectTree, connection: Connection, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    changed: asyncio.Queue[Received] = asyncio.Queue()
    connection.listen(lambda s: changed.put_nowait(s) if s.member == "PropertiesChanged" else None)
    await connection.add_match(f"type='signal',sender='{NAME}'")
    bad = Job(2)
    bad.phase = value
    tree.add(bad)
    listed = await managed(connection)
    assert listed[wire.job_path(1)]["Phase"] == ""
    assert "Phase" not in listed[bad.path] and listed[bad.path]["Kind"] == "import"
    reply = await connection.call(NAME, bad.path, PROPERTIES, "GetAll", "s", [wire.JOB])
    assert plain(reply.body[0]) == listed[bad.path]
    bad.phase, bad.done_bytes = f"{value}\0", 5
    tree.changed(bad.path)
    assert plain((await asyncio.wait_for(changed.get(), 10)).body[1]) == {"DoneBytes": 5}
    bad.phase = "fine"
    tree.changed(bad.path)
    assert plain((await asyncio.wait_for(changed.get(), 10)).body[1]) == {"Phase": "fine"}
    assert (await managed(connection))[bad.path]["Phase"] == "fine"
    assert caplog.text.count(f"Phase of {bad.path} cannot be sent") == 1


async def test_an_object_with_a_defect_takes_no_other_along(tree: ObjectTree, connection: Connection) -> None:
    bad, good = Job(2), Job(3)
    tree.add(bad)
    tree.add(good)
    bad.broken = True
    good.done_bytes = 7
    tree.changed(bad.path)
    tree.changed(good.path)
    tree.flush()
    assert sorted(await managed(connection)) == [wire.job_path(1), good.path]
    assert tree.last_sent(good.path)["DoneBytes"] == 7
    with pytest.raises(ZeroDivisionError):
        tree.add(Job(4, broken=True))
    assert tree.get(wire.job_path(4)) is None


async def test_what_a_signal_is_about_is_told_first_and_the_signal_last(
    tree: ObjectTree, connection: Connection
) -> None:
    """Whoever waits for one job is not kept waiting by what is told of other objects."""
    told: list[tuple[str, str]] = []
    finished = asyncio.Event()

    def listen(signal: Received) -> None:
        if signal.path.startswith(wire.job_path(1)[:-1]):
            told.append((signal.path, signal.member))
            if signal.member == "Finished":
                finished.set()

    connection.listen(listen)
    await connection.add_match(f"type='signal',sender='{NAME}'")
    first, second = Job(2), Job(3)
    for job in (first, second):
        tree.add(job)
        job.done_bytes = 1
        tree.changed(job.path)
    tree.signal(second, "Finished", "done", {}, ["", "", ""])
    await asyncio.wait_for(finished.wait(), PATIENCE_S)
    assert told == [
        (second.path, "PropertiesChanged"),
        (first.path, "PropertiesChanged"),
        (second.path, "Finished"),
    ]


async def test_the_first_of_several_servers_that_answers_is_taken(bus: PrivateBus, short_path: Path) -> None:
    plain = f"unix:path={short_path}/bus"
    with socket.socket(socket.AF_UNIX) as hangs_up:
        hangs_up.bind(f"{short_path}/hangs-up")
        hangs_up.listen()

        def hang_up() -> None:
            hangs_up.accept()[0].close()

        asyncio.get_running_loop().add_reader(hangs_up, hang_up)
        dead = f"unix:path={short_path}/nobody;autolaunch:;unix:path={short_path}/hangs-up;{plain},guid={'1' * 32}"
        connection = await connect(f"{dead};{plain}")
        await connection.close()
        with pytest.raises(Unavailable) as refused:
            await connect(dead)
        asyncio.get_running_loop().remove_reader(hangs_up)
    for said in (f"{short_path}/nobody: ", "autolaunch:: ", f"{short_path}/hangs-up: ", f"its GUID is not {'1' * 32}"):
        assert said in refused.value.message


async def test_an_address_may_be_escaped(bus: PrivateBus, short_path: Path) -> None:
    (short_path / "a b,c").symlink_to(short_path)
    connection = await connect(f"unix:path={short_path}/a%20b%2cc/bus")
    await connection.close()


def test_a_private_bus_may_lie_anywhere(short_path: Path) -> None:
    folder = short_path / "a b,c;d%é"
    folder.mkdir()
    with PrivateBus(folder) as running:
        found = private_bus.found(folder)
        assert found is not None and found.pid == running.pid

        async def connected() -> None:
            for address in (running.address, found.address):
                await (await connect(address)).close()

        asyncio.run(connected())
    assert private_bus.found(folder) is None and list(folder.iterdir()) == []
