# SPDX-License-Identifier: Apache-2.0
"""vLLM on two real GPUs: each rank has an image of its own on its card, and answers are exact, by every path."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import Machine, used_bytes
from test_gpu_vllm import EAGER, answers, stored_images, swap
from vllm_models import KV_BYTES, answers_of_plain_vllm, make_sources, settings_with
from waiting import until

import flashd
from flashd.io import cuda
from flashd.units import MiB

TWO_RANKS = ("--tensor-parallel-size", "2")

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"),
    pytest.mark.skipif(len(cuda.gpus()) < 2, reason="there are not two GPUs here"),
]


@pytest.fixture(scope="module", autouse=True)
def no_multicast() -> Iterator[None]:
    """What goes wrong with NVLink's multicast takes other machines' cards along, where a host is shared."""
    off = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in off.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def expected(sources: Path) -> dict[str, list[list[int]]]:
    """What vLLM answers on two GPUs with its own loader."""
    return answers_of_plain_vllm([sources / name for name in ("ada", "bob")], tensor_parallel_size=2)


@pytest.fixture(scope="module")
def expected_eagerly(sources: Path) -> dict[str, list[list[int]]]:
    return answers_of_plain_vllm([sources / "ada"], tensor_parallel_size=2, enforce_eager=True)


def pools(client: flashd.Client) -> list[int]:
    return [device.used_bytes for device in client.devices() if device.name in {"cuda:0", "cuda:1"}]


@pytest.mark.parametrize("machine", [settings_with(*TWO_RANKS)], indirect=True, ids=[""])
def test_every_path_answers_exactly_on_two_gpus(machine: Machine, sources: Path, expected: dict[str, Any]) -> None:
    with machine.connect() as client:
        for name in ("ada", "bob"):
            client.import_(sources / name, name)
        swap(client, "ada", "start", "stored")
        assert answers(client) == expected["ada"], "loaded, and moved into an image a rank"
        assert set(client.model("ada").devices) >= {"cuda:0", "cuda:1"}
        swap(client, "bob", "rebind", "stored")
        assert answers(client) == expected["bob"], "loaded in place, into an image of its own"
        for _ in range(3):
            for name in ("ada", "bob"):
                swap(client, name, "rebind", "device")
                assert answers(client) == expected[name], "shown"
        serving_bytes, serving_pools = [used_bytes(card) for card in (0, 1)], pools(client)
        client.park()
        for card, parked in enumerate(pools(client)):
            assert parked <= serving_pools[card] - KV_BYTES, "what a rank needs besides its weights is given back"
            limit_bytes = serving_bytes[card] - KV_BYTES + 16 * MiB
            until(lambda card=card, limit_bytes=limit_bytes: used_bytes(card) <= limit_bytes)
        swap(client, "bob", "wake", "device")
        assert answers(client) == expected["bob"], "shown to an engine that slept"
        client.park()
        client.evict("ada")
        until(lambda: len(stored_images(machine)) == 4)
        swap(client, "ada", "wake", "stored")
        assert answers(client) == expected["ada"], "streamed from the images on disk"
        client.park()
        client.evict("ada")
        client.load("ada", "host")
        swap(client, "ada", "wake", "host")
        assert answers(client) == expected["ada"], "one copy a rank from the host tier"
        for engine in client.engines():
            client.stop_engine(engine)
        client.evict("bob")
        swap(client, "bob", "start", "stored")
        assert answers(client) == expected["bob"], "a new engine that loads nothing"


@pytest.mark.parametrize("machine", [settings_with(*TWO_RANKS, EAGER)], indirect=True, ids=[""])
def test_a_rank_that_dies_takes_its_engine_along_and_leaves_nothing(
    machine: Machine, sources: Path, expected_eagerly: dict[str, Any]
) -> None:
    with machine.connect() as client:
        client.import_(sources / "ada", "ada")
        swap(client, "ada", "start", "stored")
        client.park()
        (engine,) = client.engines()
        before = [used_bytes(card) for card in (0, 1)]
        os.kill(last_rank(engine.pid), 9)
        until(lambda: not client.engines())
        until(lambda: all(used_bytes(card) < before[card] for card in (0, 1)))
        swap(client, "ada", "start", "device")
        assert answers(client) == expected_eagerly["ada"]


def last_rank(pid: int) -> int:
    """The process of the engine's highest rank, which vLLM starts last."""
    found = [pid]
    for known in found:
        for children in Path(f"/proc/{known}").glob("task/*/children"):
            found += [int(child) for child in children.read_text().split()]
    return [pid for pid in found if "Worker" in Path(f"/proc/{pid}/cmdline").read_text()][-1]
