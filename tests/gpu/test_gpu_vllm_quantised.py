# SPDX-License-Identifier: Apache-2.0
"""Quantised models on a real GPU: an image equals its checkpoint, and models without one say so."""

from __future__ import annotations

import importlib.util
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
ON_THE_FLY = settings_with(EAGER, "--quantization", "fp8")

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"),
]


WITHOUT_IMAGE = ("compressed-tensors", "gptq", "awq")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_sources(tmp_path_factory.mktemp("sources"))
    for name in ("ada", "bob"):
        make_quantised(folder / name, folder / f"{name}8", "fp8")
    for method in WITHOUT_IMAGE:
        make_quantised(folder / "ada", folder / method, method)
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


@pytest.mark.parametrize("machine", [AS_IT_IS], indirect=True, ids=[""])
def test_what_has_no_image_takes_the_ordinary_path_and_says_so(machine: Machine, sources: Path) -> None:
    expected = answers_of_plain_vllm([sources / name for name in WITHOUT_IMAGE], enforce_eager=True)
    with machine.connect() as client:
        for name in WITHOUT_IMAGE:
            client.import_(sources / name, name)
            swap(client, name, "start", "stored")
            assert answers(client) == expected[name]
            (engine,) = client.engines()  # the last one is stopped
            assert (engine.model, engine.weights) == (name, "checkpoint")
            log = machine.daemon.state / "logs" / f"engine-{Path(engine.endpoint).stem}.log"
            assert "no image is made of these weights" in log.read_text()
        client.park()
        assert not client.engines(), "nor is it parked"
        assert not stored_images(machine)
