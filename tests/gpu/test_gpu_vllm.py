# SPDX-License-Identifier: Apache-2.0
"""vLLM on a real GPU: images are made once, shown at addresses that stay, and answers are exact, by every path."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from machine import Machine, used_bytes
from PIL import Image
from vllm_models import (
    KV_BYTES,
    PROMPTS,
    answers_of_plain_vllm,
    make_large,
    make_seeing,
    make_sources,
    settings_with,
    staying,
)
from waiting import until

import flashd
from flashd import errors
from flashd.io import cuda
from flashd.units import MiB

# For tests that do not need compiled code and graphs, which take most of a minute each time.
EAGER = "--enforce-eager"

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"),
]
with_graphs = pytest.mark.parametrize("machine", [settings_with()], indirect=True, ids=[""])
eagerly = pytest.mark.parametrize("machine", [settings_with(EAGER)], indirect=True, ids=[""])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def expected(sources: Path) -> dict[str, list[list[int]]]:
    """What vLLM answers with its own loader."""
    return answers_of_plain_vllm([sources / name for name in ("ada", "bob")])


@pytest.fixture(scope="module")
def expected_eagerly(sources: Path) -> dict[str, list[list[int]]]:
    return answers_of_plain_vllm([sources / name for name in ("ada", "bob")], enforce_eager=True)


def answers(client: flashd.Client, salt: str = "") -> list[list[int]]:
    """Answers to all prompts. Asked with the same salt, a model may find its own beginnings of them in the cache, and
    then computes the rest in other pieces, which are rounded in other ways."""
    transport = httpx.HTTPTransport(uds=client.status().endpoint, verify=False)
    with httpx.Client(transport=transport, base_url="http://flashd", timeout=120) as http:
        body = {"prompt": PROMPTS, "temperature": 0, "max_tokens": 16, "seed": 0, "return_token_ids": True}
        body["cache_salt"] = salt or secrets.token_hex(8)
        found = http.post("/v1/completions", json=body)
    assert found.status_code == 200, found.text
    return [choice["token_ids"] for choice in found.json()["choices"]]


def swap(client: flashd.Client, name: str, how: str, tier: str) -> None:
    outcome = client.swap(name)
    assert (outcome.how, outcome.from_tier) == (how, tier), name


def stored_images(machine: Machine) -> list[Path]:
    return list(machine.daemon.state.glob("store/images/*/manifest.toml"))


def compiled_keys(machine: Machine) -> set[Path]:
    """A folder for each key under which vLLM keeps what it compiled."""
    return set((machine.daemon.state / "compiled/vllm/torch_compile_cache").glob("*/*"))


def pool(client: flashd.Client) -> int:
    return next(device.used_bytes for device in client.devices() if device.name == "cuda:0")


@with_graphs
def test_every_path_answers_exactly(machine: Machine, sources: Path, expected: dict[str, Any]) -> None:
    with machine.connect() as client:
        for name in ("ada", "bob"):
            client.import_(sources / name, name)
        swap(client, "ada", "start", "stored")
        assert answers(client) == expected["ada"], "loaded, and moved into an image"
        assert client.model("ada").residency == "device"
        swap(client, "bob", "rebind", "stored")
        assert answers(client) == expected["bob"], "loaded in place, into an image of its own"
        for turn in range(5):
            for name in ("ada", "bob"):
                swap(client, name, "rebind", "device")
                assert answers(client, f"turn {turn}") == expected[name], "shown, with nothing that the other has read"
        serving_bytes, serving_pool = used_bytes(), pool(client)
        client.park()
        assert pool(client) <= serving_pool - KV_BYTES, "what it needs besides its weights is given back"
        until(lambda: used_bytes() <= serving_bytes - KV_BYTES + 16 * MiB)
        for name in ("bob", "ada"):
            swap(client, name, "wake", "device")
            assert answers(client) == expected[name], "shown to an engine that slept"
            client.park()
        before_bytes = used_bytes()
        client.evict("ada")
        assert used_bytes() < before_bytes, "parking copies nothing: what is evicted is free"
        until(lambda: len(stored_images(machine)) == 2)
        client.load("ada", "host")
        swap(client, "ada", "wake", "host")
        assert answers(client) == expected["ada"], "one copy from the host tier"
        client.park()
        client.evict("ada")
        swap(client, "ada", "wake", "stored")
        assert answers(client) == expected["ada"], "streamed from the image on disk"
        for engine in client.engines():
            client.stop_engine(engine)
        client.evict("bob")
        before = compiled_keys(machine)
        swap(client, "bob", "start", "stored")
        assert answers(client) == expected["bob"], "a new engine that loads nothing"
        assert before and compiled_keys(machine) == before, "and has no key of its own for what is compiled"


@eagerly
def test_a_parked_engine_makes_the_image_of_a_new_fine_tune_before_anybody_asks(
    machine: Machine, sources: Path, expected_eagerly: dict[str, Any]
) -> None:
    with machine.connect() as client:
        client.import_(sources / "ada", "ada")
        swap(client, "ada", "start", "stored")
        client.park()
        client.set_config("engines.warm_new", "true")
        client.import_(sources / "bob", "bob")
        until(lambda: client.model("bob").residency == "device")
        until(lambda: [engine.state for engine in client.engines()] == ["parked"])
        swap(client, "bob", "wake", "device")
        assert answers(client) == expected_eagerly["bob"]
        swap(client, "ada", "rebind", "device")
        assert answers(client) == expected_eagerly["ada"]


@eagerly
def test_an_engine_killed_in_its_sleep_leaves_nothing_and_another_takes_its_place(
    machine: Machine, sources: Path, expected_eagerly: dict[str, Any]
) -> None:
    with machine.connect() as client:
        client.import_(sources / "ada", "ada")
        swap(client, "ada", "start", "stored")
        client.park()
        os.kill(client.engines()[0].pid, 9)
        until(lambda: not client.engines())
        swap(client, "ada", "start", "device")
        assert answers(client) == expected_eagerly["ada"]


@contextlib.contextmanager
def nothing_free() -> Iterator[None]:
    """Somebody else takes whatever the card has, also what becomes free meanwhile."""
    enough = threading.Event()
    taken: list[torch.Tensor] = []

    def take() -> None:
        while not enough.wait(0.01):
            free_bytes, _ = cuda.memory_info(0)
            if free_bytes > KV_BYTES // 4:
                with contextlib.suppress(torch.OutOfMemoryError):
                    taken.append(torch.empty(free_bytes - KV_BYTES // 8, dtype=torch.uint8, device="cuda"))

    thread = threading.Thread(target=take)
    thread.start()
    until(lambda: cuda.memory_info(0)[0] < KV_BYTES)
    try:
        yield
    finally:
        enough.set()
        thread.join()
        taken.clear()
        torch.cuda.empty_cache()


@eagerly
def test_no_memory_at_wake_is_an_error_with_its_words_and_nothing_is_lost(
    machine: Machine, sources: Path, expected_eagerly: dict[str, Any]
) -> None:
    with machine.connect() as client:
        client.import_(sources / "ada", "ada")
        swap(client, "ada", "start", "stored")
        client.park()
        with nothing_free(), pytest.raises(errors.FlashdError, match=r"(?i)memory|busy or unavailable"):
            client.swap("ada")
        assert client.status().active_model == "" and not client.engines()
        swap(client, "ada", "start", "device")
        assert answers(client) == expected_eagerly["ada"]


@eagerly
def test_two_servers_started_by_hand_share_one_copy(machine: Machine, sources: Path, tmp_path: Path) -> None:
    large = make_large(sources / "ada", tmp_path / "large")
    expected = answers_of_plain_vllm([large], enforce_eager=True)["large"]
    with machine.connect() as client:
        client.import_(large, "large")
        size_bytes = client.model("large").size_bytes
        options = {
            "enforce_eager": True,
            "load_format": "flash",
            "model_loader_extra_config": {"bus": machine.daemon.address, "model": "large"},
        }
        empty_bytes = used_bytes()
        with staying(large, **options) as first:
            one_bytes, one_pool = used_bytes(), pool(client)
            assert first == expected
            until(lambda: client.model("large").leases == 1)  # besides, it is written to the store now
            assert one_pool >= size_bytes, "the image is in the ledger"
            with staying(large, **options) as second:
                two_bytes = used_bytes()
                assert second == expected
                assert client.model("large").leases == 2 and pool(client) == one_pool
            first_bytes, second_bytes = one_bytes - empty_bytes, two_bytes - one_bytes
            print(
                f"the first takes {first_bytes / 1e6:.0f} MB of the card, the second {second_bytes / 1e6:.0f} MB more"
            )
            assert second_bytes < first_bytes - 0.9 * size_bytes, "the weights are there once"
        until(lambda: client.model("large").leases == 0)
        with staying(large, **options) as again:
            assert again == expected and client.model("large").leases == 1
        client.evict("large")


@eagerly
def test_a_server_started_by_hand_answers_from_a_lease(
    machine: Machine, sources: Path, expected_eagerly: dict[str, Any]
) -> None:
    with machine.connect() as client:
        client.import_(sources / "ada", "ada")
    found = answers_of_plain_vllm(
        [sources / "ada"],
        enforce_eager=True,
        load_format="flash",
        model_loader_extra_config={"bus": machine.daemon.address, "model": "ada", "device": "cuda:0"},
    )
    assert found["ada"] == expected_eagerly["ada"]


@eagerly
def test_a_server_started_by_hand_takes_what_is_free(
    machine: Machine, sources: Path, expected_eagerly: dict[str, Any]
) -> None:
    """vLLM's default share of the card is not free here, as where flashd's models are warm."""
    from vllm.config import CacheConfig

    with machine.connect() as client:
        client.import_(sources / "ada", "ada")
    options = {"enforce_eager": True, "gpu_memory_utilization": CacheConfig.gpu_memory_utilization}
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    taken = torch.empty(max(0, free_bytes - total_bytes // 2), dtype=torch.uint8, device="cuda")
    try:
        found = answers_of_plain_vllm(
            [sources / "ada"],
            load_format="flash",
            kv_cache_memory_bytes=None,
            model_loader_extra_config={"bus": machine.daemon.address, "model": "ada"},
            **options,
        )
    finally:
        del taken
        torch.cuda.empty_cache()
    assert found["ada"] == expected_eagerly["ada"]


def seen(client: flashd.Client) -> list[int]:
    """What the active model says of a picture."""
    picture = io.BytesIO()
    Image.effect_mandelbrot((28, 28), (-2, -1.5, 1, 1.5), 60).convert("RGB").save(picture, "png")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    body = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 16}
    transport = httpx.HTTPTransport(uds=client.status().endpoint, verify=False)
    with httpx.Client(transport=transport, base_url="http://flashd", timeout=120) as http:
        found = http.post("/v1/chat/completions", json={**body, "return_token_ids": True})
    assert found.status_code == 200, found.text
    tokens: list[int] = found.json()["choices"][0]["token_ids"]
    return tokens


@eagerly
def test_a_picture_is_looked_at_again_by_the_next_model(machine: Machine, sources: Path, tmp_path: Path) -> None:
    make_seeing(sources / "ada", tmp_path)
    with machine.connect() as client:
        for name in ("one", "other"):
            client.import_(tmp_path / name, name)
        swap(client, "one", "start", "stored")
        by_one = seen(client)
        swap(client, "other", "rebind", "stored")
        by_other = seen(client)
        client.park()
        swap(client, "one", "wake", "device")
        assert seen(client) == by_one
        for engine in client.engines():
            client.stop_engine(engine)
        swap(client, "other", "start", "device")
        assert seen(client) == by_other != by_one, "as in an engine that has seen nothing yet"
