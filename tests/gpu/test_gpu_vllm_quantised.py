# SPDX-License-Identifier: Apache-2.0
"""Quantised models on a real GPU: an image equals its checkpoint, by every path, also one of its process's own."""

from __future__ import annotations

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from machine import Machine
from quantised_models import make_quantised
from test_gpu_vllm import EAGER, answers, stored_images, swap
from vllm_models import answers_of_plain_vllm, make_sources, settings_with
from waiting import until

AS_IT_IS = settings_with(EAGER)
DECODE_GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}
AS_GRAPHS = settings_with("--compilation-config", json.dumps(DECODE_GRAPHS))
ON_THE_FLY = settings_with(EAGER, "--quantization", "fp8")

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"),
]


BY_GRAPHS = "awq"
WITH_OWN_IMAGES = ("compressed-tensors", "packed", "gptq", "awq")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_sources(tmp_path_factory.mktemp("sources"))
    for name in ("ada", "bob"):
        make_quantised(folder / name, folder / f"{name}8", "fp8")
    for method in WITH_OWN_IMAGES:
        for name in ("ada", "bob"):
            make_quantised(folder / name, folder / f"{name}-{method}", method)
    return folder


@pytest.fixture(scope="module")
def expected(sources: Path) -> dict[str, list[list[int]]]:
    """What vLLM answers with its own loader, of checkpoints in eight bits, and of others that it quantises itself."""
    with ThreadPoolExecutor() as pool:
        own = pool.submit(answers_of_plain_vllm, [sources / name for name in ("ada8", "bob8")], enforce_eager=True)
        on_the_fly = {"quantization": "fp8", "enforce_eager": True}
        made = pool.submit(answers_of_plain_vllm, [sources / name for name in ("ada", "bob")], **on_the_fly)
        return own.result() | made.result()


@pytest.mark.parametrize(
    ("machine", "one", "other"),
    [(AS_IT_IS, "ada8", "bob8"), (ON_THE_FLY, "ada", "bob")],
    indirect=["machine"],
    ids=["checkpoint", "on-the-fly"],
)
def test_every_path_answers_exactly(
    machine: Machine, one: str, other: str, sources: Path, expected: dict[str, Any]
) -> None:
    with machine.connect() as client:
        for name in (one, other):
            client.import_(sources / name, name)
        swap(client, one, "start", "stored")
        assert answers(client) == expected[one], "loaded, and moved into an image"
        assert [engine.weights for engine in client.engines()] == ["image"]
        swap(client, other, "rebind", "stored")
        assert answers(client) == expected[other], "loaded in place, into an image of its own"
        swap(client, one, "rebind", "device")
        assert answers(client) == expected[one], "shown"
        client.park()
        swap(client, other, "wake", "device")
        assert answers(client) == expected[other], "shown to an engine that slept"
        until(lambda: len(stored_images(machine)) == 2)
        for engine in client.engines():
            client.stop_engine(engine)
        client.evict(one)
        swap(client, one, "start", "stored")
        assert answers(client) == expected[one], "a new engine that loads nothing, of the image on disk"


@pytest.fixture(scope="module")
def expected_of_own(sources: Path) -> dict[str, list[list[int]]]:
    names = [f"{name}-{method}" for method in WITH_OWN_IMAGES for name in ("ada", "bob")]
    return answers_of_plain_vllm([sources / name for name in names], enforce_eager=True)


@pytest.fixture(scope="module")
def expected_by_graphs(sources: Path) -> dict[str, list[list[int]]]:
    models = [sources / f"{name}-{BY_GRAPHS}" for name in ("ada", "bob")]
    return answers_of_plain_vllm(models, compilation_config=DECODE_GRAPHS)


@pytest.mark.parametrize("machine", [AS_IT_IS], indirect=True, ids=[""])
@pytest.mark.parametrize("method", WITH_OWN_IMAGES)
def test_an_image_of_its_own_is_mapped_by_its_engine(
    machine: Machine, method: str, sources: Path, expected_of_own: dict[str, Any]
) -> None:
    try_every_path(machine, method, sources, expected_of_own)


@pytest.mark.parametrize("machine", [AS_GRAPHS], indirect=True, ids=[""])
def test_captured_graphs_go_on_with_what_is_mapped(
    machine: Machine, sources: Path, expected_by_graphs: dict[str, Any]
) -> None:
    try_every_path(machine, BY_GRAPHS, sources, expected_by_graphs)


def try_every_path(machine: Machine, method: str, sources: Path, expected_of_own: dict[str, Any]) -> None:
    one, other = f"ada-{method}", f"bob-{method}"
    with machine.connect() as client:
        for name in (one, other):
            client.import_(sources / name, name)
        swap(client, one, "start", "stored")
        assert answers(client) == expected_of_own[one], "loaded, and moved into an image"
        assert [engine.weights for engine in client.engines()] == ["image"], log_of(machine, client)
        client.park()
        swap(client, one, "wake", "device")
        assert answers(client) == expected_of_own[one], "shown to the engine that made it"
        swap(client, other, "rebind", "stored")
        assert answers(client) == expected_of_own[other], "loaded in place, into an image of its own"
        swap(client, one, "rebind", "device")
        assert answers(client) == expected_of_own[one], "shown in place of another"
        client.park()
        swap(client, other, "wake", "device")
        assert answers(client) == expected_of_own[other], "shown to an engine that slept with another"
        until(lambda: len(stored_images(machine)) == 2)
        client.park()
        client.evict(one)
        swap(client, one, "wake", "stored")
        assert answers(client) == expected_of_own[one], "its own image, from the disk"
        for engine in client.engines():
            client.stop_engine(engine)
        until(lambda: not stored_images(machine))
        swap(client, one, "start", "stored")
        assert answers(client) == expected_of_own[one], "another engine maps none of it"


def log_of(machine: Machine, client: Any) -> str:
    (engine,) = client.engines()
    return (machine.daemon.state / "logs" / f"engine-{Path(engine.endpoint).stem}.log").read_text()[-3000:]
