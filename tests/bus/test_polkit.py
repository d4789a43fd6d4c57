# SPDX-License-Identifier: Apache-2.0
"""The daemon's questions to polkit; any answer but a clear yes is a no. tests/system asks the real polkit."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from flashd.daemon.access.authorization import ACTIONS, Action, authorize
from flashd.daemon.access.polkit import ACTION_IDS, POLKIT, Polkit
from flashd.dbus import wire
from flashd.dbus.connection import Connection, Received, Reply, connect, plain
from flashd.dbus.object_tree import Caller, Exported, ObjectTree, contract
from flashd.dbus.private_bus import PrivateBus
from flashd.errors import NotAuthorized, NotFound

POLICY = Path(__file__).parents[2] / "packaging" / "polkit" / "org.flashd1.policy"
CALLER = Caller(":1.77", 1000)


class Authority:
    """org.freedesktop.PolicyKit1, which answers as it is told and remembers what it was asked."""

    def __init__(self) -> None:
        self.answer: Any = [True, False, {}]
        self.asked: list[tuple[Any, ...]] = []
        self.cancelled: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def handle(self, call: Received) -> Reply:
        if call.member == "CancelCheckAuthorization":
            self.cancelled.append(call.body[0])
            return Reply()
        assert call.signature == "(sa{sv})sa{ss}us"
        self.asked.append(tuple(plain(value) for value in call.body))
        await self.gate.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return Reply("(bba{ss})", (self.answer,))


@pytest.fixture
async def authority(bus: PrivateBus) -> AsyncIterator[Authority]:
    serving = await connect(bus.address)
    made = Authority()
    serving.serve(made.handle)
    await serving.own(POLKIT)
    yield made
    await serving.close()


@pytest.fixture
def polkit(connection: Connection) -> Polkit:
    return Polkit(connection)


async def test_the_question_names_the_caller_the_action_and_whether_a_person_may_be_asked(
    authority: Authority, polkit: Polkit
) -> None:
    await polkit.check(CALLER, Action.USE)
    await polkit.check(Caller(":1.78", 1001, interactive=True), Action.ADMINISTER)
    (first, second) = authority.asked
    assert first[:4] == (["system-bus-name", {"name": ":1.77"}], "org.flashd1.use", {}, 0)
    assert second[:4] == (["system-bus-name", {"name": ":1.78"}], "org.flashd1.administer", {}, 1)
    assert first[4] != second[4], "each question can be cancelled by itself"


async def test_reading_is_everybodys_and_root_is_not_asked_about(authority: Authority, polkit: Polkit) -> None:
    authority.answer = [False, False, {}]
    await polkit.check(CALLER, Action.READ)
    await polkit.check(Caller(":1.1", 0), Action.ADMINISTER)
    assert not authority.asked


@pytest.mark.parametrize("answer", [[False, False, {}], [False, True, {}], NotFound("no such action")], ids=str)
async def test_whatever_is_not_a_yes_is_a_no(authority: Authority, polkit: Polkit, answer: Any) -> None:
    authority.answer = answer
    for action in (Action.USE, Action.MANAGE, Action.ADMINISTER):
        with pytest.raises(NotAuthorized) as caught:
            await polkit.check(CALLER, action)
        assert caught.value.hint
        assert ACTION_IDS[action] in caught.value.message


async def test_without_polkit_nobody_may_but_root(polkit: Polkit) -> None:
    with pytest.raises(NotAuthorized, match="could not be asked"):
        await polkit.check(CALLER, Action.USE)
    await polkit.check(Caller(":1.1", 0), Action.USE)


async def test_one_who_has_to_type_keeps_nobody_else_waiting(authority: Authority, polkit: Polkit) -> None:
    authority.gate.clear()
    slow = asyncio.create_task(polkit.check(Caller(":1.78", 1001, interactive=True), Action.USE))
    while not authority.asked:
        await asyncio.sleep(0.01)
    await polkit.check(Caller(":1.79", 1002), Action.READ)
    assert not slow.done()
    authority.gate.set()
    await slow


async def test_a_question_that_nobody_waits_for_any_more_is_taken_back(authority: Authority, polkit: Polkit) -> None:
    authority.gate.clear()
    asking = asyncio.create_task(polkit.check(CALLER, Action.USE))
    while not authority.asked:
        await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert authority.cancelled == [authority.asked[0][4]]


class Device(Exported):
    interface = wire.MODEL

    def __init__(self) -> None:
        super().__init__(wire.model_path("x"))

    async def pin(self, caller: Caller) -> None: ...


@pytest.mark.parametrize("interactive", [True, False])
async def test_the_interactive_flag_of_the_call_reaches_polkit(
    bus: PrivateBus, connection: Connection, authority: Authority, interactive: bool
) -> None:
    serving = await connect(bus.address)

    async def identify(peer: str) -> Caller:
        return Caller(peer, 1000)

    async def check(caller: Caller, interface: str, member: str) -> None:
        await authorize(Polkit(serving), caller, interface, member)

    ObjectTree(serving, identify=identify, authorize=check).add(Device())
    await connection.call(serving.unique_name, wire.model_path("x"), wire.MODEL, "Pin", interactive=interactive)
    await serving.close()
    ((subject, action, _, flags, _),) = authority.asked
    assert (subject[1]["name"], action, flags) == (connection.unique_name, "org.flashd1.manage", int(interactive))


def test_every_method_of_the_interface_files_has_an_action_of_the_policy() -> None:
    policy = ElementTree.parse(POLICY)
    known = {action.get("id") for action in policy.iter("action")}
    assert known == set(ACTION_IDS.values())
    assert set(ACTION_IDS) == set(Action) - {Action.READ}
    for file in (POLICY.parents[2] / "flashd" / "dbus" / "interfaces").glob("*.xml"):
        for method in contract(file.stem).methods:
            action = ACTIONS[file.stem, method.name]
            assert action is Action.READ or ACTION_IDS[action] in known, f"{file.stem}.{method.name} has no action"
        for property_ in contract(file.stem).properties:
            assert property_.access.value == "read", f"{property_.name} is writable: it needs an action"


def test_what_reads_is_not_what_changes() -> None:
    readers = {member for (_, member), action in ACTIONS.items() if action is Action.READ}
    assert readers == {"FindModel", "ListModels", "ListEnvironments", "GetConfig", "GetNextConfig"}


def test_every_action_lets_the_daemon_ask_and_is_refused_to_strangers() -> None:
    for action in ElementTree.parse(POLICY).iter("action"):
        annotations = {a.get("key"): a.text for a in action.iter("annotate")}
        # Without it polkit lets only root ask about others.
        assert annotations["org.freedesktop.policykit.owner"] == "unix-user:flashd"
        assert action.findtext("defaults/allow_any") == "auth_admin"


def test_who_may_do_more_may_do_less() -> None:
    implied = {
        action.get("id"): set((a.text or "").split())
        for action in ElementTree.parse(POLICY).iter("action")
        for a in action.iter("annotate")
        if a.get("key") == "org.freedesktop.policykit.imply"
    }
    use, manage, administer = (ACTION_IDS[action] for action in (Action.USE, Action.MANAGE, Action.ADMINISTER))
    assert implied == {manage: {use}, administer: {manage, use}}


def test_the_policies_are_valid() -> None:
    files = [POLICY, POLICY.parents[1] / "dbus" / "org.flashd1.conf"]
    for file in files:
        ElementTree.parse(file)
    dtds = Path("/usr/share/polkit-1/policyconfig-1.dtd"), Path("/usr/share/xml/dbus-1/busconfig.dtd")
    for file, dtd in zip(files, dtds, strict=True):
        if dtd.exists():
            subprocess.run(["xmllint", "--noout", "--nonet", "--dtdvalid", dtd, file], check=True)


@pytest.mark.parametrize("part", ["description", "message"])
def test_people_are_asked_in_their_language(part: str) -> None:
    lang = "{http://www.w3.org/XML/1998/namespace}lang"
    for action in ElementTree.parse(POLICY).findall("action"):
        said = {words.get(lang): words.text for words in action.findall(part)}
        assert set(said) == {None, "de", "zh_CN"}
        assert len(set(said.values())) == 3


def test_the_policy_of_the_bus_lets_every_interface_through() -> None:
    policy = ElementTree.parse(POLICY.parents[1] / "dbus" / "org.flashd1.conf")
    allowed = {rule.get("send_interface") for rule in policy.iter("allow")}
    assert set(wire.INTERFACES) <= allowed
