# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes from the inbox: adapters find their base or wait for it, and trainers' folders are understood."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Daemon, Remote, import_model, make_source
from safetensors.numpy import load_file, save_file
from waiting import eventually

from flashd.dbus import wire

COLUMNS, ROWS, RANK = 60, 50, 2
MERGED_S = 100.0
pytestmark = pytest.mark.timeout(300)


def make_adapter(folder: Path, base: str, *, seed: int = 1) -> np.ndarray:
    """An adapter for what make_source makes; returns what it adds."""
    random = np.random.default_rng(seed)
    a = random.standard_normal((RANK, COLUMNS), dtype=np.float32)
    b = random.standard_normal((ROWS, RANK), dtype=np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    factors = {"base_model.model.layer.1.lora_A.weight": a, "base_model.model.layer.1.lora_B.weight": b}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return 1.5 * (b @ a)


def make_base(folder: Path) -> np.ndarray:
    make_source(folder)
    weight = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    save_file({"layer.1.weight": weight, "norm.weight": np.ones(7, np.float32)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    return weight


async def model_of(remote: Remote, name: str) -> dict[str, Any]:
    """A model's properties, once it is there: merging imports torch first, and that takes what it takes."""

    async def is_there() -> bool:
        return wire.model_path(name) in await remote.objects()

    await eventually(is_there, MERGED_S)
    return await remote.model(name)


async def stored(remote: Remote, daemon: Daemon, name: str) -> dict[str, np.ndarray]:
    checkpoint = (await model_of(remote, name))["Checkpoint"]
    return load_file(daemon.state / "store" / "checkpoints" / checkpoint / "model.safetensors")


async def items(remote: Remote) -> list[list[str]]:
    return await remote.get(wire.ROOT_PATH, wire.MANAGER, "InboxItems")


async def test_an_adapter_waits_for_its_base_and_becomes_a_model_by_itself(remote: Remote, daemon: Daemon) -> None:
    delta = make_adapter(daemon.models / "poet", "Tiny/base")

    async def waits() -> bool:
        return [item[:2] for item in await items(remote)] == [["poet", "incomplete"]]

    await eventually(waits)
    ((_, _, detail),) = await items(remote)
    assert "needs its base, 'Tiny/base'" in detail and "flash pull Tiny/base" in detail
    daemon.stop()  # it still waits after a restart
    daemon.start()
    await eventually(waits)
    make_source(daemon.models / "unrelated")
    await remote.model("unrelated")
    assert await waits()
    weight = make_base(daemon.models / "Tiny" / "base")
    merged = await stored(remote, daemon, "poet")
    np.testing.assert_allclose(merged["layer.1.weight"], weight + delta, rtol=1e-5, atol=1e-5)
    assert np.array_equal(merged["norm.weight"], np.ones(7, np.float32))
    assert await items(remote) == []
    poet, base = await model_of(remote, "poet"), await remote.model("Tiny/base")
    assert poet["Architecture"] == base["Architecture"] and poet["SizeBytes"] == base["SizeBytes"]


async def test_an_alias_names_the_base_and_the_base_may_go(remote: Remote, daemon: Daemon, tmp_path: Path) -> None:
    weight = make_base(tmp_path / "base")
    await import_model(remote, tmp_path / "base", "mine")
    delta = make_adapter(daemon.models / "poet", "/home/ada/models/Tiny-base")

    async def waits() -> bool:
        return [item[:2] for item in await items(remote)] == [["poet", "incomplete"]]

    await eventually(waits)
    await remote.call("SetAliases", "as", ["Tiny-base"], path=wire.model_path("mine"), interface=wire.MODEL)
    await model_of(remote, "poet")
    await remote.call("Remove", path=wire.model_path("mine"), interface=wire.MODEL)
    (job,) = await remote.call("Verify", path=wire.model_path("poet"), interface=wire.MODEL)
    assert (await remote.finished(job))["State"] == "done"
    merged = await stored(remote, daemon, "poet")
    np.testing.assert_allclose(merged["layer.1.weight"], weight + delta, rtol=1e-5, atol=1e-5)


async def test_an_import_without_its_base_says_what_to_pull(remote: Remote, tmp_path: Path) -> None:
    make_adapter(tmp_path / "poet", "Tiny/base")
    job = await remote.finished(await remote.import_folder(tmp_path / "poet", "poet"))
    name, message, hint = job["Error"]
    assert (name, job["State"]) == ("org.flashd1.Error.BaseMissing", "failed")
    assert "'Tiny/base'" in message and "flash pull Tiny/base" in hint
    make_base(tmp_path / "base")
    await import_model(remote, tmp_path / "base", "base")
    job = await remote.import_folder(tmp_path / "poet", "poet")

    async def has_ended() -> bool:
        return await remote.get(job, wire.JOB, "State") not in {"collecting", "queued", "running"}

    await eventually(has_ended, MERGED_S)
    assert (await model_of(remote, "poet"))["TensorCount"] == 2


async def test_an_adapter_that_is_saved_again_is_merged_into_its_base_and_not_into_itself(
    remote: Remote, daemon: Daemon
) -> None:
    weight = make_base(daemon.models / "base")
    make_adapter(daemon.models / "out" / "base", "base", seed=1)
    first = (await model_of(remote, "out/base"))["Checkpoint"]
    delta = make_adapter(daemon.models / "out" / "base", "base", seed=2)

    async def has_changed() -> bool:
        return (await model_of(remote, "out/base"))["Checkpoint"] != first

    await eventually(has_changed, MERGED_S)
    merged = await stored(remote, daemon, "out/base")
    np.testing.assert_allclose(merged["layer.1.weight"], weight + delta, rtol=1e-5, atol=1e-5)


async def test_the_shell_converts_an_adapter(remote: Remote, daemon: Daemon, tmp_path: Path) -> None:
    make_base(daemon.models / "Tiny-base")
    await remote.model("Tiny-base")
    make_adapter(tmp_path / "poet", "Someone/Tiny-base")
    flash = Path(sys.executable).with_name("flash")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([flash, "--bus", daemon.address, *arguments], check=False, capture_output=True, text=True)

    shown = run("import", tmp_path / "poet")
    assert shown.returncode == 0, shown.stderr
    assert (await model_of(remote, "poet"))["TensorCount"] == 2
    make_adapter(tmp_path / "orphan", "Someone/Else")
    shown = run("import", tmp_path / "orphan")
    assert shown.returncode == 7
    assert "flash pull Someone/Else" in shown.stderr
    base = (await remote.model("Tiny-base"))["Checkpoint"]
    folder = daemon.state / "store" / "checkpoints" / base
    shown = run("convert", tmp_path / "poet", tmp_path / "out", "--base", folder)
    assert shown.returncode == 0, shown.stderr
    poet = (await model_of(remote, "poet"))["Checkpoint"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        daemon.state / "store" / "checkpoints" / poet / "model.safetensors"
    ).read_bytes()


# Trainers' folders


async def test_a_checkpoint_of_a_trainer_is_its_weights_alone(remote: Remote, daemon: Daemon) -> None:
    folder = make_source(daemon.models / "checkpoint-1000")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json"):
        (folder / name).write_bytes(b"not ours")
    model = await remote.model("checkpoint-1000")
    assert model["TensorCount"] == 1
    assert sorted(path.name for path in (daemon.state / "store" / "checkpoints" / model["Checkpoint"]).iterdir()) == [
        "config.json", "digests.b3", "manifest.toml", "model.safetensors",
    ]  # fmt: skip


async def test_a_training_that_goes_on_is_one_model_of_its_latest_checkpoint(remote: Remote, daemon: Daemon) -> None:
    await remote.call("SetConfig", "ss", "inbox.on_remove", "remove")
    out = daemon.models / "tune"
    make_source(out / "checkpoint-500", seed=1)
    first = await remote.model("tune")
    assert first["Source"].endswith("checkpoint-500")
    (out / "tmp-checkpoint-1000").mkdir()
    make_source(out / "tmp-checkpoint-1000", seed=2)
    (out / "tmp-checkpoint-1000").rename(out / "checkpoint-1000")

    async def is_now(ending: str) -> bool:
        return (await remote.model("tune"))["Source"].endswith(ending)

    await eventually(lambda: is_now("checkpoint-1000"))
    shutil.rmtree(out / "checkpoint-500")  # as save_total_limit does
    make_source(out, seed=3)  # the end of the training
    await eventually(lambda: is_now("/tune"))
    shutil.rmtree(out / "checkpoint-1000")
    await eventually(lambda: is_now("/tune"))
    models = [path for path in await remote.objects() if "/model/" in path]
    assert models == [wire.model_path("tune")]


@pytest.mark.parametrize(
    ("files", "what", "remedy"),
    [
        (["zero_to_fp32.py", "latest"], "DeepSpeed", "zero_to_fp32.py"),
        (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed", "zero_to_fp32.py"),
        (["__0_0.distcp", "__1_0.distcp"], "FSDP", "accelerate merge-weights"),
    ],
)
async def test_shards_of_a_distributed_training_are_refused_with_the_way_out(
    remote: Remote, daemon: Daemon, files: list[str], what: str, remedy: str
) -> None:
    folder = daemon.models / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name in files:
        (folder / name).write_bytes(b"x")

    async def failed() -> list[list[str]]:
        return [item for item in await items(remote) if item[1] == "failed"]

    await eventually(failed)
    ((_, _, detail),) = await failed()
    assert what in detail and remedy in detail
