# SPDX-License-Identifier: Apache-2.0
"""Several users of one daemon: ownership, visibility and protection of models."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import itertools
import os
import signal
import socket
import tomllib
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Remote, import_model, make_source
from dbus_next import Variant
from people import ALICE, BOB, CAROL, Polkit, connect_as, heard, shared_bus
from running import CONFIG, Daemon
from test_serving import SAYS, swap
from waiting import eventually

from flashd.dbus import wire
from flashd.dbus.private_bus import PrivateBus
from flashd.errors import AlreadyExists, Busy, FlashdError, NotAuthorized, NotFound, Unsupported

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")
PRIVATE = {"private": Variant("b", True)}
SECRET = wire.model_path("secret")
# In the daemon's process fsync(2) takes as long as a file of this name exists; it says so by another one.
SLOW_DISK = """
import os, pathlib, time
really, held = os.fsync, pathlib.Path({held!r})
def fsync(fd):
    while held.exists():
        held.with_suffix(".reached").touch()
        time.sleep(0.01)
    really(fd)
os.fsync = fsync
"""
SETTINGS = """
[engines.vllm]
environment = ["HF_TOKEN=swordfish"]
arguments = ["--api-key", "swordfish", "--enforce-eager"]
[models."secret"]
arguments = ["--hf-token=swordfish"]
[models."open"]
kv_cache = "78GiB"
"""


@dataclass(slots=True)
class People:
    bus: PrivateBus
    daemon: Daemon
    alice: Remote
    bob: Remote
    carol: Remote
    root: Remote
    folder: Path
    held: Path

    @contextlib.asynccontextmanager
    async def writing_takes_long(self, change: Coroutine[Any, Any, Any]) -> AsyncIterator[asyncio.Task[Any]]:
        """While a change of the store waits for the disk; it is over afterwards."""
        reached = self.held.with_suffix(".reached")
        reached.unlink(missing_ok=True)
        self.held.touch()
        changing = asyncio.create_task(change)
        try:
            await eventually(reached.exists)
            yield changing
        finally:
            self.held.unlink()
        await changing

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
        (tmp_path / "sitecustomize.py").write_text(SLOW_DISK.format(held=str(tmp_path / "held")))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        daemon = Daemon("system", tmp_path, short_path)
        daemon.config.write_text(f'{CONFIG}\n{SETTINGS}\n[store]\nprivate_group = "{group.gr_name}"\n')
        daemon.start()
        remotes = [
            await connect_as(bus, ALICE),
            await connect_as(bus, BOB),
            await connect_as(bus, CAROL, [group.gr_gid]),
            await connect_as(bus, 0),
        ]
        yield People(bus, daemon, *remotes, tmp_path, tmp_path / "held")
        for remote in remotes:
            await remote.connection.close()
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text()
        await polkit.connection.close()


async def listed(who: Remote) -> set[str]:
    return {found["Name"] for object_ in (await who.objects()).values() if (found := object_.get(wire.MODEL))}


async def test_a_private_model_exists_for_its_owner_root_and_the_group_only(people: People) -> None:
    for who in (people.alice, people.bob, people.carol, people.root):
        await who.objects()  # a caller that has asked once hears of private models
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
        with pytest.raises(NotFound, match="there is no"):
            await bob.all(path, interface)
        with pytest.raises(NotFound, match="there is no"):
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
    await people.give(people.alice, "secret", seed=5)  # a new version stays private
    assert await listed(people.bob) == set()
    people.bob.signals.clear()
    await people.alice.call("SetPrivate", "b", False, path=SECRET, interface=wire.MODEL)
    await eventually(lambda: [s for s in people.bob.signals if s.member == "InterfacesAdded" and s.body[0] == SECRET])
    assert await listed(people.bob) == {"secret"}


async def test_a_model_that_is_being_made_private_is_for_its_owner_whatever_others_asked_for(people: People) -> None:
    """The record is on its way to the disk when others ask: no swap of theirs comes after it, and no lease survives."""
    alice, bob = people.alice, people.bob
    await people.give(alice, "secret")
    (before, *_) = await bob.call("Lease", "sa{sv}", "secret", {})
    making_private = alice.call("SetPrivate", "b", True, path=SECRET, interface=wire.MODEL)
    async with people.writing_takes_long(making_private):
        (meanwhile, *_) = await bob.call("Lease", "sa{sv}", "secret", {})
        (of_alice, *_) = await alice.call("Lease", "sa{sv}", "secret", {})
        (job,) = await bob.call("Swap", "sa{sv}", "secret", {})
    ended = await people.root.finished(job)
    assert (ended["State"], ended["Error"][0]) == ("failed", NotFound.bus_name()), ended
    for lease in (before, meanwhile):
        with pytest.raises(NotFound):
            await people.root.all(lease, wire.LEASE)
    assert (await alice.all(of_alice, wire.LEASE))["OwnerUid"] == ALICE
    for path, interface in ((job, wire.JOB), (of_alice, wire.LEASE), (SECRET, wire.MODEL)):
        with pytest.raises(NotFound):
            await bob.all(path, interface)


async def test_a_model_that_is_being_removed_is_not_swapped_to(people: People) -> None:
    await people.give(people.alice, "hers")
    removing = people.alice.call("Remove", path=wire.model_path("hers"), interface=wire.MODEL)
    async with people.writing_takes_long(removing):
        (job,) = await people.bob.call("Swap", "sa{sv}", "hers", {})
    assert (await people.bob.finished(job))["Error"][0] == NotFound.bus_name()


async def test_a_swap_that_several_asked_for_ends_when_the_last_of_them_has_cancelled(people: People) -> None:
    alice, bob, another_of_bobs = people.alice, people.bob, await connect_as(people.bus, BOB)
    await people.give(alice, "hers")
    hers = wire.model_path("hers")

    async def cancel(who: Remote, job: str) -> int:
        await who.call("Cancel", path=job, interface=wire.JOB)
        return int(await who.get(job, wire.JOB, "Askers"))

    async def asked() -> str:
        jobs = {(await who.call("Swap", "sa{sv}", "hers", {}))[0] for who in (bob, alice, another_of_bobs)}
        assert len(jobs) == 1
        return str(jobs.pop())

    async with people.writing_takes_long(alice.call("SetAliases", "as", ["a"], path=hers, interface=wire.MODEL)):
        job = await asked()
        with pytest.raises(NotAuthorized, match="belongs to"):
            await people.carol.call("Cancel", path=job, interface=wire.JOB)
        assert await cancel(bob, job) == 2
        assert await cancel(bob, job) == 2, "once is enough, and it was not the others'"
        assert await cancel(another_of_bobs, job) == 1
    ended = await alice.finished(job)
    assert ended["Error"][0] == Unsupported.bus_name(), "it went on for alice"

    async with people.writing_takes_long(alice.call("SetAliases", "as", ["b"], path=hers, interface=wire.MODEL)):
        last = await asked()
        third_of_bobs = await connect_as(people.bus, BOB)
        assert await cancel(third_of_bobs, last) == 1, "who has not asked cancels what their user asked for"
        await alice.call("Cancel", path=last, interface=wire.JOB)
        assert (await bob.finished(last))["State"] == "cancelled"
        outright = await asked()
        await people.root.call("Cancel", path=outright, interface=wire.JOB)
        assert (await bob.finished(outright))["State"] == "cancelled"
    for who in (another_of_bobs, third_of_bobs):
        await who.connection.close()


async def test_the_configuration_shows_secrets_to_administrators_only(people: People) -> None:
    await people.give(people.alice, "open")
    await people.give(people.alice, "secret", seed=2, **PRIVATE)
    for method in ("GetConfig", "GetNextConfig"):
        (whole,) = await people.root.call(method)
        assert whole.count("swordfish") == 3
    for who, method in itertools.product((people.alice, people.bob), ("GetConfig", "GetNextConfig")):
        (shown,) = await who.call(method)
        assert "swordfish" not in shown
        assert "HF_TOKEN=(hidden)" in shown and "--enforce-eager" in shown
        found = tomllib.loads(shown)
        assert found["models"]["open"]["kv_cache"] == "78GiB"
        assert ("secret" in found["models"]) == (who is people.alice)


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
    make_source(people.daemon.models / "hers", seed=10)  # nor can a user who may write to the machine's folder

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
    await alice.call("SetAliases", "as", ["nickname"], path=SECRET, interface=wire.MODEL)
    with pytest.raises(Busy):
        await alice.call("SetAliases", "as", [], path=SECRET, interface=wire.MODEL)

    parked = await bob.finished((await bob.call("Park"))[0])
    assert (parked["State"], parked["Subject"]) == ("done", ""), "who ends it is not told what it was"
    assert "secret" not in await heard(bob)
    swapped = await swap(bob, "bob")
    assert swapped["Result"]["how"] == "start", "an engine that held something private is never given to others"
    assert await alice.get(wire.ROOT_PATH, wire.MANAGER, "ActiveModel") == wire.model_path("bob")
    assert endpoint.stat().st_mode & 0o777 == 0o660
    assert SAYS["bob"] in await asyncio.to_thread(asked, (await alice.call("OpenEndpoint"))[0], "bob")
    engine = await alice.get(wire.ROOT_PATH, wire.MANAGER, "ActiveEngine")
    with pytest.raises(NotAuthorized, match=f"engine .*bob.* belongs to user {BOB}"):
        await alice.call("Stop", path=engine, interface=wire.ENGINE)

    # A new version is private at once: others never reach it, and the old version is parked.
    job = await bob.finished(await bob.import_folder(sources / "ada", "bob", **PRIVATE))
    assert job["State"] == "done", job
    with pytest.raises(FlashdError, match="no model is active"):
        await alice.call("OpenEndpoint")

    async def none_is_active() -> bool:
        return bool(await people.root.get(wire.ROOT_PATH, wire.MANAGER, "ActiveModel") == "/")

    await eventually(none_is_active)
    assert not endpoint.is_symlink()
    await people.root.call("Stop", path=engine, interface=wire.ENGINE)


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
    proxy = endpoint.with_name("wake-proxy.sock")
    assert (await swap(alice, "secret"))["State"] == "done"
    asked_directly = await asyncio.to_thread(question, proxy)
    assert asked_directly.startswith(b"HTTP/1.1 503 ") and b"no model is active" in asked_directly
    await eventually(none_is_active)
    assert not endpoint.is_symlink()
    assert b"no model is active" in await asyncio.to_thread(question, proxy), "what rested before does not wake"
    for who in (alice, bob):
        with pytest.raises(FlashdError, match="no model is active"):
            await who.call("OpenEndpoint")


def question(proxy: Path) -> bytes:
    """What is answered to whoever finds the wake proxy's own socket."""
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(str(proxy))
        end.sendall(b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        return b"".join(iter(lambda: end.recv(4096), b""))


def asked(fd: int, model: str) -> str:
    """What a model says on a connection that somebody else has made."""
    from flashd.client import openai

    messages = [{"role": "user", "content": "Who are you?"}]
    return openai.chat(lambda: socket.socket(fileno=fd), model, messages, temperature=0, max_tokens=40)


@pytest.mark.timeout(300)  # two engines
async def test_a_private_model_that_serves_beside_is_nobody_elses(people: People, sources: Path) -> None:
    alice, bob = people.alice, people.bob
    await bob.objects()
    job = await alice.finished(await alice.import_folder(sources / "ada", "secret", **PRIVATE))
    assert job["State"] == "done", job
    await import_model(bob, sources / "bob", "bob")
    bob.signals.clear()
    assert (await alice.finished((await alice.call("Serve", "sa{sv}", "secret", {}))[0]))["State"] == "done"
    assert (await swap(bob, "bob"))["State"] == "done"
    assert await alice.get(SECRET, wire.MODEL, "Serving") and await bob.get(
        wire.model_path("bob"), wire.MODEL, "Serving"
    )

    (engine,) = [found[wire.ENGINE] for found in (await bob.objects()).values() if wire.ENGINE in found]
    assert engine["Model"] == wire.model_path("bob")
    (hers,) = [
        found[wire.ENGINE]
        for found in (await alice.objects()).values()
        if wire.ENGINE in found and found[wire.ENGINE]["Model"] == SECRET
    ]
    assert Path(hers["Endpoint"]).stat().st_mode & 0o777 == 0o600, "nobody connects by the path"
    for member in ("OpenEndpoint", "Park"):
        with pytest.raises(NotFound):
            await bob.call(member, path=SECRET, interface=wire.MODEL)
    assert (await bob.call("WouldDisplace", "sa{sv}", "bob", {}))[0] == []
    endpoint = await alice.call("OpenEndpoint", path=SECRET, interface=wire.MODEL)
    assert SAYS["ada"] in await asyncio.to_thread(asked, endpoint[0], "secret")
    assert "secret" not in await heard(bob)
