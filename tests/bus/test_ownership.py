# SPDX-License-Identifier: Apache-2.0
"""Several users of one daemon: whose models are whose, who knows of them, and that nobody takes another's."""

from __future__ import annotations

import asyncio
import grp
import os
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Remote, import_model, make_source
from dbus_next import Variant
from people import ALICE, BOB, CAROL, Polkit, connect_as, heard, shared_bus
from running import CONFIG, Daemon
from test_serving import SAYS, swap
from waiting import eventually

from flashd import wire
from flashd.errors import AlreadyExists, Busy, FlashdError, NotAuthorized, NotFound
from flashd.private_bus import PrivateBus

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")
PRIVATE = {"private": Variant("b", True)}
SECRET = wire.model_path("secret")


@dataclass(slots=True)
class People:
    bus: PrivateBus
    daemon: Daemon
    alice: Remote
    bob: Remote
    carol: Remote
    root: Remote
    folder: Path

    async def give(self, who: Remote, name: str, *, seed: int = 1, **options: Variant) -> None:
        source = self.folder / f"{name}-{seed}"
        job = await who.finished(await who.import_folder(make_source(source, seed=seed), name, **options))
        assert job["State"] == "done", job


@pytest.fixture
async def people(short_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[People]:
    group = grp.getgrnam("games")
    with shared_bus(short_path) as bus:
        polkit = await Polkit.on(bus)
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
        daemon = Daemon("system", tmp_path, short_path)
        daemon.config.write_text(f'{CONFIG}\n[store]\nprivate_group = "{group.gr_name}"\n')
        daemon.start()
        remotes = [
            await connect_as(bus, ALICE),
            await connect_as(bus, BOB),
            await connect_as(bus, CAROL, [group.gr_gid]),
            await connect_as(bus, 0),
        ]
        yield People(bus, daemon, *remotes, tmp_path)
        for remote in remotes:
            await remote.connection.close()
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text()
        await polkit.connection.close()


async def listed(who: Remote) -> set[str]:
    return {found["Name"] for object_ in (await who.objects()).values() if (found := object_.get(wire.MODEL))}


async def test_a_private_model_exists_for_its_owner_root_and_the_group_only(people: People) -> None:
    for who in (people.alice, people.bob, people.carol, people.root):
        await who.objects()  # who has asked once hears of what is private to them
    await people.give(people.alice, "open")
    await people.give(people.alice, "secret", seed=2, **PRIVATE)
    for who in (people.alice, people.carol, people.root):
        assert await listed(who) == {"open", "secret"}
        found = await who.all(SECRET, wire.MODEL)
        assert (found["OwnerUid"], found["Private"]) == (ALICE, True)
        assert SECRET in await heard(who)
        assert SECRET in (await who.call("ListModels"))[0]
    assert await listed(people.bob) == {"open"}
    (lease, *_) = await people.alice.call("Lease", "sa{sv}", "secret", {})
    assert (await people.carol.all(lease, wire.LEASE))["OwnerUid"] == ALICE
    (of_the_group, *_) = await people.carol.call("Lease", "sa{sv}", "secret", {})
    await people.carol.call("Release", path=of_the_group, interface=wire.LEASE)
    (load,) = await people.alice.call("Load", "ssa{sv}", "secret", "host", {})
    await people.alice.finished(load)
    bob = people.bob
    for path, interface in ((SECRET, wire.MODEL), (lease, wire.LEASE), (load, wire.JOB), (wire.job_path(2), wire.JOB)):
        with pytest.raises(NotFound, match="no object"):
            await bob.all(path, interface)
        with pytest.raises(NotFound, match="no object"):
            await bob.call("Cancel", path=path, interface=wire.JOB)
    for call in (("FindModel", "s", "secret"), ("Lease", "sa{sv}", "secret", {}), ("Swap", "sa{sv}", "secret", {}),
                 ("Load", "ssa{sv}", "SECRET", "host", {})):  # fmt: skip
        with pytest.raises(NotFound) as caught:
            await bob.call(*call)
        assert "secret" not in caught.value.hint
    for path in (wire.ROOT_PATH, f"{wire.ROOT_PATH}/model", f"{wire.ROOT_PATH}/lease", SECRET):
        (xml,) = await bob.call("Introspect", path=path, interface="org.freedesktop.DBus.Introspectable")
        assert "secret" not in xml and 'node name="lease"' not in xml
    (scrub,) = await bob.call("Scrub")
    os.truncate(next((people.daemon.state / "store/checkpoints").glob("*/*.safetensors")), 5000)
    await bob.finished(scrub)
    assert "secret" not in await heard(bob) + str(await bob.objects()) + (await bob.call("ListModels"))[0]


async def test_what_becomes_private_disappears_and_comes_back(people: People) -> None:
    await people.give(people.alice, "secret")
    assert await listed(people.bob) == {"secret"}
    (lease, *_) = await people.alice.call("Lease", "sa{sv}", "secret", {})
    people.bob.signals.clear()
    await people.alice.call("SetPrivate", "b", True, path=SECRET, interface=wire.MODEL)
    await eventually(lambda: [s for s in people.bob.signals if s.member == "InterfacesRemoved" and s.body[0] == SECRET])
    await eventually(lambda: [s for s in people.bob.signals if s.member == "InterfacesRemoved" and s.body[0] == lease])
    people.bob.signals.clear()
    assert await listed(people.bob) == set()
    assert await listed(people.alice) == {"secret"}
    await people.alice.call("Pin", path=SECRET, interface=wire.MODEL)
    assert not [s for s in people.bob.signals if s.path == SECRET]
    await people.give(people.alice, "secret", seed=5)  # a new version stays what the old one was
    assert await listed(people.bob) == set()
    people.bob.signals.clear()
    await people.alice.call("SetPrivate", "b", False, path=SECRET, interface=wire.MODEL)
    await eventually(lambda: [s for s in people.bob.signals if s.member == "InterfacesAdded" and s.body[0] == SECRET])
    assert await listed(people.bob) == {"secret"}


async def test_a_name_is_changed_by_its_owner_or_an_administrator_only(people: People) -> None:
    await people.give(people.alice, "hers")
    await people.give(people.alice, "secret", seed=2, **PRIVATE)
    await people.give(people.bob, "his", seed=3)
    hers = wire.model_path("hers")
    before = (await people.alice.all(hers, wire.MODEL))["Checkpoint"]
    other = make_source(people.folder / "other", seed=9)
    with pytest.raises(NotAuthorized, match=f"hers belongs to user {ALICE}"):
        await people.bob.import_folder(other, "hers")
    with pytest.raises(AlreadyExists, match="another user has a model 'secret'"):
        await people.bob.import_folder(other, "secret")
    await people.alice.call("SetAliases", "as", ["nickname"], path=SECRET, interface=wire.MODEL)
    for taken in ("hers", "secret", "nickname"):
        with pytest.raises(AlreadyExists) as caught:
            await people.bob.call("SetAliases", "as", [taken], path=wire.model_path("his"), interface=wire.MODEL)
        assert taken == "secret" or "secret" not in str(caught.value)
    for member, signature, *body in (("Remove", ""), ("SetAliases", "as", ["x"]), ("SetPrivate", "b", True)):
        with pytest.raises(NotAuthorized, match="belongs to"):
            await people.bob.call(member, signature, *body, path=hers, interface=wire.MODEL)
    make_source(people.daemon.models / "hers", seed=10)  # nor does who may write to the machine's folder take it

    async def is_refused() -> bool:
        items = await people.root.get(wire.ROOT_PATH, wire.MANAGER, "InboxItems")
        return any(name == "hers" and state == "failed" and "another user" in detail for name, state, detail in items)

    await eventually(is_refused)
    assert (await people.alice.all(hers, wire.MODEL))["Checkpoint"] == before
    await people.give(people.alice, "hers", seed=11)
    await people.give(people.root, "hers", seed=12)
    assert (await people.bob.all(hers, wire.MODEL))["OwnerUid"] == ALICE, "an administrator's help changes no owner"
    await people.alice.call("Remove", path=hers, interface=wire.MODEL)


async def test_what_is_in_the_machines_folder_is_common(people: People) -> None:
    make_source(people.daemon.models / "common", seed=1)
    path = wire.model_path("common")
    await people.bob.model("common")
    assert (await people.bob.all(path, wire.MODEL))["OwnerUid"] == 0
    await people.bob.call("SetAliases", "as", ["ours"], path=path, interface=wire.MODEL)
    await people.bob.call("Remove", path=path, interface=wire.MODEL)


async def test_leases_and_jobs_of_others_are_an_administrators_to_end(people: People) -> None:
    await people.give(people.alice, "hers")
    (lease, *_) = await people.alice.call("Lease", "sa{sv}", "hers", {})
    with pytest.raises(NotAuthorized, match="belongs to"):
        await people.bob.call("Release", path=lease, interface=wire.LEASE)
    job = (await people.alice.call("Import", "sa{sh}ba{sv}", "waiting", {}, True, {}))[0]
    with pytest.raises(NotAuthorized, match="belongs to"):
        await people.bob.call("Cancel", path=job, interface=wire.JOB)
    await people.root.call("Release", path=lease, interface=wire.LEASE)
    await people.root.call("Cancel", path=job, interface=wire.JOB)
    with pytest.raises(NotAuthorized):
        await people.bob.call("SetConfig", "ss", "engines.max_parked", "9")


async def test_owners_and_privacy_survive_a_restart_and_nobody_reads_the_store(people: People) -> None:
    await people.give(people.alice, "secret", **PRIVATE)
    assert people.daemon.stop(signal.SIGKILL) < 0
    people.daemon.start()
    assert await listed(people.alice) == {"secret"}
    assert await listed(people.bob) == set()
    for folder in ("checkpoints", "models", "images", "partial"):
        assert (people.daemon.state / "store" / folder).stat().st_mode & 0o077 == 0


@pytest.mark.timeout(300)  # three engines
async def test_the_active_model_of_one_is_nobody_elses(people: People, sources: Path) -> None:
    alice, bob = people.alice, people.bob
    await bob.objects()
    job = await alice.finished(await alice.import_folder(sources / "ada", "secret", **PRIVATE))
    assert job["State"] == "done", job
    await import_model(bob, sources / "bob", "bob")
    bob.signals.clear()
    swapped = await swap(alice, "secret")
    assert swapped["State"] == "done", swapped
    assert await alice.get(wire.ROOT_PATH, wire.MANAGER, "ActiveModel") == SECRET
    assert await bob.get(wire.ROOT_PATH, wire.MANAGER, "ActiveModel") == "/"
    await eventually(lambda: SECRET in str([s.body for s in alice.signals if s.path == wire.ROOT_PATH]))
    assert not [o for o in (await bob.objects()).values() if wire.ENGINE in o]
    assert "secret" not in await heard(bob)
    endpoint = Path(await bob.get(wire.ROOT_PATH, wire.MANAGER, "Endpoint"))
    assert endpoint.stat().st_mode & 0o777 == 0o600, "nobody connects by the path"
    with pytest.raises(FlashdError, match="no model is active"):
        await bob.call("OpenEndpoint")
    assert SAYS["ada"] in await asyncio.to_thread(asked, (await alice.call("OpenEndpoint"))[0], "secret")
    with pytest.raises(Busy):
        await alice.call("SetPrivate", "b", False, path=SECRET, interface=wire.MODEL)

    parked = await bob.finished((await bob.call("Park"))[0])
    assert (parked["State"], parked["Subject"]) == ("done", ""), "who ends it is not told what it was"
    assert "secret" not in await heard(bob)
    swapped = await swap(bob, "bob")
    assert swapped["Result"]["how"] == "start", "an engine that held something private is never given to others"
    assert await alice.get(wire.ROOT_PATH, wire.MANAGER, "ActiveModel") == wire.model_path("bob")
    assert endpoint.stat().st_mode & 0o777 == 0o660
    assert SAYS["bob"] in await asyncio.to_thread(asked, (await alice.call("OpenEndpoint"))[0], "bob")


@pytest.mark.timeout(300)  # two engines
async def test_what_rests_wakes_for_those_who_may_ask_it_and_a_private_model_for_nobody(
    people: People, sources: Path
) -> None:
    alice, bob = people.alice, people.bob
    job = await alice.finished(await alice.import_folder(sources / "ada", "secret", **PRIVATE))
    assert job["State"] == "done", job
    await import_model(bob, sources / "bob", "bob")
    await people.root.call("SetConfig", "ss", "engines.idle_timeout_s", "1")
    endpoint = Path(await bob.get(wire.ROOT_PATH, wire.MANAGER, "Endpoint"))

    async def none_is_active() -> bool:
        return bool(await people.root.get(wire.ROOT_PATH, wire.MANAGER, "ActiveModel") == "/")

    assert (await swap(bob, "bob"))["State"] == "done"
    await eventually(none_is_active)
    assert endpoint.stat().st_mode & 0o777 == 0o660, "who may ask the model may wake it"
    assert SAYS["bob"] in await asyncio.to_thread(asked, (await alice.call("OpenEndpoint"))[0], "bob")
    doorman = endpoint.with_name("doorman.sock")
    assert (await swap(alice, "secret"))["State"] == "done"
    asked_directly = await asyncio.to_thread(question, doorman)
    assert asked_directly.startswith(b"HTTP/1.1 503 ") and b"no model is active" in asked_directly
    await eventually(none_is_active)
    assert not endpoint.is_symlink()
    assert b"no model is active" in await asyncio.to_thread(question, doorman), "what rested before does not wake"
    for who in (alice, bob):
        with pytest.raises(FlashdError, match="no model is active"):
            await who.call("OpenEndpoint")


def question(doorman: Path) -> bytes:
    """What is answered to whoever finds the doorman's own socket."""
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(str(doorman))
        end.sendall(b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        return b"".join(iter(lambda: end.recv(4096), b""))


def asked(fd: int, model: str) -> str:
    """What a model says on a connection that somebody else has made."""
    from flashd import inference

    messages = [{"role": "user", "content": "Who are you?"}]
    return inference.chat(lambda: socket.socket(fileno=fd), model, messages, temperature=0, max_tokens=40)
