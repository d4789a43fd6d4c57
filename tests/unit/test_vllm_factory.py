# SPDX-License-Identifier: Apache-2.0
"""The keys that tell vLLM engines and images apart, by each model's own settings; without vLLM."""

from __future__ import annotations

import itertools
import json
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from sources import converted

from flashd.checkpoint.files import Checkpoint
from flashd.config.environment import child_environment
from flashd.engines.engine import NO_OPTIONS, BindingRecord, EngineOptions, ModelIdentity, RankPlan
from flashd.engines.inherited import InheritedProcess, Record
from flashd.engines.kv_cache import AUTO
from flashd.engines.messages import Tuning
from flashd.engines.process import EngineProcess, Settings
from flashd.engines.process_info import lacks_memory
from flashd.engines.vllm_factory import VllmFactory
from flashd.errors import EngineFailed
from flashd.io.cuda import Gpu
from flashd.units import GiB, MiB

GPU = Gpu(0, "GPU", "GPU-0", 80 * GiB, False, False, True, True, True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    source = tmp_path / "source"
    source.mkdir()
    safetensors.numpy.save_file({"w": np.zeros(16, np.float16)}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"architectures": ["A"], "model_type": "a"}))
    return converted(source, tmp_path / "checkpoint")


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmFactory:
    all_get = {"arguments": ["--seed", "0"], "adapters": [], "kv_cache_bytes": 2 * GiB}
    made = VllmFactory(Settings("python", tmp_path, tmp_path, 1, 1, 1.0, options=all_get), [GPU])

    async def build() -> dict[str, str]:
        return {"vllm": "0.33", "torch": "2", "platform": "cuda"}

    monkeypatch.setattr(made._zygote, "build", build)
    return made


async def plan(factory: VllmFactory, checkpoint: Checkpoint, options: EngineOptions = NO_OPTIONS) -> RankPlan:
    found = await factory.gpu_plan(checkpoint, options)
    assert found is not None and found.makes_image
    (rank,) = found.ranks
    return rank


async def test_models_with_different_settings_share_neither_engine_nor_wrong_image(
    factory: VllmFactory, checkpoint: Checkpoint
) -> None:
    short = EngineOptions(arguments=("--max-model-len", "100"))
    large = EngineOptions(kv_cache_bytes=3 * GiB)
    keys = [factory.rebind_key(checkpoint, options) for options in (EngineOptions(), short, large)]
    assert all(keys)
    assert all(one != other for one, other in itertools.combinations(keys, 2))
    assert factory.rebind_key(checkpoint, EngineOptions(kv_cache_bytes=2 * GiB)) == keys[0], "they say the same"
    images = [(await plan(factory, checkpoint, options)).key for options in (EngineOptions(), short, large)]
    assert images[0] == images[2] != images[1], "weights do not look different for a larger KV cache"


async def test_the_ledger_counts_the_kv_cache_of_that_model(factory: VllmFactory, checkpoint: Checkpoint) -> None:
    usual = await plan(factory, checkpoint)
    small = await plan(factory, checkpoint, EngineOptions(kv_cache_bytes=256 * MiB))
    assert usual.working_bytes - small.working_bytes == 2 * GiB - 256 * MiB


@pytest.mark.parametrize(
    ("said", "arguments", "wanted"),
    [
        ({"max_position_embeddings": 131072}, (), 16 * GiB),
        ({"max_position_embeddings": 131072}, ("--max-model-len", "8K"), GiB),
        ({"max_position_embeddings": 131072}, ("--max-model-len=8k",), 8000 * GiB // 8192),
        ({"max_position_embeddings": 131072}, ("--max-model-len", "8192", "--max-model-len", "16384"), 2 * GiB),
        ({"max_position_embeddings": 131072}, ("--max-model-len", "auto"), 16 * GiB),
        ({"max_position_embeddings": 131072}, ("--max_model_len", "8192", "--kv-cache-dtype", "fp8"), GiB // 2),
        ({"max_position_embeddings": 131072}, ("--max-model-len", "8192", "-tp", "2"), GiB // 2),
        ({"max_position_embeddings": 512}, (), 256 * MiB),
        ({}, (), 2 * GiB),
    ],
)
async def test_an_automatic_kv_cache_holds_the_context_and_may_grow(
    said: dict[str, int], arguments: tuple[str, ...], wanted: int, factory: VllmFactory, tmp_path: Path
) -> None:
    factory._gpus = [GPU, GPU]
    shape = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    config = json.dumps({"architectures": ["A"], "model_type": "a", **shape, **said})
    source = tmp_path / "shaped"
    source.mkdir()
    safetensors.numpy.save_file({"w": np.zeros(16, np.float16)}, source / "model.safetensors")
    (source / "config.json").write_text(config)
    shaped = converted(source, tmp_path / "shaped-out")
    found = await factory.gpu_plan(shaped, EngineOptions(arguments, AUTO))
    assert found is not None and found.cache_grows
    assert {rank.cache_bytes for rank in found.ranks} == {wanted}
    assert {rank.most_cache_bytes for rank in found.ranks} == {32 * wanted}
    fixed = await factory.gpu_plan(shaped, EngineOptions(arguments, 3 * GiB))
    assert fixed is not None and not fixed.cache_grows


def test_an_engine_with_an_automatic_kv_cache_is_told_its_size(factory: VllmFactory, checkpoint: Checkpoint) -> None:
    auto = EngineOptions(kv_cache_bytes=AUTO)
    assert factory.create(auto, cache_bytes=5 * GiB).cache_bytes == 5 * GiB
    assert factory.create(auto).cache_bytes == 2 * GiB, "where no GPU's memory is known"
    assert factory.create(NO_OPTIONS, cache_bytes=5 * GiB).cache_bytes == 2 * GiB, "it is configured"
    assert factory.rebind_key(checkpoint, auto) not in {"", factory.rebind_key(checkpoint)}


async def test_the_next_daemon_knows_the_size_that_an_automatic_kv_cache_got(factory: VllmFactory) -> None:
    auto = EngineOptions(kv_cache_bytes=AUTO)
    identity = ModelIdentity("ada", ("ada",), "checkpoint", None, auto)
    engine = factory.create(auto, cache_bytes=5 * GiB)
    engine.pid = 1
    engine._records = {"token": BindingRecord(identity, ("arena",))}
    ours, theirs = socket.socketpair()
    with ours:
        content = json.loads(json.dumps(engine._described()))
        left = InheritedProcess(engine._name, theirs.detach(), Record.new(content), content)
        found = EngineProcess.found(left, factory._zygote, factory._settings, factory._tuning)
        assert found.cache_bytes == 5 * GiB
        await found.leave()


def test_an_engine_is_told_what_all_are_and_then_what_its_model_has_different(factory: VllmFactory) -> None:
    told = factory.create(EngineOptions(("--seed", "1"), 0))._tuning
    assert told == Tuning(1, 1, arguments=("--seed", "0", "--seed", "1"), kv_cache_bytes=0)
    assert factory.create()._tuning == Tuning(1, 1, arguments=("--seed", "0"), kv_cache_bytes=2 * GiB)


async def test_a_vllm_that_is_not_as_we_know_it_is_told_by_its_version(tmp_path: Path) -> None:
    """It is imported for real: a zygote dies of what it does not find, and its last words are the error."""
    files = {
        "vllm/__init__.py": "__version__ = '0.99'",
        "vllm/platforms.py": "current_platform = None",
        "vllm/utils/__init__.py": "from vllm.utils import system_utils",
        "vllm/utils/system_utils.py": "",
        "vllm/utils/argparse_utils.py": "FlexibleArgumentParser = None",
    }
    for name, text in files.items():
        (tmp_path / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / name).write_text(text)
    environment = child_environment({"PYTHONPATH": str(tmp_path / "other")})
    settings = Settings(sys.executable, tmp_path, tmp_path / "logs", 1, 1, 60.0, environment=environment)
    factory = VllmFactory(settings, ())
    with pytest.raises(EngineFailed, match=r"vLLM 0\.99 has no make_arg_parser in the modules known to flashd"):
        await factory._zygote.build()
    await factory.close()


@pytest.mark.parametrize(
    "said",
    [
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to",
        "OSError: [Errno 12] Cannot allocate memory",
        "MemoryError: ",
        "ValueError: No available memory for the cache blocks.",
        "ValueError: Available memory on node 0 (20.8/23.54 GiB) on kv cache allocation is less than requested memory",
        "ValueError: Free memory on device cuda:0 (1/80 GiB) on startup is less than desired GPU memory utilization",
    ],
)
def test_whoever_allocates_says_it_in_other_words(said: str) -> None:
    assert lacks_memory(said)
    assert not lacks_memory("ValueError: the model's max seq len (40960) is larger than 100; see the memory profile")


@pytest.fixture
def fine_tune(checkpoint: Checkpoint, tmp_path: Path) -> Checkpoint:
    """Of what `checkpoint` is, with other weights."""
    other = tmp_path / "other"
    other.mkdir()
    safetensors.numpy.save_file({"w": np.ones(16, np.float16)}, other / "model.safetensors")
    (other / "config.json").write_bytes((tmp_path / "source" / "config.json").read_bytes())
    return converted(other, tmp_path / "fine-tune")


@pytest.mark.parametrize(
    ("arguments", "has_draft"),
    [
        (("--speculative-config", '{"method": "draft_model", "model": "/srv/ngram"}'), True),
        (('--speculative_config={"method": "mtp"}', "--chat-template", "/etc/ngram.jinja"), True),
        (("--speculative-config.method", "ngram", "--speculative-config.model", "/srv/draft"), True),
        (("--spec-method", "ngram", "--spec_method", "mtp"), True),
        (("-sc", '{"num_speculative_tokens": 2}'), True),
        (("-sc", "not json"), True),
        (("--speculative-config", '{"method": "ngram", "prompt_lookup_max": 4}'), False),
        (("--spec-method=suffix", "--spec-tokens", "3"), False),
        (("--max-model-len", "100"), False),
    ],
)
async def test_an_engine_with_a_draft_model_is_its_checkpoints_own_and_makes_no_image(
    arguments: tuple[str, ...], has_draft: bool, factory: VllmFactory, checkpoint: Checkpoint, fine_tune: Checkpoint
) -> None:
    options = EngineOptions(arguments)
    assert factory.rebind_key(checkpoint) == factory.rebind_key(fine_tune)
    assert (factory.rebind_key(checkpoint, options) != factory.rebind_key(fine_tune, options)) is has_draft
    found = await factory.gpu_plan(checkpoint, options)
    assert found is not None and found.makes_image is not has_draft


@pytest.mark.parametrize(
    ("arguments", "is_own"),
    [
        (("--kv-transfer-config", '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}'), True),
        (("--kv_offloading_size=4",), True),
        (("--ec-transfer-config.ec_connector", "ECExampleConnector"), True),
        (("--kv-cache-dtype", "fp8"), False),
    ],
)
async def test_an_engine_that_keeps_what_it_read_elsewhere_is_its_checkpoints_own(
    arguments: tuple[str, ...], is_own: bool, factory: VllmFactory, checkpoint: Checkpoint, fine_tune: Checkpoint
) -> None:
    options = EngineOptions(arguments)
    assert (factory.rebind_key(checkpoint, options) != factory.rebind_key(fine_tune, options)) is is_own
    found = await factory.gpu_plan(checkpoint, options)
    assert found is not None and found.makes_image, "which it may come back to"
