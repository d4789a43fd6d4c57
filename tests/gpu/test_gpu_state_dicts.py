# SPDX-License-Identifier: Apache-2.0
"""State dicts from and to a real GPU, with and without a daemon that holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from machine import Machine

import flashd
from flashd import errors
from flashd.client.state_dicts import DeviceMap


def some_tensors(device: str) -> dict[str, torch.Tensor]:
    base = torch.randn(300, 500, device=device)
    return {
        "w": base,
        "view": base.t()[3:200:2],
        "half": base.to(torch.bfloat16),
        "z": torch.randn(7, 3, dtype=torch.complex128, device=device).conj(),
        "three": torch.ones(3, 3, device=device),
        "big": torch.arange(40 << 20, device=device, dtype=torch.int32),
        "none": torch.empty(0, 4, device=device),
    }


@pytest.fixture
def no_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHD_BUS_ADDRESS", "unix:path=/nonexistent")


@pytest.mark.parametrize("device_map", [{"": 0}, 0, "cuda", "cuda:0", {"": torch.device("cuda", 0)}])
def test_from_the_gpu_and_back(device_map: DeviceMap, no_daemon: None, tmp_path: Path) -> None:
    saved = some_tensors("cuda")
    flashd.save_dict(saved, tmp_path / "saved")
    found = flashd.load_dict(tmp_path / "saved", device_map)
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert found[name].device == torch.device("cuda", 0) and found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    found["w"].add_(1)
    assert torch.equal(flashd.load_dict(tmp_path / "saved", device_map)["w"], saved["w"])


def test_parts_to_the_gpu(no_daemon: None, tmp_path: Path) -> None:
    saved = {f"layer.{name}": tensor for name, tensor in some_tensors("cpu").items()}
    flashd.save_dict(saved, tmp_path / "saved")
    found = flashd.load_dict(tmp_path / "saved", {"": "cpu", "layer.w": 0, "layer.big": 0})
    assert {name for name, tensor in found.items() if tensor.is_cuda} == {"layer.w", "layer.big"}
    assert all(torch.equal(found[name].cpu(), saved[name]) for name in saved)


def test_a_changed_bit_is_noticed_on_its_way_to_the_gpu(no_daemon: None, tmp_path: Path) -> None:
    flashd.save_dict({"w": torch.ones(3000)}, tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(errors.CorruptCheckpoint):
        flashd.load_dict(tmp_path / "saved", {"": 0})


def test_what_the_daemon_has_on_the_gpu_comes_from_there(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHD_BUS_ADDRESS", machine.daemon.address)
    saved = some_tensors("cpu")
    flashd.save_dict(saved, tmp_path / "saved")
    with flashd.connect() as client:
        client.import_(tmp_path / "saved", "mine")
        client.load("mine", "device")
    path = tmp_path / "saved" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 255  # visible to every reader of the file
    path.write_bytes(raw)
    found = flashd.load_dict(tmp_path / "saved", {"": 0})
    assert all(torch.equal(found[name].cpu(), saved[name]) and found[name].is_cuda for name in saved)
    found["w"].zero_()
    again = flashd.load_dict(tmp_path / "saved", {"": 0})
    assert torch.equal(again["w"].cpu(), saved["w"])
