# SPDX-License-Identifier: Apache-2.0
"""File systems that stop answering: only their reader waits, can cancel, and delays neither others nor the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
import silent_files
from conftest import Remote, import_model, make_source
from running import CONFIG, Daemon
from silent_files import SilentFiles
from waiting import PATIENCE_S, eventually

from flashd.dbus import wire
from flashd.dbus.wire import DBUS, DBUS_PATH
from flashd.errors import TransferFailed

CANCELLED_S = 10.0  # promised within a second; a busy machine has a margin, and what hangs never gets there


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Callable[[str], SilentFiles]]:
    """Makes file systems, each with the same source in it."""
    source = make_source(tmp_path / "elsewhere", elements=300_000)
    contents = {file.name: file.read_bytes() for file in sorted(source.iterdir())}
    with contextlib.ExitStack() as stack:
        yield lambda name: stack.enter_context(SilentFiles(tmp_path / name, contents))


async def begin_import(remote: Remote, daemon: Daemon, files: SilentFiles, silent: Collection[int]) -> str:
    """Hands over files that do not answer the daemon from then on; returns when it waits for one."""
    names = sorted(file.name for file in files.folder.iterdir())
    fds = [os.open(files.folder / file, os.O_RDONLY) for file in names]
    assert daemon.process is not None
    files.silent, files.to = silent, daemon.process.pid
    indexes = {file: number for number, file in enumerate(names)}
    try:
        (job,) = await remote.call("Import", "sa{sh}ba{sv}", files.folder.name, indexes, False, {}, fds=fds)
        assert await asyncio.to_thread(files.waits.wait, PATIENCE_S)
    finally:
        for fd in fds:
            os.close(fd)
    return str(job)


async def cancelled_after(remote: Remote, job: str) -> float:
    """Cancels a job, and says how long it went on."""
    began = time.monotonic()
    await remote.call("Cancel", path=job, interface=wire.JOB)
    assert (await remote.finished(job))["State"] == "cancelled"
    return time.monotonic() - began


async def test_imports_that_hang_hold_up_nobody_and_can_be_cancelled(
    remote: Remote, daemon: Daemon, mounts: Callable[[str], SilentFiles], tmp_path: Path
) -> None:
    hangs = {"reads": {silent_files.READ}, "opens": {silent_files.OPEN}}
    at_once = [
        asyncio.create_task(begin_import(remote, daemon, mounts(f"refused-{number}"), silent))
        for number, silent in enumerate(({silent_files.GETATTR}, {*range(50)}))
    ]
    files = {name: mounts(name) for name in hangs}
    jobs = {name: await begin_import(remote, daemon, files[name], silent) for name, silent in hangs.items()}
    for job in jobs.values():
        await eventually(lambda job=job: has_phase(remote, job, "stalled"))
    await import_model(remote, make_source(tmp_path / "local", seed=1), "local")
    make_source(daemon.models / "dropped", seed=2)
    await remote.model("dropped")
    for job in jobs.values():
        assert await cancelled_after(remote, job) < CANCELLED_S
    for refused in at_once:
        with pytest.raises(TransferFailed, match="does not answer"):
            await refused
    assert drafts(daemon), "threads that hang keep theirs"
    for mounted in files.values():
        mounted.answer()
    await eventually(lambda: not drafts(daemon))
    await import_model(remote, make_source(tmp_path / "after", seed=3), "after")
    assert {path for path in await remote.objects() if "/model/" in path} == {
        wire.model_path(name) for name in ("local", "dropped", "after")
    }


async def test_a_daemon_that_is_ended_waits_for_no_file_system_and_the_next_one_begins(
    remote: Remote, daemon: Daemon, mounts: Callable[[str], SilentFiles], tmp_path: Path
) -> None:
    """Its process stays until the kernel lets go of it, whatever it is sent; what it held it gives up before."""
    await import_model(remote, make_source(tmp_path / "local", seed=1), "local")
    files = mounts("reads")
    with SilentFiles(daemon.models / "remote", {"model.safetensors": b""}) as dropped:
        await begin_import(remote, daemon, files, {silent_files.READ})
        dropped.silent, dropped.to = {silent_files.GETATTR}, files.to
        assert await asyncio.to_thread(dropped.waits.wait, PATIENCE_S)
        first = daemon.process
        assert first is not None
        first.terminate()
        await eventually(lambda: has_no_owner(remote))
        daemon.start()
        assert [path for path in await remote.objects() if "/model/" in path] == [wire.model_path("local")]
        assert first.poll() is None, "this test shows nothing"
        dropped.answer()
        files.answer()
    assert await asyncio.to_thread(first.wait, 20) == 0


async def test_a_store_that_hangs_keeps_nobody_waiting_who_asks_for_the_room_in_it(
    remote: Remote, daemon: Daemon
) -> None:
    quota_bytes = 1 << 20
    daemon.stop()
    daemon.config.write_text(CONFIG + "[store]\nquota = '1MiB'\n")
    daemon.start()
    assert daemon.process is not None
    with SilentFiles(daemon.state / "store" / "partial", {}) as partial:
        partial.silent, partial.to = {*range(50)}, daemon.process.pid
        began = time.monotonic()
        asked = asyncio.create_task(remote.get(wire.ROOT_PATH, wire.MANAGER, "StoreFreeBytes"))
        assert await asyncio.to_thread(partial.waits.wait, PATIENCE_S)
        assert await remote.get(wire.ROOT_PATH, wire.MANAGER, "State") == "ready"
        for _ in range(50):
            shown = await remote.all(wire.ROOT_PATH, wire.MANAGER)
            assert shown["StoreFreeBytes"] == quota_bytes, "the last that was known"
        assert await asked == quota_bytes
        assert time.monotonic() - began < CANCELLED_S, "one look is waited for, and that not long"
        assert "the store's file system does not answer" in daemon.log.read_text()
        partial.answer()
    left = daemon.state / "store" / "partial" / "left"
    left.mkdir()
    (left / "weights").write_bytes(bytes(1000))

    async def counts_it() -> bool:
        return bool(await remote.get(wire.ROOT_PATH, wire.MANAGER, "StoreFreeBytes") == quota_bytes - 1000)

    await eventually(counts_it)  # the look that hung may end just now, with what it saw


def drafts(daemon: Daemon) -> list[Path]:
    return list((daemon.state / "store" / "partial").iterdir())


async def has_no_owner(remote: Remote) -> bool:
    reply = await remote.connection.call(DBUS, DBUS_PATH, DBUS, "NameHasOwner", "s", (wire.BUS_NAME,))
    return reply.body == (False,)


async def has_phase(remote: Remote, job: str, phase: str) -> bool:
    return await remote.get(job, wire.JOB, "Phase") == phase
