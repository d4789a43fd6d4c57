# SPDX-License-Identifier: Apache-2.0
"""The defects of dbus-next, each closed: shown on a real bus, between real connections."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

import pytest

from flashd import wire
from flashd.bus import Connection, Received, Reply, connect
from flashd.daemon.exports import Caller, Exported, ObjectTree
from flashd.errors import Busy, FlashdError, Internal, InvalidArgument, NotFound, Unavailable
from flashd.private_bus import PrivateBus

NAME = "org.flashd1.Test"


class Service:
    """What each test calls, by the member's name."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.received: list[Received] = []
        self.raises: FlashdError = Busy("")

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
    await asyncio.wait_for(complete.wait(), 60)
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
        assert heard.wait(5)  # and our event loop stands still
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
        await asyncio.sleep(0.05)
        assert descriptors() == before


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


async def test_nobody_there_is_unavailable(connection: Connection) -> None:
    with pytest.raises(Unavailable, match="not running"):
        await connection.call("org.flashd1", "/", "org.flashd1.Manager", "Park")


class Job(Exported):
    interface = wire.JOB

    def __init__(self, number: int) -> None:
        super().__init__(wire.job_path(number))
        self.done_bytes = 0

    def properties(self) -> dict[str, object]:
        return {
            "Kind": "import", "Subject": "x", "State": "running", "Phase": "", "DoneBytes": self.done_bytes,
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
    await asyncio.wait_for(finished.wait(), 10)
    assert told == [
        (second.path, "PropertiesChanged"),
        (first.path, "PropertiesChanged"),
        (second.path, "Finished"),
    ]
