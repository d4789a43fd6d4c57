# SPDX-License-Identifier: Apache-2.0
"""Defects of flashtensors and ServerlessLLM with a running server, which flashd does not have.

Their defects with tensors alone (lost tails, short writes over 2 GiB, stale bytes, views, dtypes, checksums) is
in tests/unit/test_state_dicts.py, with tensors on a GPU in tests/gpu/test_gpu_state_dicts.py.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import flashtensors as ft
import listening
import pytest
import torch
from conftest import Daemon, make_source
from flashtensors import flash
from safetensors.torch import load_file
from waiting import PATIENCE_S

import flashd
from flashd import Client, errors
from flashd.units import MiB

NOBODY = "no/body"


@pytest.fixture
def client(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("FLASHD_BUS_ADDRESS", daemon.address)
    with flashd.connect() as client:
        yield client


def weights(client: Client, name: str) -> dict[str, torch.Tensor]:
    with client.lease(name) as lease:
        return {name: tensor.clone() for name, tensor in lease.tensors().items()}


def test_a_model_larger_than_the_pool_is_refused_and_the_next_one_loads(daemon: Daemon, tmp_path: Path) -> None:
    daemon.stop()
    daemon.config.write_text(daemon.config.read_text() + '[memory]\nhost_budget = "64KiB"\nhuge_pages = "off"\n')
    daemon.start()
    with flashd.connect(daemon.address) as client:
        client.import_(make_source(tmp_path / "large", elements=40_000), "large")
        client.import_(make_source(tmp_path / "small"), "small")
        with pytest.raises(errors.OutOfMemory, match="164 kB do not fit") as refused:
            client.load("large")
        assert refused.value.hint
        assert client.load("small")["residency"] == "host"


@pytest.mark.timeout(60)
def test_a_disk_that_fails_ends_the_load_and_not_the_daemon(client: Client, daemon: Daemon, tmp_path: Path) -> None:
    for name in ("bad", "good"):
        client.import_(make_source(tmp_path / name, seed=len(name), elements=9 * MiB // 4), name)
    (stored,) = (daemon.state / "store").rglob(f"{client.model('bad').checkpoint}/model.safetensors")
    with stored.open("r+b") as file:
        file.truncate(5 * MiB)
    for _ in range(3):  # a failed load releases everything
        with pytest.raises((errors.TransferFailed, errors.CorruptCheckpoint)):
            client.load("bad")
    assert client.model("bad").residency == "stored"
    assert client.load("good")["residency"] == "host"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.swap(NOBODY),
        lambda client: client.load(NOBODY),
        lambda client: client.lease(NOBODY),
        lambda client: client.evict(NOBODY),
        lambda client: flash.load_dict(NOBODY),
    ],
    ids=["swap", "load", "lease", "evict", "load_dict"],
)
def test_nobody_waits_for_a_model_that_is_not_there(ask: Callable[[Client], object], client: Client) -> None:
    with pytest.raises(errors.NotFound):
        ask(client)
    assert ft.get_model_info(NOBODY) is None


@pytest.mark.parametrize("end", ["runs out of memory", "is killed"])
def test_a_client_that_ends_badly_ends_alone(end: str, client: Client, daemon: Daemon, tmp_path: Path) -> None:
    saved = {"w": torch.arange(128 * MiB // 4, dtype=torch.float32)}
    flash.save_dict(saved, tmp_path / "saved")
    client.import_(tmp_path / "saved", "mine")
    code = f"""
import os, resource, signal, sys
import torch, flashd
client = flashd.connect()
lease = client.lease("mine")
if {end == "is killed"}:
    print("has it", flush=True)
    signal.pause()
used = int(open("/proc/self/statm").read().split()[0]) * {resource.getpagesize()}
resource.setrlimit(resource.RLIMIT_AS, (used + {96 * MiB}, -1))  # enough for threads, and not for the tensors
flashd.load_dict({str(tmp_path / "saved")!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        if end == "is killed":
            assert process.stdout is not None and process.stdout.readline() == "has it\n"
            assert client.model("mine").leases == 1
            process.send_signal(signal.SIGKILL)
        _, words = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode != 0
    assert end == "is killed" or "OutOfMemory: 134 MB of memory" in words, words
    assert daemon.process is not None and daemon.process.poll() is None
    assert torch.equal(weights(client, "mine")["w"], saved["w"])
    assert client.model("mine").leases == 0


@pytest.mark.timeout(120)
def test_a_conversion_that_was_killed_does_not_count_as_done(tmp_path: Path) -> None:
    """The daemon's own is in test_daemon.py; this one is save_dict's, which needs none."""
    saved = {"w": torch.ones(1000)}
    flash.save_dict(saved, tmp_path / "saved")
    code = f"""
import torch, flashd
print("ready", flush=True)
while True:
    flashd.save_dict({{"w": torch.full((64 << 20,), 7, dtype=torch.uint8)}}, {str(tmp_path / "saved")!r})
    flashd.save_dict({{"w": torch.ones(1000)}}, {str(tmp_path / "saved")!r})
"""
    for delay_ms in (0, 15, 30, 60, 90, 120):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(delay_ms / 1000)  # wherever it is then
            process.kill()
        found = flash.load_dict(tmp_path / "saved")["w"]
        assert torch.equal(found, saved["w"]) or torch.equal(found, torch.full((64 << 20,), 7, dtype=torch.uint8))
    flash.save_dict(saved, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"], "what killed processes had begun is gone"


def test_a_conversion_that_fails_keeps_the_good_copy(client: Client, tmp_path: Path) -> None:
    folder = make_source(tmp_path / "mine")
    before = ft.register_model(str(folder))
    kept = weights(client, "mine")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(errors.InvalidSource):
        ft.register_model(str(folder), force=True)
    client.evict("mine")
    found = weights(client, "mine")
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    assert ft.register_model(str(folder))["path"] == before["path"]


def test_what_is_warm_stays_warm_whatever_is_loaded_after_it(client: Client, daemon: Daemon, tmp_path: Path) -> None:
    """Once in memory, weights are not read from the disk again: there they are spoiled."""
    originals = {}
    for seed, name in enumerate("abc"):
        folder = make_source(tmp_path / name, seed=seed)
        originals[name] = load_file(folder / "model.safetensors")
        ft.register_model(str(folder))
        client.load(name)
    for stored in (daemon.state / "store").rglob("model.safetensors"):
        with stored.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(bytes(100))
    for name in "abcab":
        assert torch.equal(weights(client, name)["layer.1.weight"], originals[name]["layer.1.weight"])


def test_nobody_is_reached_over_the_network(client: Client, daemon: Daemon, tmp_path: Path) -> None:
    assert daemon.process is not None
    client.import_(make_source(tmp_path / "mine"), "mine")
    ft.configure(server_host="0.0.0.0", server_port=8073)
    weights(client, "mine")
    assert listening.addresses(daemon.process.pid) == set()
