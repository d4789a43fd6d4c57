# SPDX-License-Identifier: Apache-2.0
"""flashtensors' interface against a real daemon: models, information, and tensors that the daemon has in memory."""

from __future__ import annotations

import inspect
import json
import logging
import subprocess
import sys
from pathlib import Path

import flashtensors as ft
import pytest
import torch
from conftest import Daemon, make_source
from flashtensors import flash

import flashd
from flashd import errors
from flashd.compat import settings
from flashd.units import GiB, MiB


@pytest.fixture(autouse=True)
def on_this_bus(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHD_BUS_ADDRESS", daemon.address)


def test_a_folder_is_registered_once_and_described(daemon: Daemon, tmp_path: Path) -> None:
    folder = make_source(tmp_path / "my-tune")
    result = ft.register_model(str(folder), backend="transformers", torch_dtype="float32")
    assert result["status"] == "success" and result["model"] == "my-tune" and result["metrics"]["download_time"] > 0
    assert (Path(result["path"]) / "config.json").is_file() and result["metrics"]["model_size"] == 12000
    again = ft.register_model(str(folder), backend="vllm")
    assert again["path"] == result["path"] and again["metrics"]["download_time"] == 0.0
    info = ft.get_model_info("my-tune")
    assert info is not None and ft.list_models() == {"my-tune": info}
    assert (info["size"], info["dtype"], info["architecture"]) == (12000, "float32", "TinyForNothing")
    assert info["residency"] == "stored" and not info["active"] and info["path"] == result["path"]
    make_source(folder, seed=2)
    assert ft.register_model(str(folder))["path"] == result["path"], "what is there stays"
    assert ft.register_model(str(folder), force=True)["path"] != result["path"]


def test_what_there_is_not_and_cannot_be(daemon: Daemon, tmp_path: Path) -> None:
    assert ft.get_model_info("nobody") is None
    with pytest.raises(errors.NotFound):
        ft.register_model(str(tmp_path / "nothing"))
    with pytest.raises(errors.InvalidArgument, match="sglang"):
        ft.register_model("ada", backend="sglang")  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidSource):
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "model.safetensors").write_bytes(b"nonsense" * 10)
        ft.register_model(str(tmp_path / "bad"))


def test_another_dtype_than_stored_is_told(daemon: Daemon, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(make_source(tmp_path / "tune"))
    for dtype, is_told in (("bfloat16", True), ("float32", False), ("auto", False)):
        caplog.clear()
        ft.register_model(folder, torch_dtype=dtype)
        assert bool(caplog.messages) is is_told, caplog.messages


def test_a_running_daemon_keeps_its_settings_and_says_what_differs(
    daemon: Daemon, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    before = daemon.config.read_text()
    ft.configure(storage_path=tmp_path / "models", chunk_size=64 * MiB, num_threads=12, gpu_memory_utilization=0.85)
    told = "\n".join(caplog.messages)
    assert (
        "flash config streamer.block 67108864" in told and f"flash config store.path {tmp_path}/models/flashd" in told
    )
    assert "streamer.depth" not in told, "it is so already"
    assert daemon.config.read_text() == before
    ft.connect("0.0.0.0", 8073)
    ft.activate_vllm_integration()
    ft.cleanup_gpu()
    ft.shutdown_server()
    ft.connect()  # still running, because others started it


@pytest.mark.parametrize("given", [{"mem_pool_size": 0}, {"chunk_size": -1}, {"gpu_memory_utilization": 1.5}])
def test_settings_that_make_no_sense(given: dict[str, int], daemon: Daemon) -> None:
    with pytest.raises(errors.InvalidArgument, match=next(iter(given))):
        ft.configure(**given)  # type: ignore[arg-type]


def test_a_pool_larger_than_the_machine_is_no_limit(caplog: pytest.LogCaptureFixture, daemon: Daemon) -> None:
    assert settings.wanted(None, GiB, None, None) == {"memory.host_budget": GiB}
    assert settings.wanted(None, 1 << 50, None, None) == {}
    assert "uses its default" in caplog.text


def test_without_a_daemon_nothing_is_there_to_clean_up(monkeypatch: pytest.MonkeyPatch, daemon: Daemon) -> None:
    monkeypatch.setenv("FLASHD_BUS_ADDRESS", "unix:path=/nonexistent")
    ft.cleanup_gpu()
    ft.shutdown_server()
    with pytest.raises(errors.Unavailable, match="nonexistent"):
        ft.connect()


@pytest.fixture
def warm(daemon: Daemon, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Tensors in a folder, of which the daemon made a model and has it in memory."""
    saved = {"w": torch.randn(300, 300), "z": torch.randn(7, dtype=torch.complex128), "v": torch.ones(5)}
    saved["tied"] = saved["w"]
    flash.save_dict(saved, tmp_path / "saved")
    with flashd.connect() as client:
        client.import_(tmp_path / "saved", "mine")
        client.load("mine")
    return tmp_path / "saved", saved


def spoil(folder: Path) -> None:
    """Whoever reads the file, sees it."""
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 255
    path.write_bytes(raw)


def test_tensors_that_the_daemon_has_in_memory_come_from_there(
    warm: tuple[Path, dict[str, torch.Tensor]], daemon: Daemon
) -> None:
    folder, saved = warm
    spoil(folder)
    loading, found = flash.load_dict_non_blocking(folder.name, {"": "cpu"}, storage_path=folder.parent)
    assert loading.finished
    loading.wait()
    assert found.keys() == saved.keys() and found["tied"] is found["w"]
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    found["w"].zero_()
    assert torch.equal(flash.load_dict(folder)["w"], saved["w"]), "writing changes one's own copy"
    with flashd.connect() as client:
        assert client.model("mine").leases == 0
        client.evict("mine")
    assert torch.equal(found["v"], saved["v"]), "what was loaded stays"
    with pytest.raises(errors.CorruptCheckpoint):
        flash.load_dict(folder)


def test_the_model_of_saved_tensors_is_leased_bit_for_bit(warm: tuple[Path, dict[str, torch.Tensor]]) -> None:
    _, saved = warm
    with flashd.connect() as client, client.lease("mine") as lease:
        found = lease.tensors()
        assert all(torch.equal(found[name], saved[name]) and found[name].dtype == saved[name].dtype for name in saved)
        del found


def test_flashd_and_flashtensors_are_two_faces() -> None:
    """Both have the functions for tensors in a folder, and each its own `connect`."""
    shared = {"__version__", "connect", "load_dict", "load_dict_non_blocking", "save_dict"}
    assert set(ft.__all__) & set(flashd.__all__) == shared
    assert all(getattr(flashd, name) == getattr(ft, name) for name in shared - {"connect"})
    assert not hasattr(flashd, "register_model")
    assert ft.connect(server_host="0.0.0.0", server_port=8073) is None  # type: ignore[func-returns-value]
    with flashd.connect() as client:
        assert client.models() == []
    with pytest.raises(TypeError):
        flashd.connect(server_host="0.0.0.0")  # type: ignore[call-arg]


def test_importing_flashd_imports_nothing_of_it_yet() -> None:
    names = ("torch", "flashd.client.client")
    code = f"import json, sys, flashd; print(json.dumps([name in sys.modules for name in {names}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, False]


def test_every_function_is_typed_documented_and_said_what_it_maps_to() -> None:
    page = (Path(__file__).parents[2] / "packaging" / "docs" / "migrating.md").read_text()
    functions = {name: getattr(ft, name) for name in ft.__all__ if name not in {"__version__", "flash"}}
    assert len(functions) == 12
    for name, function in functions.items():
        assert inspect.getdoc(function), name
        signature = inspect.signature(function)
        annotations = [signature.return_annotation, *(of.annotation for of in signature.parameters.values())]
        assert inspect.Signature.empty not in annotations, name
        assert f"{name}(" in page, name
