# SPDX-License-Identifier: Apache-2.0
"""The Python API, against a real daemon."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Daemon, make_source
from safetensors.torch import save_file
from waiting import PATIENCE_S

import flashd
from flashd import errors


@pytest.fixture
def client(daemon: Daemon) -> Iterator[flashd.Client]:
    with flashd.connect(daemon.address) as connected:
        yield connected


def weights(folder: Path) -> dict[str, torch.Tensor]:
    embedding = torch.randn(300, 300)
    tensors = {
        "embedding": embedding,
        "head": embedding.clone(),
        "half": torch.randn(7, 3).bfloat16(),
        "eighth": torch.randn(16).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_a_lease_is_the_weights_themselves_under_all_their_names(client: flashd.Client, tmp_path: Path) -> None:
    expected = weights(tmp_path / "a")
    assert client.import_(tmp_path / "a", "a").tensor_count == 5
    with client.lease("a") as lease:
        tensors = lease.tensors()
        assert set(tensors) == set(expected)
        for name, tensor in expected.items():
            assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape
            assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name
        region = np.frombuffer(lease.buffer, np.uint8).ctypes.data
        assert region <= tensors["half"].data_ptr() < region + lease.size_bytes, "nothing was copied"
        with pytest.raises(PermissionError):
            mmap.mmap(lease.fd, 0, mmap.MAP_SHARED, mmap.PROT_WRITE)
        assert client.model("a").leases == 1
        with pytest.raises(errors.Busy):
            client.evict("a")
    assert client.model("a").leases == 0
    client.evict("a")
    assert torch.equal(tensors["embedding"], expected["embedding"]), "mapped memory outlives its lease"


def test_a_lease_ends_with_its_client(client: flashd.Client, daemon: Daemon, tmp_path: Path) -> None:
    weights(tmp_path / "a")
    client.import_(tmp_path / "a", "a")
    other = flashd.connect(daemon.address)
    other.lease("a")
    assert client.model("a").leases == 1
    other.close()
    for _ in client.watch():
        if client.model("a").leases == 0:
            break


def test_many_shards_travel_in_several_messages(client: flashd.Client, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    for number in range(40):
        save_file(
            {f"t{number}": torch.full((4,), float(number))}, folder / f"model-{number + 1:05d}-of-00040.safetensors"
        )
    before = len(os.listdir("/proc/self/fd"))
    assert client.import_(folder, "sharded").tensor_count == 40
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_progress_is_told_and_a_job_can_be_found_again(client: flashd.Client, tmp_path: Path) -> None:
    seen: list[str] = []
    client.import_(make_source(tmp_path / "a"), "a", on_progress=lambda job: seen.append(job.state))
    assert seen[-1] == "done"
    (job,) = client.jobs()
    assert client.job(job.number).subject == "a"
    with pytest.raises(errors.NotFound):
        client.job(99)


def test_a_thousand_names_are_told_apart(client: flashd.Client, tmp_path: Path) -> None:
    source = make_source(tmp_path / "a")
    for name in ("a", "A/b", "A_2fb", "é ü", "模型"):
        assert client.import_(source, name).name == name
    assert {model.name for model in client.models()} == {"a", "A/b", "A_2fb", "é ü", "模型"}
    assert client.model("模型").path != client.model("a").path


def test_errors_keep_their_class_and_hint(client: flashd.Client, tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound) as missing:
        client.swap("nope")
    assert missing.value.hint and "nope" in missing.value.message
    (tmp_path / "model.safetensors").write_bytes(b"nonsense" * 4)
    with pytest.raises(errors.InvalidSource):
        client.import_(tmp_path / "model.safetensors", "bad")
    with pytest.raises(errors.InvalidSource):
        client.import_(tmp_path / "nothing here", "bad")
    with pytest.raises(errors.InvalidArgument):
        client.set_config("nope", "1")


def test_whoever_waits_when_the_daemon_ends_is_told(client: flashd.Client, daemon: Daemon) -> None:
    ended: list[BaseException | None] = []

    def watch() -> None:
        for _ in client.watch():
            pass
        ended.append(None)

    watcher = threading.Thread(target=watch)
    watcher.start()
    client.stop()
    watcher.join(timeout=PATIENCE_S)
    assert ended == [None]
    assert daemon.process and daemon.process.wait(timeout=PATIENCE_S) == 0
    with pytest.raises(errors.Unavailable) as gone:
        client.models()
    assert "flash start" in gone.value.hint


def test_nothing_is_imported_until_it_is_used() -> None:

    code = (
        "import sys, flashd; print(sorted(m for m in sys.modules if m.split('.')[0] in {'dbus_next', 'httpx', 'rich'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
