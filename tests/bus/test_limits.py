# SPDX-License-Identifier: Apache-2.0
"""One client cannot exhaust the daemon: limits for connections and users, which are released when the peer leaves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, Remote, import_model, make_source
from hypothesis import given
from hypothesis import strategies as st
from waiting import eventually

from flashd.config.settings import LimitsConfig
from flashd.daemon.access.limits import Limits, Scarce
from flashd.dbus import wire
from flashd.dbus.connection import connect
from flashd.dbus.private_bus import PrivateBus
from flashd.errors import LimitExceeded

from running import CONFIG  # isort: skip

LIMITS = """
[limits]
calls = 8
jobs = 6
leases = 4
imports = 4
descriptors = 12
models = 3
"""


@dataclass(frozen=True)
class Somebody:
    peer: str
    uid: int


people = st.builds(Somebody, st.sampled_from([":1", ":2", ":3", ":4"]), st.sampled_from([1000, 1001]))


@given(limit=st.integers(1, 9), asks=st.lists(st.tuples(people, st.integers(1, 3), st.booleans()), max_size=60))
def test_nobody_ever_has_more_than_the_limit_and_nobody_is_kept_out_by_others(
    limit: int, asks: list[tuple[Somebody, int, bool]]
) -> None:
    limits = Limits(lambda: LimitsConfig(leases=limit))
    held: list[Somebody] = []
    for who, more, gives_back in asks:
        if gives_back:
            held = [holder for holder in held if holder.peer != who.peer]  # the peer left
            continue
        of_user = sum(holder.uid == who.uid for holder in held)
        of_connection = sum(holder == who for holder in held)
        fits = of_user + more <= limit and of_connection + more <= (limit + 1) // 2
        try:
            limits.check(Scarce.LEASES, who, held, more)
            assert fits
            held += [who] * more
        except LimitExceeded as error:
            assert not fits
            assert "limits.leases" in error.hint
        limits.check(Scarce.LEASES, Somebody("", who.uid), held, 1000)  # the daemon itself


@pytest.fixture
async def limited(daemon: Daemon, connection: Any, tmp_path: Path) -> Remote:
    assert daemon.stop() == 0
    daemon.config.write_text(CONFIG + LIMITS)
    daemon.start()
    remote = Remote(connection)
    await import_model(remote, make_source(tmp_path / "source"), "tiny")
    return remote


Act = Callable[[Remote], Coroutine[Any, Any, Any]]


async def lease(remote: Remote) -> Any:
    reply = await remote.call("Lease", "sa{sv}", "tiny", {})
    os.close(reply[1])
    return reply[0]


async def begin_import(remote: Remote) -> Any:
    return await remote.call("Import", "sa{sh}ba{sv}", "tiny", {}, True, {})


@pytest.mark.parametrize(
    ("act", "limit", "words"),
    [(lease, 4, "leases"), (begin_import, 4, "imports waiting for files")],
    ids=["leases", "imports"],
)
async def test_a_connection_has_half_a_user_all_and_the_next_peer_what_the_last_had(
    limited: Remote, bus: PrivateBus, act: Act, limit: int, words: str
) -> None:
    others = [Remote(await connect(bus.address)) for _ in range(3)]
    for number in range(limit // 2):
        await act(others[0])
        await act(others[1])
        assert number < limit
    with pytest.raises(LimitExceeded, match=f"this connection has 2 {words}; the limit is 2"):
        await act(others[0])
    with pytest.raises(LimitExceeded, match=f"user {os.getuid()} has 4 {words}; the limit is 4") as caught:
        await act(others[2])
    assert "limits." in caught.value.hint
    await others[0].connection.close()

    async def is_given_back() -> bool:
        try:
            await act(others[2])
        except LimitExceeded:
            return False
        return True

    await eventually(is_given_back)
    await act(others[2])
    for other in others[1:]:
        await other.connection.close()

    async def is_all_gone() -> bool:
        found = await limited.objects()
        return not any(wire.LEASE in o or o.get(wire.JOB, {}).get("State") == "collecting" for o in found.values())

    await eventually(is_all_gone)


async def test_descriptors_are_counted_and_those_that_were_refused_are_not_kept(
    limited: Remote, daemon: Daemon, bus: PrivateBus, tmp_path: Path
) -> None:
    sent = tmp_path / "sent"
    sent.write_text("x")
    greedy = Remote(await connect(bus.address))
    fd = os.open(sent, os.O_RDONLY)
    (job,) = await greedy.call("Import", "sa{sh}ba{sv}", "x", {f"{i}.txt": i for i in range(5)}, True, {}, fds=[fd] * 5)
    with pytest.raises(LimitExceeded, match="open files of imports"):
        await greedy.call("ImportFiles", "oa{sh}b", job, {f"{i}.bin": i for i in range(2)}, True, fds=[fd] * 2)
    with pytest.raises(LimitExceeded):
        await greedy.call("Import", "sa{sh}ba{sv}", "y", {f"{i}": i for i in range(7)}, True, {}, fds=[fd] * 7)
    await eventually(lambda: daemon.open_files()[str(sent)] == 5)
    await greedy.connection.close()
    os.close(fd)
    await eventually(lambda: not daemon.open_files()[str(sent)])


async def test_a_flood_of_calls_is_refused_and_others_are_served(limited: Remote, bus: PrivateBus) -> None:
    greedy = Remote(await connect(bus.address))
    outcomes = await asyncio.gather(*(lease(greedy) for _ in range(100)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, LimitExceeded)]
    assert len(refused) == 98, "a connection may have two leases, and four calls that wait"
    assert any("calls waiting" in error.message for error in refused)
    assert await limited.call("FindModel", "s", "tiny")
    await greedy.connection.close()


async def test_models_are_counted_by_user(limited: Remote, tmp_path: Path) -> None:
    for number in (2, 3):
        await import_model(limited, make_source(tmp_path / f"{number}", seed=number), f"tiny-{number}")
    with pytest.raises(LimitExceeded, match="3 models"):
        await import_model(limited, make_source(tmp_path / "4", seed=4), "tiny-4")
    await import_model(limited, make_source(tmp_path / "4", seed=4), "tiny-3")  # a new version is none more
    await limited.call("SetConfig", "ss", "limits.models", "4")
    await import_model(limited, make_source(tmp_path / "4", seed=4), "tiny-4")


async def test_jobs_under_way_are_counted_and_finished_ones_are_not(limited: Remote) -> None:
    for _ in range(20):
        (job,) = await limited.call("Load", "ssa{sv}", "tiny", "host", {})
        await limited.finished(job)
    (first,) = await limited.call("Import", "sa{sh}ba{sv}", "a", {}, True, {})
    (second,) = await limited.call("Import", "sa{sh}ba{sv}", "b", {}, True, {})
    outcomes = await asyncio.gather(*(limited.call("Scrub") for _ in range(4)), return_exceptions=True)
    assert [type(o) for o in outcomes if isinstance(o, Exception)] != []
    for job in (first, second):
        await limited.call("Cancel", path=job, interface=wire.JOB)
