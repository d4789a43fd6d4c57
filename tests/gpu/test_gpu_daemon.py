# SPDX-License-Identifier: Apache-2.0
"""The daemon on a GPU: leases in other processes, tiers, and processes that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from machine import Machine, check_freed, used_bytes
from waiting import until

import flashd
from flashd import errors
from flashd.client.results import Device
from flashd.io import cuda
from flashd.units import GiB, MiB

SIZE = 300 * MiB

_HOLDER = """
import sys, time
import flashd
client = flashd.connect(sys.argv[1])
lease = client.lease("a", device="cuda:0")
tensor = lease.tensors()["w"]
print(tensor.device, int(tensor[:1000].to("cpu").sum()), flush=True)
time.sleep(60)
"""


def used_with_context(client: flashd.Client) -> int:
    """What is in use of the card when the daemon has begun to use it, and has nothing on it."""
    client.load("a", "device")
    client.evict("a")
    return used_bytes()


def weights_of(machine: Machine) -> Path:
    """The file of the only model there is."""
    (weights,) = (machine.daemon.state / "store").rglob("model.safetensors")
    return weights


def cache(path: Path, *, is_wanted: bool) -> None:
    """Puts a file into the page cache, or out of it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while is_wanted and file.read(16 * MiB):
            pass


def held(machine: Machine) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", _HOLDER, machine.daemon.address], stdout=subprocess.PIPE, text=True)


def card_of(client: flashd.Client) -> Device:
    return next(device for device in client.devices() if device.name == "cuda:0")


def settled_driver_bytes(client: flashd.Client) -> int:
    """What the driver counts when it says the same again after a while: what was killed before is cleared up then, and
    the daemon, which asks once a second, has asked anew."""
    before_bytes, found_bytes = -1, 0
    deadline = time.monotonic() + 30
    while before_bytes != found_bytes or not found_bytes:
        assert time.monotonic() < deadline
        time.sleep(1.5)
        client.devices()  # has the driver asked
        time.sleep(0.5)
        before_bytes, found_bytes = found_bytes, card_of(client).driver_used_bytes
    return found_bytes


def test_the_card_is_shown_with_its_attributes(machine: Machine) -> None:
    with machine.connect() as client:
        card = card_of(client)
        until(lambda: card_of(client).driver_used_bytes > 0)
    gpu = cuda.gpus()[0]
    assert (card.kind, card.model, card.uuid) == ("cuda", gpu.model, gpu.uuid)
    assert card.exports_memory and card.maps_memory
    assert card.integrated is gpu.is_integrated and card.reads_host_pages is gpu.reads_host_pages
    assert card.budget_bytes < card.total_bytes == gpu.total_bytes


def test_what_others_use_of_the_card_is_seen_by_the_driver_and_not_by_our_ledger(machine: Machine) -> None:
    with machine.connect() as client:
        machine.add(client, "a", SIZE)
        before_bytes = settled_driver_bytes(client)
        other = cuda.allocate(0, GiB)
        try:
            assert settled_driver_bytes(client) - before_bytes >= GiB
            assert card_of(client).used_bytes == 0
            client.load("a", "device")
            assert SIZE <= card_of(client).used_bytes < SIZE + 2 * MiB
            assert settled_driver_bytes(client) - before_bytes >= GiB + SIZE
        finally:
            os.close(other)
        client.evict("a")
        assert settled_driver_bytes(client) - before_bytes < GiB
        assert card_of(client).used_bytes == 0


def test_a_lease_is_the_weights_on_the_card_and_nothing_is_copied(machine: Machine) -> None:
    with machine.connect() as client:
        expected = machine.add(client, "a", SIZE)
        client.load("a", "device")
        before = used_bytes()
        with client.lease("a", device="cuda:0") as lease, client.lease("a", device="cuda:0") as other:
            found, same = lease.tensors()["w"], other.tensors()["w"]
            assert found.device == same.device == torch.device("cuda:0")
            assert torch.equal(found, expected.cuda()) and torch.equal(found[-5:], same[-5:])
            del found, same
            torch.cuda.empty_cache()
            assert used_bytes() - before < SIZE // 2, "there is one copy"
            with pytest.raises(errors.InvalidArgument, match="tensors"):
                _ = lease.buffer
        client.evict("a")


def test_a_client_killed_with_a_lease_leaves_nothing(machine: Machine) -> None:
    with machine.connect() as client:
        expected = machine.add(client, "a", SIZE)
        before = used_with_context(client)
        holder = held(machine)
        assert holder.stdout is not None
        assert holder.stdout.readline().split() == ["cuda:0", str(int(expected[:1000].sum()))]
        assert client.model("a").leases == 1
        with holder:
            holder.kill()
        until(lambda: client.model("a").leases == 0)
        client.evict("a")
        check_freed(before)


def test_up_and_down_the_tiers(machine: Machine) -> None:
    with machine.connect() as client:
        expected = machine.add(client, "a", SIZE)
        client.load("a")
        time.sleep(0.5)  # until the driver's figures follow
        assert client.load("a", "device")["residency"] == "device"
        with client.lease("a", device="cuda:0") as lease:
            assert torch.equal(lease.tensors()["w"].cpu(), expected)
        client.evict("a")
        client.load("a", "device")
        client.load("a")
        with client.lease("a") as lease:
            assert torch.equal(lease.tensors()["w"], expected), "it came from the card"
        client.evict("a")
        assert all(device.used_bytes == 0 for device in client.devices())


@pytest.mark.parametrize(
    "kind", ["nvme to host", "nvme to device", "page cache to device", "host to device", "device to host"]
)
def test_a_daemon_killed_during_a_transfer_leaves_nothing(machine: Machine, kind: str) -> None:
    source, _, target = kind.partition(" to ")
    with machine.connect() as client:
        machine.add(client, "a", 1 * GiB)
        before = used_with_context(client)
        cache(weights_of(machine), is_wanted=source == "page cache")
        if source in {"host", "device"}:
            client.load("a", source)
        client._manager("Load", "ssa{sv}", "a", target, {})
        time.sleep(0.05)
        machine.daemon.stop(signal.SIGKILL)
    machine.start()
    with machine.connect() as client:
        kept = client.model("a").devices
        assert set(kept) <= {"host", "cuda:0"} and (kept or source not in {"host", "device"})
        client.evict("a")
        assert all(device.used_bytes == 0 for device in client.devices())
        client.load("a", target)
        client.evict("a")
        check_freed(before)


def test_what_was_warm_on_the_card_is_warm_after_the_daemon_was_killed(machine: Machine) -> None:
    with machine.connect() as client:
        expected = machine.add(client, "a", SIZE)
        machine.add(client, "b", SIZE, 1)
        client.load("a", "device")
        client.load("b")
        until(lambda: len(machine.manager.names()) == 2)
        machine.daemon.stop(signal.SIGKILL)
    for weights in (machine.daemon.state / "store").rglob("model.safetensors"):
        weights.rename(weights.with_suffix(".away"))  # reading it fails
    started = time.monotonic()
    machine.start()
    print(f"ready after {time.monotonic() - started:.2f} s")
    with machine.connect() as client:
        assert client.model("a").devices == ("cuda:0",) and client.model("b").devices == ("host",)
    for weights in (machine.daemon.state / "store").rglob("model.away"):
        weights.rename(weights.with_suffix(".safetensors"))
    with machine.connect() as client:
        with client.lease("a", device="cuda:0") as lease:
            assert torch.equal(lease.tensors()["w"].cpu(), expected)
        client.evict("a")
        client.evict("b")
        until(lambda: not machine.manager.names())


def test_a_card_that_is_full_is_said_to_be_and_what_was_there_stays(machine: Machine) -> None:
    with machine.connect() as client:
        machine.add(client, "a", SIZE)
        expected = machine.add(client, "b", SIZE, 1)
        client.load("b", "device")
        free, _ = cuda.memory_info(0)
        hog = cuda.allocate(0, (free - 100 * MiB) // (2 * MiB) * (2 * MiB))
        try:
            with pytest.raises(errors.OutOfMemory, match="are free, according to its driver") as caught:
                client.load("a", "device")
            assert "nvidia-smi" in caught.value.hint
            assert client.model("a").residency == "stored"
            with client.lease("b", device="cuda:0") as lease:
                assert torch.equal(lease.tensors()["w"][:MiB].cpu(), expected[:MiB])
        finally:
            os.close(hog)
        client.load("a", "device")
        client.evict("a")
        client.evict("b")


@pytest.mark.parametrize("source", ["nvme", "page cache"])
def test_a_corrupt_block_is_found_on_the_way_to_the_card(machine: Machine, source: str) -> None:
    with machine.connect() as client:
        machine.add(client, "a", SIZE)
        before = used_with_context(client)
        weights = weights_of(machine)
        weights.chmod(0o600)
        with weights.open("r+b") as file:
            file.seek(100 * MiB)
            file.write(b"\xff\x00\xff")
        cache(weights, is_wanted=source == "page cache")
        for _ in range(3):
            with pytest.raises(errors.CorruptCheckpoint, match="does not match its digest"):
                client.load("a", "device")
        assert client.model("a").residency == "stored"
        assert next(device for device in client.devices() if device.name == "cuda:0").used_bytes == 0
        check_freed(before)


@pytest.mark.parametrize("machine", ["unified = true\n"], indirect=True)
def test_on_unified_memory_there_is_one_copy_and_the_card_reads_it(machine: Machine) -> None:
    """Forced here: a card with memory of its own reads the host's over the bus, slowly and correctly."""
    with machine.connect() as client:
        expected = machine.add(client, "a", SIZE)
        kinds = {device.name: device.kind for device in client.devices()}
        assert kinds == {"host": "host", "cuda:0": "unified"}
        client.load("a", "device")
        torch.cuda.empty_cache()
        before = used_bytes()
        with client.lease("a", device="cuda:0") as lease, client.lease("a") as same:
            assert lease.memory == "host" and os.fstat(lease.fd).st_ino == os.fstat(same.fd).st_ino
            tensor = lease.tensors()["w"]
            assert tensor.device == torch.device("cuda:0")
            assert torch.equal(tensor[:MiB], expected[:MiB].cuda()) and torch.equal(tensor[-9:], expected[-9:].cuda())
            torch.cuda.empty_cache()
            assert used_bytes() - before < SIZE // 4
            assert {device.used_bytes for device in client.devices()} == {client.devices()[0].used_bytes}
            del tensor
        assert client.model("a").devices == ("host", "cuda:0")
        client.evict("a")
