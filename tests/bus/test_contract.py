# SPDX-License-Identifier: Apache-2.0
"""The daemon offers exactly what the documented XML says, and every method is guarded."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from conftest import Daemon, Remote, import_model, make_source
from dbus_next import Variant

from flashd.client import results
from flashd.daemon.access.authorization import ACTIONS, Action, SameUser, authorize, check_owner
from flashd.daemon.bus.manager import ManagerObject
from flashd.daemon.bus.objects import DeviceObject, EngineObject, JobObject, LeaseObject, ModelObject
from flashd.dbus import wire
from flashd.dbus.connection import Connection, connect
from flashd.dbus.object_tree import Caller, Exported, ObjectTree, contract, method_name, missing_members
from flashd.dbus.private_bus import PrivateBus
from flashd.dbus.wire import PROPERTIES
from flashd.errors import InvalidArgument, NotAuthorized, NotFound

OBJECTS = (ManagerObject, ModelObject, JobObject, LeaseObject, EngineObject, DeviceObject)
DOC = "org.gtk.GDBus.DocString"


def described(element: ElementTree.Element) -> list[str]:
    """Everything of an interface but its order: one line a member, argument and annotation."""
    lines = []
    for parent in element.iter():
        name = f"{parent.tag} {sorted(parent.attrib.items())}"
        lines += [f"{name} > {child.tag} {sorted(child.attrib.items())}" for child in parent]
    return sorted(lines)


async def paths_by_interface(remote: Remote, tmp_path: Path) -> dict[str, str]:
    """One live object of each interface; engines have their own test, with a real one."""
    await import_model(remote, make_source(tmp_path / "source"), "tiny")
    lease, *_ = await remote.call("Lease", "sa{sv}", "tiny", {})
    return {
        wire.MANAGER: wire.ROOT_PATH,
        wire.MODEL: wire.model_path("tiny"),
        wire.JOB: wire.job_path(1),
        wire.LEASE: lease,
        wire.DEVICE: wire.device_path("host"),
    }


async def test_live_introspection_is_the_documented_xml(remote: Remote, tmp_path: Path) -> None:
    for interface, path in (await paths_by_interface(remote, tmp_path)).items():
        (xml,) = await remote.call("Introspect", path=path, interface="org.freedesktop.DBus.Introspectable")
        (live,) = [e for e in ElementTree.fromstring(xml) if e.get("name") == interface]
        (shipped,) = ElementTree.fromstring(wire.interface_xml(interface))
        assert described(live) == described(shipped)


async def test_live_properties_are_those_of_the_xml(remote: Remote, tmp_path: Path) -> None:
    for interface, path in (await paths_by_interface(remote, tmp_path)).items():
        (values,) = await remote.call("GetAll", "s", interface, path=path, interface=PROPERTIES)
        assert {n: v.signature for n, v in values.items()} == {
            p.name: p.signature for p in contract(interface).properties
        }


def test_every_interface_has_its_object_and_every_method_its_function() -> None:
    assert {o.interface for o in OBJECTS} == set(wire.INTERFACES)
    assert {o.interface: missing_members(o) for o in OBJECTS if missing_members(o)} == {}


@pytest.mark.parametrize(
    ("kind", "interface", "left_out"),
    [
        (results.Model, wire.MODEL, set()),
        (results.Engine, wire.ENGINE, set()),
        (results.Device, wire.DEVICE, set()),
        (results.Status, wire.MANAGER, {"ActiveEngine"}),
    ],
)
def test_the_clients_results_have_the_properties_of_the_xml(kind: type, interface: str, left_out: set[str]) -> None:
    shown = results.PROPERTY_NAMES[kind].values()
    assert {*shown} | left_out == {p.name for p in contract(interface).properties}


@pytest.mark.parametrize("interface", wire.INTERFACES)
def test_every_member_and_argument_is_documented(interface: str) -> None:
    for element in ElementTree.fromstring(wire.interface_xml(interface)).iter():
        if element.tag in {"interface", "method", "signal", "property", "arg"}:
            docs = [child.get("value") for child in element if child.get("name") == DOC]
            assert len(docs) == 1, f"{interface}: {element.get('name')} is not documented"
            assert docs[0]
            assert docs[0].endswith("."), f"{interface}: {element.get('name')} ends without a full stop"


def test_every_method_is_in_the_table_of_actions_and_nothing_else() -> None:
    methods = {(i, m.name) for i in wire.INTERFACES for m in contract(i).methods}
    assert methods == set(ACTIONS)


OURS, THEIRS = 1000, 1001


@pytest.mark.parametrize(("interface", "member"), sorted(ACTIONS))
async def test_only_the_user_of_the_daemon_and_root_may_call(interface: str, member: str) -> None:
    authority = SameUser(OURS)
    await authorize(authority, Caller(":1.1", OURS), interface, member)
    await authorize(authority, Caller(":1.1", 0), interface, member)
    with pytest.raises(NotAuthorized) as caught:
        await authorize(authority, Caller(":1.1", THEIRS), interface, member)
    assert caught.value.hint


async def test_what_the_table_does_not_name_is_refused_to_root_too() -> None:
    with pytest.raises(NotAuthorized):
        await authorize(SameUser(0), Caller(":1.1", 0), wire.MANAGER, "Forgotten")


async def test_what_belongs_to_somebody_is_theirs_and_an_administrators() -> None:
    await check_owner(Nobody(), Caller(":1.1", THEIRS), THEIRS, "it")
    await check_owner(SameUser(OURS), Caller(":1.1", 0), THEIRS, "it")
    with pytest.raises(NotAuthorized, match=f"it belongs to user {OURS}"):
        await check_owner(SameUser(OURS), Caller(":1.1", THEIRS), OURS, "it")
    with pytest.raises(NotAuthorized):
        await check_owner(Nobody(), Caller(":1.1", OURS), THEIRS, "it")


class Nobody:
    async def check(self, caller: Caller, action: Action) -> None:
        raise NotAuthorized(f"{caller.uid} may not {action.value}")


class Model(Exported):
    """Remembers what reached it."""

    interface = wire.MODEL

    def __init__(self) -> None:
        super().__init__(wire.model_path("x"))
        self.reached: list[str] = []
        for method in contract(wire.MODEL).methods:
            setattr(self, method_name(method.name), self._reach)

    async def _reach(self, *arguments: object) -> None:
        self.reached.append("a method")


@pytest.fixture
async def refusing(bus: PrivateBus) -> AsyncIterator[Model]:
    serving = await connect(bus.address)

    async def identify(peer: str) -> Caller:
        return Caller(peer, (await serving.credentials(peer)).uid)

    async def refuse(caller: Caller, interface: str, member: str) -> None:
        assert caller.uid == os.getuid()
        await authorize(Nobody(), caller, interface, member)

    model = Model()
    ObjectTree(serving, identify=identify, authorize=refuse).add(model)
    await serving.own(wire.BUS_NAME)
    yield model
    await serving.close()


async def test_a_refused_call_reaches_no_object(refusing: Model, connection: Connection) -> None:
    remote = Remote(connection)
    for method in contract(wire.MODEL).methods:
        arguments = {"": (), "as": ([],), "b": (True,), "u": (1,)}[method.in_signature]
        with pytest.raises(NotAuthorized):
            await remote.call(method.name, method.in_signature, *arguments, path=refusing.path, interface=wire.MODEL)
    assert refusing.reached == []


async def test_calls_that_do_not_fit_the_contract_are_refused(remote: Remote, daemon: Daemon) -> None:
    with pytest.raises(InvalidArgument):
        await remote.call("NoSuchMethod")
    with pytest.raises(InvalidArgument, match=r"takes 'sa\{sv\}'"):
        await remote.call("Swap", "s", "tiny")
    with pytest.raises(InvalidArgument, match="no option 'speed'"):
        await remote.call("Swap", "sa{sv}", "tiny", {"speed": Variant("s", "fast")})
    with pytest.raises(InvalidArgument, match="read-only"):
        value = Variant("s", "x")
        await remote.call("Set", "ssv", wire.MANAGER, "Version", value, interface=PROPERTIES)
    with pytest.raises(InvalidArgument):
        await remote.call("ImportFiles", "oa{sh}b", wire.model_path("x"), {}, False)
    with pytest.raises(NotFound):
        await remote.call("Pin", path=wire.model_path("nothing"), interface=wire.MODEL)
    with pytest.raises(NotFound):
        await remote.call("ImportFiles", "oa{sh}b", wire.job_path(99), {}, False)
