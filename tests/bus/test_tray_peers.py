# SPDX-License-Identifier: Apache-2.0
"""The tray and its peers on a bus, without a desktop: a daemon, a second tray, a notification daemon."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from dbus_next import Variant
from flashd_tray.actions import Actions
from flashd_tray.desktop_bus import APPLICATION, NAME, NOTIFICATIONS, NOTIFICATIONS_PATH, PATH, DesktopBus
from flashd_tray.menu import Action, Verb
from flashd_tray.preferences import Preferences, PreferencesFile, Topic
from flashd_tray.snapshot import JobView, Snapshot, State
from flashd_tray.watcher import Watcher
from flashd_tray.words import Words
from waiting import eventually

import flashd.client.client
from flashd.client.client import Client
from flashd.dbus import wire
from flashd.dbus.connection import Connection, Received, Reply, connect, plain
from flashd.dbus.private_bus import PrivateBus
from flashd.dbus.wire import OBJECT_MANAGER, PROPERTIES
from flashd.errors import Busy, FlashdError, NotAuthorized

ADA, BOB, JOB = wire.model_path("ada"), wire.model_path("bob"), wire.job_path(7)


@dataclass(slots=True)
class FakeDaemon:
    """flashd as a peer sees it: it shows what a test puts here, and notes what it is asked to change."""

    connection: Connection
    active: str = "/"
    models: dict[str, dict[str, Any]] = field(default_factory=lambda: {ADA: model("ada"), BOB: model("bob")})
    job: dict[str, Variant] = field(default_factory=lambda: job("swap", "bob", "running"))
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    refusal: FlashdError | None = None

    async def answer(self, call: Received) -> Reply:
        match call.interface, call.member:
            case str(i), "GetAll" if i == PROPERTIES:
                return Reply("a{sv}", (self.job if call.body[0] == wire.JOB else self.manager(),))
            case str(i), "GetManagedObjects" if i == OBJECT_MANAGER:
                return Reply("a{oa{sa{sv}}}", ({JOB: {wire.JOB: self.job}},))
            case _, "ListModels":
                return Reply("s", (json.dumps(self.models),))
            case _, "FindModel":
                return Reply("o", (wire.model_path(call.body[0]),))
        if self.refusal is not None:
            raise self.refusal
        self.asked.append((call.member, call.path if call.path != wire.ROOT_PATH else "", *plain(call.body)))
        return Reply("o", (JOB,)) if call.member in {"Swap", "Park"} else Reply()

    def manager(self) -> dict[str, Variant]:
        return {
            "Version": Variant("s", "1.0"), "State": Variant("s", "ready"), "ActiveModel": Variant("o", self.active),
            "Endpoint": Variant("s", "/run/openai.sock"), "ModelsDirectories": Variant("as", ["/home/eve/models"]),
            "StorePath": Variant("s", ""), "StoreBytes": Variant("t", 0), "StoreQuotaBytes": Variant("t", 0),
            "StoreFreeBytes": Variant("t", 0), "InboxItems": Variant("a(sss)", []),
        }  # fmt: skip

    def tell(self, path: str, interface: str, **changed: Variant) -> None:
        self.connection.emit(path, PROPERTIES, "PropertiesChanged", "sa{sv}as", [interface, changed, []])


def model(name: str, residency: str = "stored") -> dict[str, Any]:
    return {
        "Name": name, "Aliases": [], "Checkpoint": "", "Architecture": "", "DType": "BF16", "SizeBytes": 1,
        "TensorCount": 1, "Residency": residency, "Devices": [], "Active": False, "Pinned": False, "Leases": 0,
        "CreatedAt": 0, "LastUsedAt": 0, "UseCount": 0, "Source": "",
    }  # fmt: skip


def job(kind: str, subject: str, state: str) -> dict[str, Variant]:
    return {
        "Kind": Variant("s", kind), "Subject": Variant("s", subject), "State": Variant("s", state),
        "Phase": Variant("s", ""), "DoneBytes": Variant("t", 0), "TotalBytes": Variant("t", 0),
        "CreatedAt": Variant("d", 1.0), "FinishedAt": Variant("d", 0.0), "Result": Variant("a{sv}", {}),
        "Error": Variant("(sss)", ["", "", ""]),
    }  # fmt: skip


async def appear(bus: PrivateBus) -> FakeDaemon:
    peer = FakeDaemon(await connect(bus.address))
    peer.connection.serve(peer.answer)
    await peer.connection.own(wire.BUS_NAME)
    return peer


@pytest.fixture
async def peer(bus: PrivateBus) -> AsyncIterator[FakeDaemon]:
    made = await appear(bus)
    yield made
    await made.connection.close()


# -- the daemon: what is seen of it ----------------------------------------------------------------------------------


@pytest.fixture
async def seen(bus: PrivateBus) -> AsyncIterator[list[Snapshot]]:
    """Every snapshot of a watcher that runs."""
    snapshots: list[Snapshot] = []
    watcher = Watcher(snapshots.append, connect=lambda: flashd.client.client.connect(bus.address, activate=False))
    watcher.start()
    yield snapshots
    await asyncio.to_thread(watcher.stop)


def now(seen: list[Snapshot], condition: Callable[[Snapshot], object]) -> Callable[[], bool]:
    return lambda: bool(seen) and bool(condition(seen[-1]))


async def test_what_the_daemon_says_is_seen_and_followed(peer: FakeDaemon, seen: list[Snapshot]) -> None:
    await eventually(now(seen, lambda shown: shown.state is State.SWAPPING))
    assert [model.name for model in seen[-1].models] == ["ada", "bob"]
    assert [job.number for job in seen[-1].jobs] == [7]
    peer.job = job("swap", "bob", "done")
    peer.active, peer.models[BOB]["Residency"] = BOB, "host"
    peer.tell(JOB, wire.JOB, State=Variant("s", "done"))
    peer.tell(BOB, wire.MODEL, Residency=Variant("s", "host"))
    await eventually(now(seen, lambda shown: shown.active is not None and shown.active.residency == "host"))
    assert seen[-1].state is State.SERVING


async def test_a_burst_of_changes_is_one_look(peer: FakeDaemon, seen: list[Snapshot]) -> None:
    await eventually(now(seen, lambda shown: shown.status))
    before = len(seen)
    for number in range(200):
        peer.tell(JOB, wire.JOB, DoneBytes=Variant("t", number))
    peer.models[ADA]["Residency"] = "host"
    peer.tell(ADA, wire.MODEL, Residency=Variant("s", "host"))
    await eventually(now(seen, lambda shown: any(model.residency == "host" for model in shown.models)))
    assert len(seen) - before < 20


async def test_a_daemon_that_goes_and_comes_is_noticed(bus: PrivateBus, seen: list[Snapshot]) -> None:
    await eventually(now(seen, lambda shown: shown.state is State.AWAY))
    for _ in range(2):
        peer = await appear(bus)
        await eventually(now(seen, lambda shown: shown.status))
        await peer.connection.close()
        await eventually(now(seen, lambda shown: shown.state is State.AWAY))


async def test_a_daemon_of_another_kind_is_no_reason_to_end(
    peer: FakeDaemon, seen: list[Snapshot], caplog: pytest.LogCaptureFixture
) -> None:
    peer.models = {ADA: {"Name": "ada"}}
    with caplog.at_level(logging.ERROR):
        await eventually(lambda: "unexpected" in caplog.text)
    assert seen[-1].state is State.AWAY


# -- the daemon: what clicks ask of it -------------------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """A desktop that notes what it was asked to show."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def copy(self, text: str) -> None:
        self.calls.append(("copy", text))

    def open_folder(self, folder: Path) -> None:
        self.calls.append(("open", folder))

    def show_error(self, title: str, text: str) -> None:
        self.calls.append(("error", title, text))

    def show_about(self, daemon_version: str) -> None:
        self.calls.append(("about", daemon_version))

    def find(self) -> None:
        self.calls.append(("find",))

    def quit(self) -> None:
        self.calls.append(("quit",))


@dataclass(slots=True)
class Clicks:
    """Actions as the tray builds them, and what came of them."""

    actions: Actions
    desktop: Seen
    noted: list[str]


@pytest.fixture
def clicks(bus: PrivateBus, tmp_path: Path) -> Clicks:
    desktop, noted = Seen(), list[str]()

    def snapshot() -> Snapshot:
        with connected() as client:
            failed = JobView.of(client.job(7))
            return Snapshot(client.status(), tuple(client.models()), (), (failed,))

    def connected() -> Client:
        return flashd.connect(bus.address)

    actions = Actions(
        bus=bus.address, connect=connected, desktop=desktop, snapshot=snapshot,
        choices=PreferencesFile(tmp_path / "config", [], ["flashd-tray"]), words=Words(["en"]),
        on_dismissed=lambda: noted.append("dismissed"), on_chosen=lambda: noted.append("chosen"),
        on_started=lambda: noted.append("started"),
    )  # fmt: skip
    return Clicks(actions, desktop, noted)


@pytest.mark.parametrize(
    ("verb", "subject", "asked"),
    [
        (Verb.SWAP, "bob", ("Swap", "", "bob", {})),
        (Verb.PIN, "bob", ("Pin", BOB)),
        (Verb.UNPIN, "ada", ("Unpin", ADA)),
        (Verb.CANCEL, "7", ("Cancel", JOB)),
    ],
)
async def test_clicks_that_ask_the_daemon(
    peer: FakeDaemon, clicks: Clicks, verb: Verb, subject: str, asked: tuple[Any, ...]
) -> None:
    clicks.actions.do(Action(verb, subject))
    await eventually(lambda: peer.asked)
    assert peer.asked == [asked]
    assert clicks.desktop.calls == []


async def test_parking_waits_for_its_end(peer: FakeDaemon, clicks: Clicks) -> None:
    peer.job = job("park", "ada", "done")
    clicks.actions.do(Action(Verb.PARK))
    await eventually(lambda: peer.asked == [("Park", "")])


async def test_what_has_ended_is_not_cancelled(peer: FakeDaemon, clicks: Clicks) -> None:
    peer.job = job("swap", "bob", "done")
    clicks.actions.do(Action(Verb.CANCEL, "7"))
    clicks.actions.do(Action(Verb.PIN, "ada"))
    await eventually(lambda: ("Pin", ADA) in peer.asked)
    assert peer.asked == [("Pin", ADA)]


@pytest.mark.parametrize(
    ("verb", "call"),
    [
        (Verb.FIND, ("find",)),
        (Verb.COPY_ENDPOINT, ("copy", "/run/openai.sock")),
        (Verb.ABOUT, ("about", "1.0")),
        (Verb.QUIT, ("quit",)),
        (Verb.CHAT, ("error", "That did not work", "no model is active\nfirst choose a model in the menu")),
    ],
)
async def test_clicks_that_show_something(peer: FakeDaemon, clicks: Clicks, verb: Verb, call: tuple[Any, ...]) -> None:
    clicks.actions.do(Action(verb))
    await eventually(lambda: clicks.desktop.calls)
    assert clicks.desktop.calls == [call]


async def test_choices_are_kept_and_shown(peer: FakeDaemon, clicks: Clicks, tmp_path: Path) -> None:
    clicks.actions.do(Action(Verb.TOGGLE_TOPIC, Topic.READY))
    await eventually(lambda: clicks.noted == ["chosen"])
    kept = PreferencesFile(tmp_path / "config", [], ["flashd-tray"])
    assert kept.read() == Preferences(frozenset(Topic) - {Topic.READY})
    clicks.actions.do(Action(Verb.DISMISS_ERRORS))
    await eventually(lambda: clicks.noted == ["chosen", "dismissed"])


async def test_a_denial_is_put_into_words(peer: FakeDaemon, clicks: Clicks) -> None:
    peer.refusal = NotAuthorized("swapping is for members of the group flashd", hint="sudo usermod -aG flashd eve")
    clicks.actions.do(Action(Verb.SWAP, "ada"))
    await eventually(lambda: clicks.desktop.calls)
    words = "swapping is for members of the group flashd\nsudo usermod -aG flashd eve"
    assert clicks.desktop.calls == [("error", "Not permitted", words)]


async def test_what_fails_is_named(peer: FakeDaemon, clicks: Clicks) -> None:
    peer.refusal = Busy("ada is being replaced")
    clicks.actions.do(Action(Verb.SWAP, "ada"))
    await eventually(lambda: clicks.desktop.calls)
    assert clicks.desktop.calls == [("error", "No swap to ada", "ada is being replaced")]


# -- other trays, and notifications ----------------------------------------------------------------------------------


@pytest.fixture
def raised() -> list[str]:
    """In the name of which clicks a tray was asked to show itself."""
    return []


@pytest.fixture
def desktop_bus(bus: PrivateBus, raised: list[str]) -> Iterator[DesktopBus]:
    """Of a tray that was there first."""
    with DesktopBus(bus.address) as made:
        assert made.claim(raised.append)
        yield made


async def test_the_second_tray_raises_the_first_in_the_name_of_a_click(
    bus: PrivateBus, desktop_bus: DesktopBus, raised: list[str], connection: Connection
) -> None:
    for startup_id in ("menu-1_TIME5", ""):
        with DesktopBus(bus.address) as second:
            assert not second.claim(raised.append, startup_id)
        assert raised.pop() == startup_id
    # Like desktops, which send more than we know.
    body = ({"activation-token": Variant("s", "x"), "desktop-startup-id": Variant("s", "y")},)
    await connection.call(NAME, PATH, APPLICATION, "Activate", "a{sv}", body)
    assert raised == ["y"]


@dataclass(slots=True)
class FakeNotifications:
    connection: Connection
    shown: list[list[Any]] = field(default_factory=list)

    async def answer(self, call: Received) -> Reply:
        self.shown.append(list(call.body))
        return Reply("u", (call.body[1] or len(self.shown),))

    def tell(self, member: str, signature: str, *body: Any) -> None:
        self.connection.emit(NOTIFICATIONS_PATH, NOTIFICATIONS, member, signature, list(body))


@pytest.fixture
async def notifications(bus: PrivateBus) -> AsyncIterator[FakeNotifications]:
    made = FakeNotifications(await connect(bus.address))
    made.connection.serve(made.answer)
    await made.connection.own(NOTIFICATIONS)
    yield made
    await made.connection.close()


async def heard(notifications: FakeNotifications) -> None:
    """Returns when the tray has heard all that was said to it before: a bus keeps the order."""
    await notifications.connection.call(NAME, PATH, APPLICATION, "Activate", "a{sv}", ({},))


def shown(notifications: FakeNotifications, count: int) -> Callable[[], bool]:
    return lambda: len(notifications.shown) == count


async def test_a_notice_replaces_the_last_of_its_kind_while_that_is_there(
    notifications: FakeNotifications, desktop_bus: DesktopBus
) -> None:
    desktop_bus.notify("one", "<b>\x1b\udcff", replaces="ready")
    await eventually(shown(notifications, 1))
    desktop_bus.notify("two", "", replaces="ready")
    desktop_bus.notify("other\n\0\u202e", "", replaces="failed")
    await eventually(shown(notifications, 3))
    assert [(call[3], call[1]) for call in notifications.shown] == [("one", 0), ("two", 1), (r"other \x00\u202e", 0)]
    assert notifications.shown[0][4] == r"&lt;b&gt;\x1b\xff", "neither markup nor what the bus does not carry"
    notifications.tell("NotificationClosed", "uu", 1, 2)
    await heard(notifications)
    desktop_bus.notify("three", "", replaces="ready")
    await eventually(lambda: notifications.shown[-1][3] == "three")
    assert notifications.shown[-1][1] == 0


async def test_a_click_on_a_notice_does_what_it_says_once_it_is_shown(
    notifications: FakeNotifications, desktop_bus: DesktopBus
) -> None:
    clicked: list[str] = []
    desktop_bus.notify("ada is ready", "", actions={"swap": ("Switch", lambda: clicked.append("swap"))})
    await eventually(shown(notifications, 1))
    await heard(notifications)
    notifications.tell("ActionInvoked", "us", 99, "swap")
    notifications.tell("ActionInvoked", "us", 1, "default")
    notifications.tell("ActionInvoked", "us", 1, "swap")
    await eventually(lambda: clicked)
    assert clicked == ["swap"]


async def test_without_a_notification_daemon_notices_are_lost_without_a_word(
    desktop_bus: DesktopBus, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        desktop_bus.notify("lost", "")
        await eventually(lambda: "could not be shown" in caplog.text)
    assert [record.levelname for record in caplog.records] == ["INFO"]


async def test_what_is_being_said_is_said_before_it_ends(notifications: FakeNotifications, bus: PrivateBus) -> None:
    def say() -> None:
        with DesktopBus(bus.address) as ending:
            ending.notify("last words", "")

    await asyncio.to_thread(say)
    assert [call[3] for call in notifications.shown] == ["last words"]
