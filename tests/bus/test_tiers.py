# SPDX-License-Identifier: Apache-2.0
"""Tiers and devices over the bus, on a simulated GPU; tests/gpu does the same on a real one."""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from manager import Manager, start
from running import CONFIG, Daemon
from safetensors.torch import save_file
from waiting import until

import flashd
from flashd import errors
from flashd.dbus.private_bus import PrivateBus
from flashd.memory.arena import HostArena
from flashd.memory.device import HostDevice
from flashd.units import GiB, MiB

FLASH = [sys.executable, "-c", "from flashd.cli import main; main()"]
SIMULATED = "[memory]\nsimulated_device = '64MiB'\ndevice_budget = '48MiB'\nhost_budget = '64MiB'\n"


def configured(bus: PrivateBus, short_path: Path, tmp_path: Path, extra: str) -> Daemon:
    daemon = Daemon(bus.address, tmp_path, short_path)
    daemon.config.write_text(CONFIG + extra)
    return daemon


def ended(daemon: Daemon) -> None:
    assert daemon.process is not None
    if daemon.process.poll() is None:
        status, words = daemon.stop(), daemon.log.read_text()
        assert status == 0 and "Traceback" not in words, words


@pytest.fixture
def daemon(bus: PrivateBus, short_path: Path, tmp_path: Path) -> Iterator[Daemon]:
    running = configured(bus, short_path, tmp_path, SIMULATED)
    running.start()
    yield running
    ended(running)


@pytest.fixture
def client(daemon: Daemon) -> Iterator[flashd.Client]:
    with flashd.connect(daemon.address) as connected:
        yield connected


def model(client: flashd.Client, folder: Path, name: str, size_bytes: int, seed: int = 0) -> torch.Tensor:
    tensor = torch.randint(0, 255, (size_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    (folder / name).mkdir()
    save_file({"w": tensor}, folder / name / "model.safetensors")
    client.import_(folder / name, name)
    return tensor


def test_a_card_is_a_device_with_a_ledger_of_its_own(client: flashd.Client, tmp_path: Path) -> None:
    model(client, tmp_path, "a", 20 * MiB)
    found = {device.name: device for device in client.devices()}
    assert {name: device.kind for name, device in found.items()} == {"host": "host", "sim:0": "simulated"}
    assert found["sim:0"].budget_bytes == 48 * MiB and found["sim:0"].total_bytes == 64 * MiB
    result = client.load("a", "device")
    assert result["residency"] == "device"
    assert client.model("a").devices == ("sim:0",)
    found = {device.name: device for device in client.devices()}
    assert found["sim:0"].used_bytes >= 20 * MiB and found["host"].used_bytes == 0
    client.load("a")
    assert client.model("a").devices == ("host", "sim:0") and client.model("a").residency == "device"
    client.evict("a")
    assert client.model("a").residency == "stored"
    assert all(device.used_bytes == 0 for device in client.devices())


def test_what_others_use_of_a_device_is_that_of_now(client: flashd.Client) -> None:
    def host_used_bytes() -> int:
        return next(device.driver_used_bytes for device in client.devices() if device.name == "host")

    def is_seen() -> bool:
        before_bytes = host_used_bytes()
        with mmap.mmap(-1, GiB // 2) as taken:
            taken.write(bytes(GiB // 2))
            return host_used_bytes() > before_bytes + GiB // 4

    assert any(is_seen() for _ in range(10)), "the list is of now"  # others may give some back at that moment


def test_a_lease_on_a_device_is_the_weights_there(client: flashd.Client, tmp_path: Path) -> None:
    expected = model(client, tmp_path, "a", 5 * MiB)
    with client.lease("a", device="sim:0") as lease, client.lease("a", device="device") as same:
        assert (lease.device, lease.memory, same.device) == ("sim:0", "host", "sim:0")
        assert torch.equal(lease.tensors()["w"], expected)
        assert os.fstat(lease.fd).st_ino == os.fstat(same.fd).st_ino
        with pytest.raises(errors.Busy):
            client.evict("a")
        device = next(device for device in client.devices() if device.name == "sim:0")
        assert device.leased_bytes == device.used_bytes > 0
    client.evict("a")


def test_what_makes_no_sense_is_refused_with_what_there_is(client: flashd.Client, tmp_path: Path) -> None:
    model(client, tmp_path, "a", 4096)
    with pytest.raises(errors.InvalidArgument, match="there is no device 'cuda:0'") as caught:
        client.lease("a", device="cuda:0")
    assert "host, sim:0" in caught.value.hint
    with pytest.raises(errors.InvalidArgument, match="no tier 'nvme'"):
        client.load("a", "nvme")
    with pytest.raises(errors.InvalidArgument, match="sim:0 is not in the host tier"):
        client.load("a", "host", device="sim:0")


def test_what_leaves_the_card_is_found_in_the_host_tier(client: flashd.Client, tmp_path: Path) -> None:
    tensors = {name: model(client, tmp_path, name, 20 * MiB, seed) for seed, name in enumerate("abc")}
    for name in "abc":
        client.load(name, "device")
    assert client.model("a").devices == ("host",), "the card has room for two"
    assert client.model("b").devices == client.model("c").devices == ("sim:0",)
    with client.lease("a") as lease:
        assert torch.equal(lease.tensors()["w"], tensors["a"])
    client.pin("b")
    client.load("a", "device")
    assert client.model("b").devices == ("sim:0",) and client.model("c").devices == ("host",)
    with client.lease("a", device="sim:0"), pytest.raises(errors.OutOfMemory, match="sim:0 pool") as caught:
        client.load("c", "device")
    assert "memory.device_budget" in caught.value.hint


def test_models_named_in_the_configuration_are_warm_after_a_start(
    client: flashd.Client, daemon: Daemon, tmp_path: Path
) -> None:
    for seed, name in enumerate("ab"):
        model(client, tmp_path, name, MiB, seed)
    client.set_config("memory.prewarm", '["b", "nobody"]')
    client.set_config("memory.prewarm_tier", "device")
    daemon.stop()
    daemon.start()
    with flashd.connect(daemon.address) as again:
        until(lambda: again.model("b").devices == ("sim:0",))
        assert again.model("a").residency == "stored"
    assert "nobody" in daemon.log.read_text()


@pytest.mark.parametrize("value", ['"yes"', "1", '"automatic"'])
def test_whether_memory_is_unified_is_a_yes_a_no_or_auto(client: flashd.Client, value: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"memory\.unified"):
        client.set_config("memory.unified", value)
    assert client.set_config("memory.unified", "true") is True


@pytest.fixture
def manager(short_path: Path) -> Iterator[Manager]:
    made = Manager(short_path / "manager")
    made.open()
    yield made
    made.close()


@pytest.fixture
def managed(bus: PrivateBus, short_path: Path, tmp_path: Path, manager: Manager) -> Iterator[Daemon]:
    running = configured(bus, short_path, tmp_path, SIMULATED)
    start(running, manager)
    yield running
    ended(running)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_warm_is_warm_after_a_restart_and_the_disk_is_not_read(
    managed: Daemon, manager: Manager, tmp_path: Path, end: signal.Signals
) -> None:
    with flashd.connect(managed.address) as client:
        tensors = {name: model(client, tmp_path, name, 9 * MiB, seed) for seed, name in enumerate("abc")}
        client.load("a")
        client.load("b", "device")
        client.load("c")
        client.evict("c")
        until(lambda: len(manager.names()) == 2)
        lease = client.lease("a")
        before = lease.tensors()["w"]
        managed.stop(end)
        for weights in (managed.state / "store").rglob("model.safetensors"):
            weights.write_bytes(b"")  # reading it fails
        start(managed, manager)
        assert torch.equal(before, tensors["a"]), "a client's mapping outlives the daemon"
    with flashd.connect(managed.address) as client:
        assert [client.model(name).devices for name in "abc"] == [("host",), ("sim:0",), ()]
        ledger = {device.name: device.used_bytes for device in client.devices()}
        assert 9 * MiB <= ledger["host"] <= 11 * MiB and 9 * MiB <= ledger["sim:0"] <= 11 * MiB
        client.evict("a")
        until(lambda: len(manager.names()) == 1)
        client.evict("b")
        until(lambda: not manager.names())


def test_a_load_that_is_killed_leaves_nothing_in_the_store(managed: Daemon, manager: Manager, tmp_path: Path) -> None:
    with flashd.connect(managed.address) as client:
        model(client, tmp_path, "a", 40 * MiB)
        for tier in ("host", "device"):
            client._manager("Load", "ssa{sv}", "a", tier, {})
            managed.stop(signal.SIGKILL)
            start(managed, manager)
            with flashd.connect(managed.address) as again:
                assert again.model("a").residency in {"stored", tier}
                again.evict("a")
                assert all(device.used_bytes == 0 for device in again.devices())
                until(lambda: not manager.names())


def spoiled(manager: Manager, how: str) -> None:
    """Replaces what is kept by something that its description does not fit, or the description."""
    with manager.lock:
        for fds in manager.store.values():
            arena, description = fds
            size = os.fstat(arena).st_size
            if how == "description":
                os.close(description)
                fds[1] = os.memfd_create("x", os.MFD_ALLOW_SEALING)
                os.write(fds[1], b"{}")
                fcntl.fcntl(fds[1], fcntl.F_ADD_SEALS, 15)
            elif how == "alone":
                os.close(fds.pop())
            else:
                os.close(arena)
                fds[0] = os.memfd_create("x", os.MFD_ALLOW_SEALING)
                os.ftruncate(fds[0], size if how == "contents" else size // 2)
                fcntl.fcntl(fds[0], fcntl.F_ADD_SEALS, 0x10 | 7)


@pytest.mark.parametrize("how", ["contents", "size", "description", "alone"])
def test_what_does_not_fit_its_description_is_let_go_of(
    managed: Daemon, manager: Manager, tmp_path: Path, how: str
) -> None:
    with flashd.connect(managed.address) as client:
        model(client, tmp_path, "a", 9 * MiB)
        client.load("a")
        until(lambda: len(manager.names()) == 1)
    managed.stop(signal.SIGKILL)
    spoiled(manager, how)
    start(managed, manager)
    with flashd.connect(managed.address) as client:
        assert client.model("a").residency == "stored"
        assert client.devices()[0].used_bytes == 0
        until(lambda: not manager.names())
        assert client.load("a")["residency"] == "host"
        until(lambda: len(manager.names()) == 1)


def test_a_model_that_was_removed_meanwhile_is_let_go_of(managed: Daemon, manager: Manager, tmp_path: Path) -> None:
    with flashd.connect(managed.address) as client:
        model(client, tmp_path, "a", 9 * MiB)
        client.load("a")
        until(lambda: len(manager.names()) == 1)
        managed.stop(signal.SIGKILL)
        shutil.rmtree(managed.state / "store")
        start(managed, manager)
    until(lambda: not manager.names())


def test_leased_memory_maps_for_reading_only(client: flashd.Client, tmp_path: Path) -> None:
    model(client, tmp_path, "a", MiB)
    with client.lease("a", device="sim:0") as lease, pytest.raises(PermissionError):
        mmap.mmap(lease.fd, 0, mmap.MAP_SHARED, mmap.PROT_WRITE)


def test_bench_memory_goes_from_the_call_to_tensors(client: flashd.Client, daemon: Daemon, tmp_path: Path) -> None:
    model(client, tmp_path, "a", 20 * MiB)
    done = subprocess.run(
        [*FLASH, "--bus", daemon.address, "bench", "memory", "a", "--runs", "3", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert set(rows) == {"resident_lease", "resident_map", "host_to_device"}
    assert all(len(row["runs"]) == 3 and row["ratio"] for row in rows.values())
    assert rows["resident_map"]["value"] < rows["resident_lease"]["value"]
    assert client.model("a").leases == 0


def arenas_of(daemon: Daemon) -> int:
    """How many descriptors of arenas the daemon has open, whatever it says."""
    return sum(count for name, count in daemon.open_files().items() if "memfd:flashd:" in name)


def test_what_is_kept_under_a_name_that_leads_elsewhere_is_let_go_of(
    managed: Daemon, manager: Manager, tmp_path: Path
) -> None:
    """Taken over, it could never be forgotten again: it is not known by that name."""
    with flashd.connect(managed.address) as client:
        model(client, tmp_path, "a", 9 * MiB)
        client.load("a")
        until(lambda: len(manager.names()) == 1)
        checkpoint_id = client.model("a").checkpoint
    managed.stop(signal.SIGKILL)
    elsewhere = f"../checkpoints/{checkpoint_id}"
    with manager.lock:
        ((arena, description),) = manager.store.values()
        manager.store.clear()
        os.close(description)
        described = os.memfd_create("x", os.MFD_ALLOW_SEALING)
        os.write(described, json.dumps({"version": 1, "device": "host", "checkpoint": elsewhere}).encode())
        fcntl.fcntl(described, fcntl.F_ADD_SEALS, 15)
        manager.store[f"flashd-arena.host.{elsewhere}"] = [arena, described]
    start(managed, manager)
    with flashd.connect(managed.address) as client:
        assert client.model("a").residency == "stored" and arenas_of(managed) == 0
        until(lambda: not manager.names())


def test_what_was_on_a_card_that_is_gone_is_let_go_of(managed: Daemon, manager: Manager, tmp_path: Path) -> None:
    with flashd.connect(managed.address) as client:
        model(client, tmp_path, "a", 9 * MiB)
        client.load("a", "device")
        until(lambda: len(manager.names()) == 1)
    managed.stop(signal.SIGKILL)
    managed.config.write_text(CONFIG)
    start(managed, manager)
    with flashd.connect(managed.address) as client:
        assert client.model("a").residency == "stored" and arenas_of(managed) == 0
        until(lambda: not manager.names())


def test_what_the_configuration_wants_warm_takes_nothing_from_what_is(
    managed: Daemon, manager: Manager, tmp_path: Path
) -> None:
    with flashd.connect(managed.address) as client:
        for seed, name in enumerate("abc"):
            model(client, tmp_path, name, 40 * MiB if name < "c" else MiB, seed)
        client.load("a")
        client.set_config("memory.prewarm", '["b", "c"]')
        until(lambda: len(manager.names()) == 1)
    managed.stop(signal.SIGKILL)
    start(managed, manager)
    with flashd.connect(managed.address) as client:
        until(lambda: client.model("c").residency == "host")
        assert [client.model(name).residency for name in "ab"] == ["host", "stored"]
        until(lambda: "used since" in managed.log.read_text())


def test_a_daemon_stops_in_the_middle_of_loads_and_evictions(managed: Daemon, manager: Manager, tmp_path: Path) -> None:
    with flashd.connect(managed.address) as client:
        for seed, name in enumerate("abc"):
            model(client, tmp_path, name, 30 * MiB, seed)
    for _ in range(3):
        with flashd.connect(managed.address) as client:
            for name, tier in (("a", "host"), ("b", "device"), ("c", "host"), ("c", "device"), ("a", "device")):
                client._manager("Load", "ssa{sv}", name, tier, {})
            ended(managed)
        start(managed, manager)
        with flashd.connect(managed.address) as client:
            warm = {f"{device}:{name}" for name in "abc" for device in client.model(name).devices}
            assert len(warm) == len(manager.names()) and arenas_of(managed) == len(warm)


def test_an_image_is_shared_with_servers_of_the_same_user_and_build(
    daemon: Daemon, client: flashd.Client, tmp_path: Path
) -> None:
    model(client, tmp_path, "a", 5 * MiB)
    layout = json.dumps({"w": {"dtype": "U8", "shape": [4 * MiB], "data_offsets": [0, 4 * MiB]}})
    made = HostArena(4 * MiB, "image", HostDevice.probe().huge_pages)
    ctypes.memset(made.address, 7, 4 * MiB)
    made.seal()
    used = client.devices()[1].used_bytes
    with flashd.connect(daemon.address) as maker:
        maker.publish_image("a", "build", "sim:0", made.fd, layout, 4 * MiB)
        assert client.devices()[1].used_bytes >= used + 4 * MiB, "it is in the ledger"
        assert client.model("a").devices == ("sim:0",)
        until(lambda: client.model("a").leases == 1)  # besides, it is written to the store now
        with pytest.raises(errors.AlreadyExists):
            client.publish_image("a", "build", "sim:0", made.fd, layout.replace("w", "v"), 4 * MiB)
        with client.lease_image("a", "build", "sim:0") as lease:
            assert [tensor.name for tensor in lease.layout.tensors] == ["w"]
            assert os.fstat(lease.fd).st_ino == os.fstat(made.fd).st_ino and lease.buffer[123] == 7
            with pytest.raises(errors.Busy):
                client.evict("a")
        for build in ("another build", "", "x" * 65):
            with pytest.raises((errors.NotFound, errors.InvalidArgument)):
                client.lease_image("a", build, "sim:0")
    until(lambda: client.model("a").leases == 0)
    client.evict("a")
    with pytest.raises(errors.InvalidSource):
        client.publish_image("a", "other", "sim:0", made.fd, layout.replace(str(4 * MiB), str(5 * MiB)), 4 * MiB)
    with pytest.raises(errors.InvalidArgument):
        client.publish_image("a", "other", "host", made.fd, layout, 4 * MiB)
    with Path("/dev/null").open("rb") as nothing, pytest.raises(errors.InvalidArgument):
        client.publish_image("a", "other", "sim:0", nothing.fileno(), layout, 4 * MiB)
    with pytest.raises(errors.OutOfMemory):
        client.publish_image("a", "other", "sim:0", made.fd, layout, 1 << 40)
    assert client.devices()[1].used_bytes == 0 and client.model("a").leases == 0, "nothing is left of what failed"
    made.close()
