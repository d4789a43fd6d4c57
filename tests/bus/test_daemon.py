# SPDX-License-Identifier: Apache-2.0
"""The daemon on a real bus: started, called, configured, stopped and killed."""

from __future__ import annotations

import asyncio
import fcntl
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from conftest import Daemon, Remote, import_model, make_source
from dbus_next import Variant
from safetensors.numpy import load_file
from waiting import PATIENCE_S, eventually

from flashd.dbus import wire
from flashd.dbus.connection import Connection, connect, plain
from flashd.dbus.private_bus import PrivateBus
from flashd.dbus.wire import OBJECT_MANAGER, PROPERTIES
from flashd.errors import (
    AlreadyExists,
    Busy,
    CorruptCheckpoint,
    InvalidArgument,
    InvalidSource,
    NotAuthorized,
    NotFound,
    OutOfMemory,
    Unavailable,
)


def weights_of(daemon: Daemon, checkpoint: str) -> Path:
    return daemon.state / "store" / "checkpoints" / checkpoint / "model.safetensors"


# The inbox


async def test_a_source_dropped_into_the_models_folder_becomes_a_model(remote: Remote, daemon: Daemon) -> None:
    source = make_source(daemon.models / "Owner" / "tiny", shards=3)
    model = await remote.model("Owner/tiny")
    assert (model["Architecture"], model["DType"], model["TensorCount"]) == ("TinyForNothing", "F32", 3)
    assert model["SizeBytes"] == 3 * 3000 * 4
    assert model["Residency"] == "stored"
    assert str(source) in model["Source"]
    stored = load_file(weights_of(daemon, model["Checkpoint"]))
    for shard in source.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            assert np.array_equal(stored[name], tensor)


async def test_what_cannot_be_converted_is_shown_and_tried_again_when_it_changes(
    remote: Remote, daemon: Daemon
) -> None:
    folder = make_source(daemon.models / "broken")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)

    async def items() -> list[list[str]]:
        return [item for item in await remote.get(wire.ROOT_PATH, wire.MANAGER, "InboxItems") if item[1] == "failed"]

    await eventually(items)
    ((name, _, detail),) = await items()
    assert name == "broken"
    assert "header" in detail
    make_source(folder)
    await remote.model("broken")
    assert await remote.get(wire.ROOT_PATH, wire.MANAGER, "InboxItems") == []


async def test_of_very_many_drops_the_first_are_shown_and_nobody_waits(remote: Remote, daemon: Daemon) -> None:
    """3,000 of them held the event loop for 22 seconds, and the end for 30."""
    for number in range(600):
        (daemon.models / f"m{number:03}.safetensors").write_bytes(b"junk" * 5)
    slowest_s = 0.0

    async def all_failed() -> bool:
        nonlocal slowest_s
        began = time.monotonic()
        items = await remote.get(wire.ROOT_PATH, wire.MANAGER, "InboxItems")
        slowest_s = max(slowest_s, time.monotonic() - began)
        assert len(items) <= 201
        return len(items) == 201 and items[-1][0] == "400 more" and {state for _, state, _ in items[:-1]} == {"failed"}

    await eventually(all_failed)
    assert slowest_s < 5, "twenty times what it takes: the machine may be busy"
    assert sum("/jobs/" in path for path in await remote.objects()) <= 101
    assert daemon.stop() == 0


async def test_a_damaged_record_is_named_and_costs_nobody_else(remote: Remote, daemon: Daemon, tmp_path: Path) -> None:
    for seed, name in enumerate(("good", "bad")):
        await import_model(remote, make_source(tmp_path / name, seed=seed), name)
    assert await remote.get(wire.ROOT_PATH, wire.MANAGER, "Problems") == []
    daemon.stop()
    record = daemon.state / "store" / "models" / "bad.toml"
    record.write_text(re.sub(r"use_count = \d+", "use_count = " + "9" * 4400, record.read_text()))
    (daemon.state / "store" / "lock").unlink()
    (daemon.state / "store" / "lock").mkdir()
    daemon.start()
    problems = [what for what, _ in await remote.get(wire.ROOT_PATH, wire.MANAGER, "Problems")]
    assert len(problems) == 2 and "lock.damaged" in problems[0] and "bad.damaged" in problems[1]
    record.with_suffix(".damaged").unlink()

    async def is_over() -> bool:
        return "bad" not in str(await remote.get(wire.ROOT_PATH, wire.MANAGER, "Problems"))

    await eventually(is_over)
    assert (await remote.model("good"))["Name"] == "good"
    await import_model(remote, tmp_path / "bad", "bad")
    assert (await remote.model("bad"))["Name"] == "bad"


async def test_scrub_goes_on_past_what_is_damaged_and_names_it(remote: Remote, daemon: Daemon, tmp_path: Path) -> None:
    weights = {}
    for seed, name in enumerate(("a", "pipe", "swapped", "z")):
        await import_model(remote, make_source(tmp_path / name, seed=seed), name)
        weights[name] = weights_of(daemon, (await remote.model(name))["Checkpoint"])
    weights["pipe"].unlink()
    os.mkfifo(weights["pipe"])
    shutil.rmtree(weights["swapped"].parent)
    shutil.copytree(weights["z"].parent, weights["swapped"].parent)
    (job,) = await remote.call("Scrub")
    result = (await remote.finished(job))["Result"]
    assert (result["checked"], result["corrupt"]) == (4, ["pipe", "swapped"])
    with pytest.raises(CorruptCheckpoint, match="another checkpoint"):
        await remote.call("Lease", "sa{sv}", "swapped", {})


async def test_what_no_engine_reads_is_shown_with_what_to_do(remote: Remote, daemon: Daemon) -> None:
    """Nothing that was dropped is passed over in silence."""
    make_source(daemon.models / "pipeline" / "unet")
    (daemon.models / "pipeline" / "model_index.json").write_text("{}")
    for part in ("blobs", "snapshots"):
        (daemon.models / "models--Qwen--Qwen3-8B" / part).mkdir(parents=True)
    pointer = make_source(daemon.models / "pointer")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (daemon.models / "speech.onnx").write_bytes(b"x")
    words = {
        "pipeline": "use it with diffusers",
        "models--Qwen--Qwen3-8B": "flash pull Qwen/Qwen3-8B",
        "pointer": "git lfs pull",
        "speech": "flash pull OWNER/NAME",
    }

    async def told() -> bool:
        items = await remote.get(wire.ROOT_PATH, wire.MANAGER, "InboxItems")
        details = {name: detail for name, state, detail in items if state == "failed"}
        return details.keys() == words.keys() and all(words[name] in details[name] for name in words)

    await eventually(told)


async def test_gguf_that_is_dropped_is_a_model_unless_it_is_damaged(remote: Remote, daemon: Daemon) -> None:
    tiny = gguf_files.llama(1)
    tiny.write(daemon.models / "whole.gguf")
    tiny.write_parts(daemon.models / "parts", "tiny", 3)
    for name in ("folder/Q4.gguf", "cut.gguf"):
        tiny.write(daemon.models / name)
        os.truncate(daemon.models / name, 100_000)

    async def failed() -> dict[str, str]:
        found = await remote.get(wire.ROOT_PATH, wire.MANAGER, "InboxItems")
        return {name: detail for name, state, detail in found if state == "failed"}

    async def both() -> bool:
        return (await failed()).keys() == {"folder", "cut"}

    await eventually(both)
    assert all("is cut short" in detail for detail in (await failed()).values())
    whole, parts = await remote.model("whole"), await remote.model("parts")
    assert whole["Checkpoint"] == parts["Checkpoint"]
    assert (whole["Architecture"], whole["DType"], whole["ContextLength"]) == ("llama", "F32", 512)
    (layout,) = {folder.name for folder in (daemon.state / "store" / "checkpoints").iterdir()}
    assert layout == whole["Checkpoint"]


async def test_a_saved_again_source_is_a_new_version_and_the_old_one_stays_while_leased(
    remote: Remote, daemon: Daemon
) -> None:
    await remote.call("SetConfig", "ss", "store.keep_versions", "0")
    daemon.stop()
    daemon.start()
    folder = make_source(daemon.models / "tiny", seed=1)
    first = (await remote.model("tiny"))["Checkpoint"]
    lease, *_ = await remote.call("Lease", "sa{sv}", "tiny", {})
    make_source(folder, seed=2)

    async def has_changed() -> bool:
        return (await remote.model("tiny"))["Checkpoint"] != first

    await eventually(has_changed)
    await asyncio.sleep(0.2)
    assert weights_of(daemon, first).exists()
    await remote.call("Release", path=lease, interface=wire.LEASE)
    await eventually(lambda: not weights_of(daemon, first).exists())


@pytest.mark.parametrize(("on_remove", "stays"), [("keep", True), ("remove", False)])
async def test_a_removed_source_keeps_its_model_unless_configured(
    remote: Remote, daemon: Daemon, on_remove: str, stays: bool
) -> None:
    assert await remote.call("SetConfig", "ss", "inbox.on_remove", on_remove) == (False,)
    folder = make_source(daemon.models / "tiny")
    await remote.model("tiny")
    shutil.rmtree(folder)

    async def is_gone() -> bool:
        return wire.model_path("tiny") not in await remote.objects()

    if stays:
        await asyncio.sleep(1.5)
        assert not await is_gone()
    else:
        await eventually(is_gone)


async def test_a_restart_converts_nothing_again(remote: Remote, daemon: Daemon) -> None:
    make_source(daemon.models / "tiny")
    before = await remote.model("tiny")
    daemon.stop()
    daemon.start()
    await asyncio.sleep(1)
    assert await remote.model("tiny") == before
    assert not [path for path in await remote.objects() if "/job/" in path]


async def test_a_source_moved_out_and_back_is_a_model_again(remote: Remote, daemon: Daemon, tmp_path: Path) -> None:
    await remote.call("SetConfig", "ss", "inbox.on_remove", "remove")
    folder = make_source(daemon.models / "tiny")
    await remote.model("tiny")
    folder.rename(tmp_path / "elsewhere")

    async def is_gone() -> bool:
        return wire.model_path("tiny") not in await remote.objects()

    await eventually(is_gone)
    (tmp_path / "elsewhere").rename(folder)
    await remote.model("tiny")


async def test_a_removed_model_stays_removed_until_its_source_changes(remote: Remote, daemon: Daemon) -> None:
    folder = make_source(daemon.models / "tiny", seed=1)
    await remote.model("tiny")
    await remote.call("Remove", path=wire.model_path("tiny"), interface=wire.MODEL)
    daemon.stop()
    daemon.start()
    await asyncio.sleep(1)
    assert wire.model_path("tiny") not in await remote.objects()
    make_source(folder, seed=2)
    await remote.model("tiny")


async def test_killed_in_a_conversion_it_starts_again_and_does_it_again(remote: Remote, daemon: Daemon) -> None:
    make_source(daemon.models / "large", elements=50_000_000)
    await eventually(lambda: list((daemon.state / "store" / "partial").glob("*/model.safetensors")))
    daemon.stop(signal.SIGKILL)
    daemon.start()
    model = await remote.model("large")
    (job,) = await remote.call("Verify", path=wire.model_path("large"), interface=wire.MODEL)
    assert (await remote.finished(job))["State"] == "done"
    assert model["SizeBytes"] == 200_000_000
    assert list((daemon.state / "store" / "partial").iterdir()) == []
    (daemon.models / "large" / "model.safetensors").unlink()


# Import


async def test_import_of_more_files_than_a_message_carries(remote: Remote, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", shards=40, elements=100)
    job = await remote.finished(await remote.import_folder(source, "wide", aliases=Variant("as", ["w"])))
    assert (job["State"], job["Kind"], job["Subject"]) == ("done", "import", "wide")
    assert job["Result"] == {"model": wire.model_path("wide")}
    assert job["DoneBytes"] == job["TotalBytes"] > 0
    model = await remote.model("wide")
    assert (model["TensorCount"], model["Aliases"]) == (40, ["w"])


async def test_a_hostile_import_fails_with_one_clear_error_and_changes_nothing(
    remote: Remote, daemon: Daemon, tmp_path: Path
) -> None:
    source = make_source(tmp_path / "source")
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 9_000_000]}}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    job = await remote.finished(await remote.import_folder(source, "evil"))
    assert job["State"] == "failed"
    assert job["Error"][0] == "org.flashd1.Error.InvalidSource"
    assert [path for path in await remote.objects() if "/model/" in path] == []
    assert list((daemon.state / "store" / "partial").iterdir()) == []


async def test_import_refuses_taken_names_and_strange_descriptors(remote: Remote, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    await import_model(remote, source, "tiny")
    with pytest.raises(AlreadyExists):
        await remote.import_folder(source, "tiny", replace=Variant("b", False))
    with pytest.raises(InvalidArgument):
        await remote.import_folder(source, "../tiny")
    reader, writer = os.pipe()
    try:
        options: dict[str, Variant] = {}
        with pytest.raises(InvalidSource, match="is a pipe"):
            await remote.call("Import", "sa{sh}ba{sv}", "p", {"model.safetensors": 0}, False, options, fds=[reader])
    finally:
        os.close(reader)
        os.close(writer)


async def test_an_environment_of_an_unknown_kind_is_refused(remote: Remote) -> None:
    with pytest.raises(InvalidArgument, match="no kind of engine"):
        await remote.call("UseEnvironment", "su", "unheard-of", 1)


async def test_an_import_that_waits_for_files_dies_with_its_caller(
    remote: Remote, bus: PrivateBus, daemon: Daemon
) -> None:
    caller = await connect(bus.address)
    with daemon.config.open() as file:
        (job,) = await Remote(caller).call(
            "Import", "sa{sh}ba{sv}", "half", {"model.safetensors": 0}, True, {}, fds=[file.fileno()]
        )
    assert await remote.get(job, wire.JOB, "State") == "collecting"
    with pytest.raises(NotAuthorized):
        await remote.call("ImportFiles", "oa{sh}b", job, {}, False)
    assert daemon.open_files()[str(daemon.config)] == 1
    await caller.close()
    assert (await remote.finished(job))["State"] == "cancelled"
    await eventually(lambda: not daemon.open_files()[str(daemon.config)])


async def test_cancelling_an_import_leaves_nothing(remote: Remote, daemon: Daemon, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", elements=100_000_000)
    job = await remote.import_folder(source, "large")
    await eventually(lambda: list((daemon.state / "store" / "partial").glob("*/model.safetensors")))
    await remote.call("Cancel", path=job, interface=wire.JOB)
    ended = await remote.finished(job)
    assert (ended["State"], ended["Error"][0]) == ("cancelled", "org.flashd1.Error.Cancelled")
    assert list((daemon.state / "store" / "partial").iterdir()) == []
    (source / "model.safetensors").unlink()


# Leases


async def test_a_lease_hands_over_the_weights_read_only(remote: Remote, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    await import_model(remote, source, "tiny")
    reply = await remote.connection.call(wire.BUS_NAME, wire.ROOT_PATH, wire.MANAGER, "Lease", "sa{sv}", ["tiny", {}])
    path, arena, layout, details = reply.body
    try:
        (tensor,) = load_file(source / "model.safetensors").values()
        start, end = json.loads(layout)["layer.1.weight"]["data_offsets"]
        with mmap.mmap(arena, details["size_bytes"].value, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
            assert mapped[start:end] == tensor.tobytes()
        with pytest.raises(PermissionError):
            mmap.mmap(arena, details["size_bytes"].value, mmap.MAP_SHARED, mmap.PROT_WRITE)
        seals = fcntl.fcntl(arena, fcntl.F_GET_SEALS)
        assert seals & fcntl.F_SEAL_SHRINK
        assert seals & fcntl.F_SEAL_SEAL
        with pytest.raises(PermissionError):  # a description of our own, opened for writing, is no way round the seal
            fd = os.open(f"/proc/self/fd/{arena}", os.O_RDWR)
            try:
                mmap.mmap(fd, details["size_bytes"].value, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            finally:
                os.close(fd)
    finally:
        reply.close_fds()
    model = await remote.model("tiny")
    assert (model["Residency"], model["Leases"]) == ("host", 1)
    lease = await remote.all(path, wire.LEASE)
    assert (lease["Owner"], lease["OwnerUid"]) == (remote.connection.unique_name, os.getuid())
    with pytest.raises(Busy):
        await remote.call("Evict", path=wire.model_path("tiny"), interface=wire.MODEL)
    await remote.call("Release", path=path, interface=wire.LEASE)
    assert path not in await remote.objects()
    await remote.call("Evict", path=wire.model_path("tiny"), interface=wire.MODEL)
    assert (await remote.model("tiny"))["Residency"] == "stored"


async def test_a_lease_ends_with_its_owner_and_outlives_its_model(
    remote: Remote, bus: PrivateBus, daemon: Daemon, tmp_path: Path
) -> None:
    await import_model(remote, make_source(tmp_path / "source"), "tiny")
    checkpoint = (await remote.model("tiny"))["Checkpoint"]
    owner = await connect(bus.address)
    path, *_ = await Remote(owner).call("Lease", "sa{sv}", "tiny", {})
    await remote.call("Remove", path=wire.model_path("tiny"), interface=wire.MODEL)
    assert (await remote.all(path, wire.LEASE))["Model"] == "/"
    await asyncio.sleep(0.2)
    assert weights_of(daemon, checkpoint).exists()
    await owner.close()
    await eventually(lambda: not weights_of(daemon, checkpoint).exists())
    assert path not in await remote.objects()

    async def is_free() -> bool:
        return bool(await remote.get(wire.device_path("host"), wire.DEVICE, "UsedBytes") == 0)

    await eventually(is_free)


async def test_leases_of_removed_models_do_not_hinder_its_end(remote: Remote, daemon: Daemon, tmp_path: Path) -> None:
    await import_model(remote, make_source(tmp_path / "source"), "tiny")
    await remote.call("Lease", "sa{sv}", "tiny", {})
    await remote.call("Remove", path=wire.model_path("tiny"), interface=wire.MODEL)
    assert daemon.stop() == 0, daemon.log.read_text()
    assert "Traceback" not in daemon.log.read_text()


async def test_what_does_not_fit_is_refused_with_the_numbers(remote: Remote, daemon: Daemon, tmp_path: Path) -> None:
    daemon.stop()
    daemon.config.write_text(
        '[memory]\nhost_budget = "64KiB"\nhuge_pages = "off"\n[engines]\nwarm_up = false\nwarm_new = false\n'
    )
    daemon.start()
    await import_model(remote, make_source(tmp_path / "a", seed=1), "a")
    await import_model(remote, make_source(tmp_path / "b", seed=2, elements=40_000), "b")
    with pytest.raises(OutOfMemory, match=r"164 kB do not fit: .* 65\.5 kB"):
        await remote.call("Lease", "sa{sv}", "b", {})
    (job,) = await remote.call("Load", "ssa{sv}", "a", "host", {})
    result = (await remote.finished(job))["Result"]
    assert (result["residency"], result["size_bytes"]) == ("host", 12_000)


# Models


async def test_models_are_found_pinned_renamed_and_removed(remote: Remote, tmp_path: Path) -> None:
    await import_model(remote, make_source(tmp_path / "source"), "Qwen/Tiny-1B")
    path = wire.model_path("Qwen/Tiny-1B")
    for name in ("Qwen/Tiny-1B", "qwen/tiny-1b", "tiny-1b"):
        assert await remote.call("FindModel", "s", name) == (path,)
    with pytest.raises(NotFound) as caught:
        await remote.call("FindModel", "s", "Qwen/Tiny-2B")
    assert "Qwen/Tiny-1B" in caught.value.hint
    await remote.call("SetAliases", "as", ["small"], path=path, interface=wire.MODEL)
    assert await remote.call("FindModel", "s", "small") == (path,)
    await remote.call("Pin", path=path, interface=wire.MODEL)
    assert (await remote.model("Qwen/Tiny-1B"))["Pinned"]
    await remote.call("Unpin", path=path, interface=wire.MODEL)
    await remote.call("Remove", path=path, interface=wire.MODEL)
    assert path not in await remote.objects()
    with pytest.raises(NotFound):
        await remote.call("Remove", path=path, interface=wire.MODEL)


async def test_verify_and_scrub_find_a_changed_byte(remote: Remote, daemon: Daemon, tmp_path: Path) -> None:
    await import_model(remote, make_source(tmp_path / "good", seed=1), "good")
    await import_model(remote, make_source(tmp_path / "bad", seed=2), "bad")
    with weights_of(daemon, (await remote.model("bad"))["Checkpoint"]).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    (job,) = await remote.call("Verify", path=wire.model_path("good"), interface=wire.MODEL)
    assert (await remote.finished(job))["State"] == "done"
    (job,) = await remote.call("Verify", path=wire.model_path("bad"), interface=wire.MODEL)
    assert (await remote.finished(job))["Error"][0] == "org.flashd1.Error.CorruptCheckpoint"
    (job,) = await remote.call("Scrub")
    result = (await remote.finished(job))["Result"]
    assert (result["checked"], result["corrupt"]) == (2, ["bad"])


async def test_changes_are_told_and_finished_jobs_say_so(remote: Remote, tmp_path: Path) -> None:
    job = await remote.import_folder(make_source(tmp_path / "source"), "tiny")
    await remote.finished(job)

    def told(member: str, interface: str) -> list[tuple[object, ...]]:
        return [plain(s.body) for s in remote.signals if (s.member, s.interface) == (member, interface)]

    await eventually(lambda: told("Finished", wire.JOB))
    assert told("Finished", wire.JOB) == [["done", {"model": wire.model_path("tiny")}, ["", "", ""]]]
    added = [body[0] for body in told("InterfacesAdded", OBJECT_MANAGER)]
    assert added == [job, wire.model_path("tiny")]
    await remote.call("Pin", path=wire.model_path("tiny"), interface=wire.MODEL)
    await eventually(lambda: [wire.MODEL, {"Pinned": True}, []] in told("PropertiesChanged", PROPERTIES))


async def test_a_listing_says_what_the_objects_say(remote: Remote, tmp_path: Path) -> None:
    """Listings are kept ready to send: what changed since must be in them."""
    for number, name in enumerate(("a", "bb", "ccc", "Owner/dddd")):
        await import_model(remote, make_source(tmp_path / str(number), seed=number), name)
    await remote.objects()
    await remote.call("Pin", path=wire.model_path("bb"), interface=wire.MODEL)
    await remote.call("Remove", path=wire.model_path("ccc"), interface=wire.MODEL)
    await remote.call("Lease", "sa{sv}", "a", {})
    await remote.call("SetAliases", "as", ["x", "y"], path=wire.model_path("a"), interface=wire.MODEL)

    async def use_is_noted() -> bool:
        return (await remote.model("a"))["LastUsedAt"] > 0

    await eventually(use_is_noted)
    listed = await remote.objects()
    assert len([path for path in listed if "/model/" in path]) == 3
    for path, interfaces in listed.items():
        for interface, values in interfaces.items():
            now = await remote.all(path, interface)
            values.pop("DriverUsedBytes", None), now.pop("DriverUsedBytes", None)  # the whole machine's, as it is now
            assert now == values


# The process


async def test_configuration_is_shown_changed_and_checked(remote: Remote, daemon: Daemon) -> None:
    (text,) = await remote.call("GetConfig")
    assert tomllib.loads(text)["store"]["path"] == str(daemon.state / "store")
    assert await remote.call("SetConfig", "ss", "engines.max_parked", "5") == (True,)
    assert await remote.call("SetConfig", "ss", "engines.idle_timeout_s", "60") == (False,)
    (text,) = await remote.call("GetConfig")
    assert tomllib.loads(text)["engines"]["idle_timeout_s"] == 60
    assert tomllib.loads(text)["engines"]["max_parked"] == 2, "what is in force, not what will be"
    (text,) = await remote.call("GetNextConfig")
    assert tomllib.loads(text)["engines"]["max_parked"] == 5 and tomllib.loads(text)["engines"]["idle_timeout_s"] == 60
    for key, value, hint in [
        ("engines.max_parkt", "5", "engines.max_parked"),
        ("engines.max_parked", "lots", "whole number"),
        ("store.path", "/elsewhere", "command line|option"),
    ]:
        with pytest.raises(InvalidArgument) as caught:
            await remote.call("SetConfig", "ss", key, value)
        assert any(part in str(caught.value) for part in hint.split("|"))


async def test_stop_ends_it_cleanly(remote: Remote, daemon: Daemon, connection: Connection) -> None:
    await remote.call("Stop")
    assert daemon.process is not None
    assert await asyncio.to_thread(daemon.process.wait, 10) == 0
    with pytest.raises(Unavailable):
        await remote.call("Stop")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_cleanly(daemon: Daemon, number: int) -> None:
    assert daemon.stop(number) == 0
    assert "Traceback" not in daemon.log.read_text()


def test_the_loss_of_the_bus_ends_it_with_its_own_status(daemon: Daemon, bus: PrivateBus) -> None:
    os.kill(bus.pid, signal.SIGKILL)
    assert daemon.process is not None
    assert daemon.process.wait(PATIENCE_S) == Unavailable.exit_status
    assert "the bus has closed the connection" in daemon.log.read_text()
    assert "Traceback" not in daemon.log.read_text()


def test_a_second_daemon_is_told_which_thing_is_taken(daemon: Daemon, short_path: Path, tmp_path: Path) -> None:
    def second(name: str, runtime: Path) -> str:
        other = Daemon(daemon.address, tmp_path / name, runtime)
        other.root.mkdir(exist_ok=True)
        done = subprocess.run(other.command(), capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode in {AlreadyExists.exit_status, Busy.exit_status}
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "another process owns org.flashd1" in second("other", short_path / "other")
    assert "another flashd uses" in second("other", short_path)


def test_it_is_small_when_idle(daemon: Daemon) -> None:
    """The limit of the contract; tests/bench/daemon.py measures this, and how soon it is ready."""
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    (resident,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")]
    assert resident * 1024 < 80_000_000


async def test_engines_without_their_framework_say_what_to_install(
    remote: Remote, daemon: Daemon, tmp_path: Path
) -> None:
    daemon.stop()
    daemon.config.write_text('[engines.torch]\npython = "/usr/bin/python3"\n')
    daemon.start()
    await import_model(remote, make_source(tmp_path / "source"), "tiny")
    (job,) = await remote.call("Swap", "sa{sv}", "tiny", {})
    error = (await remote.finished(job))["Error"]
    assert error[0] == "org.flashd1.Error.Unavailable"
    assert "engines.torch.python" in error[2]
    assert await remote.get(wire.ROOT_PATH, wire.MANAGER, "ActiveModel") == "/"
